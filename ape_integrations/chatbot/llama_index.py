"""A LlamaIndex pipeline for a chatbot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_index.core import ChatPromptTemplate
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.readers.base import BaseReader
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode

from ape_integrations.chatbot.conversation import Turn
from ape_integrations.chatbot.files import Passage
from ape_integrations.chatbot.pipeline import Pipeline, with_carried
from ape_integrations.core.generator import APEGenerator
from ape_integrations.llama_index import APELLM, APECacheWarmer

#: Elements whose text no browser shows.
_HIDDEN = ("script", "style", "template", "noscript")


class HTMLReader(BaseReader):
    """Reads what an HTML file shows, whether or not it has a ``<body>``.

    LlamaIndex's ``HTMLTagReader`` finds nothing without the tag that it is told, and takes a
    script's source for text.
    """

    def load_data(self, file: Path, extra_info: dict[str, Any] | None = None) -> list[Document]:
        """Return one document.

        Parameters
        ----------
        file : Path
            UTF-8.
        extra_info : dict, optional
            Metadata of the document.
        """
        from bs4 import BeautifulSoup

        page = BeautifulSoup(Path(file).read_text(encoding="utf-8"), "html.parser")
        for element in page(_HIDDEN):
            element.decompose()
        # A space between elements: "<td>a</td><td>b</td>" are two words.
        lines = (" ".join(line.split()) for line in page.get_text(" ").splitlines())
        return [Document(text="\n".join(filter(None, lines)), metadata=extra_info or {})]


class LlamaIndexPipeline(Pipeline):
    """Retrieves with a LlamaIndex retriever and answers with an `APELLM`.

    The prompt is sent with ``stream_chat``: a ``ContextChatEngine`` would do the same in a thread
    that cannot be stopped.

    Parameters
    ----------
    llm : APELLM
        Answers.
    prompt : ChatPromptTemplate
        Has ``{context_str}`` and, in its last message, ``{query_str}``. The conversation goes
        between the two.
    read : callable
        Cuts a file into nodes.
    retriever : callable
        Makes a retriever over nodes.
    """

    framework = "LlamaIndex"

    def __init__(
        self,
        llm: APELLM,
        prompt: ChatPromptTemplate,
        read: Callable[[Path], Sequence[BaseNode]],
        retriever: Callable[[list[BaseNode]], BaseRetriever],
    ) -> None:
        self._llm = llm
        self._prompt = prompt
        self._read = read
        self._new_retriever = retriever
        self._warmer = APECacheWarmer(llm=llm, prompt=prompt, show_progress=False)

    @property
    def generator(self) -> APEGenerator:
        """The generator behind the LLM."""
        return self._llm.generator

    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield the texts of a file's nodes."""
        for node in self._read(path):
            # Without metadata: a file's path would make the same text another one elsewhere.
            text = node.get_content(metadata_mode=MetadataMode.NONE)
            yield text, str(node.metadata.get("page_label", ""))

    def index(self, passages: Sequence[Passage]) -> None:
        """Make a retriever over the passages."""
        nodes: list[BaseNode] = [
            TextNode(text=passage.text, id_=str(number)) for number, passage in enumerate(passages)
        ]
        # One assignment: an answer in another thread sees passages and retriever of one kind.
        self._indexed = (list(passages), self._new_retriever(nodes))

    def warm(self, passages: Sequence[Passage]) -> None:
        """Encode what the store lacks."""
        self._warmer([TextNode(text=passage.text) for passage in passages])

    def answer(self, turn: Turn, history: Sequence[Turn]) -> Iterator[str]:
        """Retrieve, fill the prompt, stream the answer."""
        passages, retriever = self._indexed
        nodes = retriever.retrieve(turn.question)
        found = [passages[int(node.node.node_id)] for node in nodes]
        turn.passages = with_carried(found, history)
        context = "\n\n".join(passage.text for passage in turn.passages)
        *head, question = self._prompt.format_messages(context_str=context, query_str=turn.question)
        messages = [*head, *_messages(history), question]
        turn.prompt = self._llm.render_messages(messages)
        response = None
        for response in self._llm.stream_chat(messages):
            yield response.delta or ""
        if response is not None and isinstance(response.raw, dict):
            turn.report = response.raw["ape"]


def _messages(history: Sequence[Turn]) -> Iterator[ChatMessage]:
    for turn in history:
        yield ChatMessage(role=MessageRole.USER, content=turn.question)
        yield ChatMessage(role=MessageRole.ASSISTANT, content=turn.answer)
