"""The chatbot's page, made with Gradio."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ape_integrations.chatbot.conversation import Conversation, Conversations
from ape_integrations.chatbot.figures import panel
from ape_integrations.chatbot.files import SUFFIXES
from ape_integrations.chatbot.introduction import Introduction
from ape_integrations.chatbot.library import Library
from ape_integrations.chatbot.markup import as_text, documents, messages
from ape_integrations.chatbot.pipeline import Pipeline
from ape_integrations.errors import APEError, MissingDependencyError

# Read when Gradio is imported: nothing is reported to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "The page needs Gradio, which is not installed: pip install 'ape-integrations[chat]'"
    ) from error

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent

#: Seconds between two looks at a library that is being read.
_PAUSE = 0.5

#: A tab keeps its name when it is loaded again, and another tab has another one.
_NAME_OF_TAB = """() => {
  let name = sessionStorage.getItem("ape-chat");
  if (!name) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    name = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("ape-chat", name);
  }
  return [name];
}"""


class Page:
    """The page: conversation, figures, documents.

    Every browser tab has a conversation of its own; model, store and documents are shared.

    Parameters
    ----------
    pipeline : Pipeline
        Answers.
    library : Library
        The files.
    introduction : Introduction
        What stands above the conversation.
    max_new_tokens : int
        Tokens of an answer.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        library: Library,
        introduction: Introduction,
        max_new_tokens: int,
    ) -> None:
        self._library = library
        self._introduction = introduction
        self._conversations = Conversations(lambda: Conversation(pipeline, library, max_new_tokens))
        self._tabs: dict[str, str] = {}  # names of tabs by Gradio's sessions
        self.blocks: gr.Blocks = self._build()

    def launch(self, host: str, port: int, *, max_file_bytes: int, **options: Any) -> str:
        """Serve the page; return its address.

        Parameters
        ----------
        host : str
            Address to listen at.
        port : int
            Port, 0 for any free one.
        max_file_bytes : int
            Largest file that can be uploaded.
        **options
            For ``gradio.Blocks.launch``.
        """
        system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
        theme = gr.themes.Default(
            # Names of fonts, not of Google fonts: nothing is fetched.
            font=system,
            font_mono=["ui-monospace", "Consolas", "monospace"],
            primary_hue="teal",
            neutral_hue="slate",
        )
        self.blocks.queue(default_concurrency_limit=None)
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css_paths=_HERE / "page.css",
            max_file_size=max_file_bytes,
            **options,
        )
        return address

    # Layout -------------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        about = self._introduction
        with gr.Blocks(
            title=about.title, analytics_enabled=False, fill_height=True, fill_width=True
        ) as context:
            blocks: gr.Blocks = context
            tab = gr.Textbox(visible=False)
            timer = gr.Timer(_PAUSE)
            with gr.Row(elem_id="ape-columns", equal_height=False):
                with gr.Column(scale=3, min_width=420):
                    with gr.Row(elem_id="ape-top"):
                        gr.HTML(_heading(about))
                        clear = gr.Button(
                            "New conversation", size="sm", scale=0, elem_id="ape-clear"
                        )
                    if about.note:
                        gr.HTML(f'<p class="ape-hint">{as_text(about.note)}</p>')
                    chat = gr.Chatbot(
                        elem_id="ape-chat",
                        show_label=False,
                        height="calc(100vh - 300px)",
                        min_height=320,
                        latex_delimiters=[],
                        buttons=[],
                        feedback_options=None,
                        placeholder="Ask something about the documents.",
                    )
                    with gr.Row(elem_id="ape-ask"):
                        question = gr.Textbox(
                            elem_id="ape-question",
                            show_label=False,
                            placeholder="Reading the documents ...",
                            interactive=False,
                            lines=1,
                            max_lines=6,
                            submit_btn=True,
                            autofocus=True,
                        )
                    with gr.Row(elem_id="ape-examples"):
                        examples = [
                            gr.Button(text, size="sm", min_width=60) for text in about.examples
                        ]
                with gr.Column(scale=2, min_width=320, elem_id="ape-side"):
                    with gr.Column(elem_classes="ape-card"):
                        gr.HTML("<h2>What the cache did</h2>")
                        figures = gr.HTML(panel([]), elem_id="ape-figures")
                        compare = gr.Checkbox(
                            elem_id="ape-compare",
                            label="Compare with sequential prefill",
                            info="Runs each prompt a second time, without APE.",
                        )
                    with gr.Column(elem_classes="ape-card"):
                        gr.HTML("<h2>Documents</h2>")
                        files = gr.HTML(elem_id="ape-documents")
                        upload = gr.UploadButton(
                            "Add files",
                            elem_id="ape-upload",
                            size="sm",
                            file_count="multiple",
                            file_types=list(SUFFIXES),
                        )

            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            shown = [question, chat, figures]
            blocks.load(self._enter, tab, [tab, *shown], js=_NAME_OF_TAB, **quiet)
            timer.tick(self._progress, tab, [question, files, timer], **quiet)
            question.submit(self._ask, [question, compare, tab], shown, **quiet)
            for example in examples:
                example.click(self._ask, [example, compare, tab], shown, **quiet)
            question.stop(self._stop, tab, None, queue=False, **quiet)
            compare.input(self._compare, [compare, tab], shown, **quiet)
            clear.click(self._clear, tab, shown, queue=False, **quiet)
            chat.clear(self._clear, tab, shown, queue=False, **quiet)
            upload.upload(self._upload, upload, [upload, files, timer], **quiet)
            blocks.unload(self._leave)
        return blocks

    # What users do ------------------------------------------------------------------------------

    def _enter(self, tab: str, request: gr.Request) -> list[Any]:
        """Learn which tab a session of Gradio's is, and show what the tab showed before.

        The page has the tab's name, and can ask, once nothing is left to be restored.
        """
        self._tabs[str(request.session_hash)] = tab
        conversation = self._conversations[tab]
        conversation.stop()
        return [tab, *self._shown(conversation)]

    def _leave(self, request: gr.Request) -> None:
        """Stop what is generated for a tab that was closed or is loaded again."""
        tab = self._tabs.pop(str(request.session_hash), None)
        if tab is not None and tab not in self._tabs.values():
            self._conversations[tab].stop()

    def _progress(self, tab: str) -> list[Any]:
        """Show how reading goes on; stop asking once all is warm."""
        going = self._library.status.phase != "ready"
        # A tab without a name yet has no conversation to ask in.
        invitation = gr.update(**self._invitation()) if tab else gr.skip()
        return [invitation, documents(self._library), gr.Timer(active=going)]

    def _ask(self, question: str, compare: bool, tab: str) -> Iterator[list[Any]]:
        conversation = self._conversations[tab]
        try:
            turns = conversation.ask(question, compare=compare)
        except APEError as error:
            gr.Info(as_text(str(error)), duration=6)
            yield [gr.skip(), gr.skip(), gr.skip()]
            return
        emptied = False
        for turn in turns:
            shown = self._shown(conversation)
            # Emptied once: what is typed meanwhile stays.
            shown[0] = self._input(turn.is_running, **({} if emptied else {"value": ""}))
            emptied = True
            yield shown

    def _compare(self, compare: bool, tab: str) -> Iterator[list[Any]]:
        """Compare the last answer as soon as the switch is on."""
        conversation = self._conversations[tab]
        try:
            turns = conversation.compare() if compare else iter(())
        except APEError:
            return  # the running answer was asked for without: the next one is compared
        for _ in turns:
            yield self._shown(conversation)

    def _stop(self, tab: str) -> None:
        self._conversations[tab].stop()

    def _clear(self, tab: str) -> list[Any]:
        conversation = self._conversations[tab]
        conversation.clear()
        return self._shown(conversation)

    def _upload(self, paths: Sequence[str] | None) -> list[Any]:
        """Read files for as long as the server runs."""
        for path in map(Path, paths or ()):
            try:
                passages = self._library.add(path, path.name)
                gr.Info(as_text(f"{path.name}: {passages} passages. Kept until the server ends."))
            except APEError as error:
                gr.Warning(as_text(str(error)), duration=20)
            finally:
                path.unlink(missing_ok=True)
        return [gr.update(value=None), documents(self._library), gr.Timer(active=True)]

    # What they see ------------------------------------------------------------------------------

    def _shown(self, conversation: Conversation) -> list[Any]:
        turns = list(conversation.turns)
        running = bool(turns) and turns[-1].is_running and not turns[-1].stopping.is_set()
        return [self._input(running), messages(turns), panel(turns)]

    def _input(self, running: bool, **more: Any) -> Any:
        """Return the state of the text box while an answer is generated, or not."""
        state = {"submit_btn": not running, "stop_btn": running, **more}
        return gr.update(**self._invitation(), **state)

    def _invitation(self) -> dict[str, Any]:
        """Return whether something can be asked, and what the text box says to that."""
        if self._library.passages:
            return {"interactive": True, "placeholder": "Ask something"}
        reading = self._library.status.phase == "reading"
        said = "Reading the documents ..." if reading else "Add files to ask about"
        return {"interactive": False, "placeholder": said}


def _heading(about: Introduction) -> str:
    return (
        f'<header class="ape-head"><h1>{as_text(about.title)}</h1>'
        f"<span>{as_text(about.model)}</span></header>"
    )


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
