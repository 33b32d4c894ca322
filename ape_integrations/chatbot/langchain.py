"""A LangChain pipeline for a chatbot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from ape_integrations.chatbot.conversation import Turn
from ape_integrations.chatbot.files import Passage
from ape_integrations.chatbot.pipeline import Pipeline, with_carried
from ape_integrations.core.generator import APEGenerator
from ape_integrations.langchain import APEDocumentCompressor, ChatAPE


class LangChainPipeline(Pipeline):
    """Streams a chain that retrieves and answers with a `ChatAPE`.

    Parameters
    ----------
    chat : ChatAPE
        Answers.
    prompt : ChatPromptTemplate
        The chain's prompt, with the documents in ``{context}``.
    read : callable
        Cuts a file into documents.
    chain : callable
        Makes a chain over documents. It is given ``question``, ``history`` (messages) and
        ``carried`` (documents of the question before), and its stream holds ``context`` (the
        documents that it reads), ``prompt`` (filled) and ``answer`` (messages).
    """

    framework = "LangChain"

    def __init__(
        self,
        chat: ChatAPE,
        prompt: ChatPromptTemplate,
        read: Callable[[Path], Sequence[Document]],
        chain: Callable[[list[Document]], Runnable[dict[str, Any], dict[str, Any]]],
    ) -> None:
        self._chat = chat
        self._prompt = prompt
        self._read = read
        self._new_chain = chain
        self._warmer = APEDocumentCompressor(model=chat)

    @property
    def generator(self) -> APEGenerator:
        """The generator behind the chat model."""
        return self._chat.generator

    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield the texts of a file's documents."""
        for document in self._read(path):
            yield document.page_content, str(document.metadata.get("page_label", ""))

    def index(self, passages: Sequence[Passage]) -> None:
        """Make a chain over the passages."""
        self._chain = self._new_chain([_document(passage) for passage in passages])

    def warm(self, passages: Sequence[Passage]) -> None:
        """Encode what the store lacks."""
        documents = [Document(passage.text) for passage in passages]
        self._warmer.warm(documents, self._prompt, show_progress=False)

    def answer(self, turn: Turn, history: Sequence[Turn]) -> Iterator[str]:
        """Stream the chain."""
        asked = {
            "question": turn.question,
            "history": list(_messages(history)),
            "carried": [_document(passage) for passage in with_carried([], history)],
        }
        for part in self._chain.stream(asked):
            if "context" in part:
                turn.passages = [document.metadata["passage"] for document in part["context"]]
            if "prompt" in part:
                turn.prompt = self._chat.render(part["prompt"].to_messages())
            if "answer" in part:
                message = part["answer"]
                turn.report = message.response_metadata.get("ape", turn.report)
                yield message.text


def _document(passage: Passage) -> Document:
    return Document(passage.text, metadata={"passage": passage})


def _messages(history: Sequence[Turn]) -> Iterator[BaseMessage]:
    for turn in history:
        yield HumanMessage(turn.question)
        yield AIMessage(turn.answer)
