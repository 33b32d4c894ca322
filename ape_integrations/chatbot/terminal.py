"""The chatbot in a terminal, made with rich."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ape_integrations.chatbot.conversation import Conversation, Turn
from ape_integrations.chatbot.figures import figures_line
from ape_integrations.chatbot.library import Library
from ape_integrations.errors import APEError

_PAUSE = 0.1

_HELP = """\
/sources      what the last answer was made from, numbered
/sources N    passage N in full
/compare      run each prompt sequentially as well, or no longer; begins with the last answer
/add FILE     read one more file
/files        what was read, and what was left out
/clear        begin a new conversation
/quit         end; so does Ctrl-D
Ctrl-C stops an answer."""


class Terminal:
    """Asks and answers in a terminal.

    Parameters
    ----------
    conversation : Conversation
        Answers.
    library : Library
        The files.
    console : Console
        Where to print.
    read_line : callable, optional
        Returns what the user writes; raises ``EOFError`` at the end.
    """

    def __init__(
        self,
        conversation: Conversation,
        library: Library,
        console: Console,
        read_line: Callable[[], str] | None = None,
    ) -> None:
        self._conversation = conversation
        self._library = library
        self._console = console
        self._read_line = read_line or (lambda: input("> "))
        self._comparing = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/add": self._add,
            "/clear": lambda _: self._conversation.clear(),
            "/compare": lambda _: self._compare(),
            "/files": lambda _: self._show_files(),
            "/help": lambda _: self._say(_HELP),
            "/sources": self._show_sources,
        }

    def run(self) -> None:
        """Answer until the user ends it."""
        self._say("Ask something, or write /help.", "dim")
        while True:
            try:
                line = self._read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends the program.", "dim")
                continue
            command, _, argument = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if not line.startswith("/"):
                    self._ask(line)
                elif command in self._commands:
                    self._commands[command](argument.strip())
                else:
                    self._say(f"There is no command {command}. Write /help.", "yellow")
            except APEError as error:
                self._say(str(error), "yellow")

    # Answers ------------------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        self._follow(self._conversation.ask(question, compare=self._comparing), show=True)

    def _compare(self) -> None:
        self._comparing = not self._comparing
        state = "on" if self._comparing else "off"
        self._say(f"Comparison with sequential prefill is {state}.", "dim")
        if self._comparing:
            self._follow(self._conversation.compare(), show=False)

    def _follow(self, turns: Iterator[Turn], *, show: bool) -> None:
        """Print an answer as it comes; Ctrl-C stops it and nothing else."""
        shown, turn = 0, None
        with _interrupt(self._conversation.stop):
            for turn in turns:
                if show:
                    self._write(turn.answer[shown:])
                    shown = max(shown, len(turn.answer))
        if turn is None:
            return
        if show:
            self._write("\n" if turn.answer or not turn.error else "")
        if turn.state == "failed":
            self._say(turn.error, "yellow")
        elif turn.state == "stopped":
            self._say("Stopped.", "dim")
        elif not turn.answer:
            self._say("(no answer)", "dim")
        if line := figures_line(turn):
            self._say(line, "dim cyan")
        if show and turn.passages:
            titles = dict.fromkeys(passage.title for passage in turn.passages)
            self._say(f"from {', '.join(titles)}  (/sources)", "dim")
        if turn.sequential and turn.sequential.answer not in ("", turn.answer):
            self._say(f"Sequentially: {turn.sequential.answer}", "dim")

    # Commands -----------------------------------------------------------------------------------

    def _show_sources(self, argument: str) -> None:
        turns = self._conversation.turns
        passages = turns[-1].passages if turns else []
        if not passages:
            self._say("There is no answer with sources yet.", "yellow")
        elif not argument:
            for number, passage in enumerate(passages, 1):
                start = " ".join(passage.text.split())
                self._say(f"{number}  {passage.title}: {start[:60]}")
        elif argument.isdecimal() and 1 <= int(argument) <= len(passages):
            passage = passages[int(argument) - 1]
            # Text, not a string: square brackets in a document are no markup.
            self._console.print(
                Panel(Text(_plain(passage.text)), title=Text(_plain(passage.title)))
            )
        else:
            self._say(f"Write a number from 1 to {len(passages)} behind /sources.", "yellow")

    def _show_files(self) -> None:
        for name in self._library.files:
            self._say(name)
        for problem in self._library.problems:
            self._say(problem, "yellow")

    def _add(self, argument: str) -> None:
        path = Path(argument.strip("\"'")).expanduser()
        if not argument or not path.is_file():
            missing = f"There is no file {path}." if argument else "Name a file behind /add."
            self._say(missing, "yellow")
            return
        passages = self._library.add(path, path.name)
        self._say(f"{path.name}: {passages} passage{'s'[: passages != 1]}.", "dim")

    # Printing -----------------------------------------------------------------------------------

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(_plain(text), style=style))

    def _write(self, text: str) -> None:
        self._console.print(Text(_plain(text)), end="", soft_wrap=True)
        self._console.file.flush()


def _plain(text: str) -> str:
    """Return a text without characters that would steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable()))


@contextmanager
def _interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call something instead of ending the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def show_progress(library: Library, console: Console) -> None:
    """Read and warm a library behind a progress bar; Ctrl-C leaves the rest to the background."""
    library.start()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("Reading")
            while not library.wait(_PAUSE):
                status = library.status
                name = "Reading" if status.phase == "reading" else "Warming (Ctrl-C: ask now)"
                progress.update(
                    task, description=name, completed=status.done, total=status.total or None
                )
    except KeyboardInterrupt:
        while library.status.phase == "reading":
            library.wait(_PAUSE)
