"""Registers what pipelines retrieve with the models that will read it, with no user code.

Retrievers report what they return. Documents that come another way, from a vector store's own
methods or a checkpoint, show as they pass from step to step, in a graph's state or a tool's result.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.tracers.context import register_configure_hook

from ape_integrations.langchain.documents import documents_within, question_in, relevance_scores
from ape_integrations.langchain.engine import register_everywhere

#: Retrievals and chains under way at the same time; more can only be left over from crashed ones.
_MAX_RUNNING = 4096


class RetrievalCapture(BaseCallbackHandler):
    """Hands documents, and the query of a retrieval, to every model that wants them.

    Knows nothing of which chain a retrieval belongs to: registering a text with a model that never
    sees it costs a dictionary entry. Models that come later get the latest retrievals, because a
    model configured for one call exists only after that call's retrieval.
    """

    #: It takes no time, and must not wait for a thread behind long answers.
    run_inline = True

    def __init__(self) -> None:
        self._queries: OrderedDict[UUID, str] = OrderedDict()
        self._chains: OrderedDict[UUID, tuple[UUID | None, str | None]] = OrderedDict()
        self._lock = threading.Lock()

    def on_retriever_start(
        self, serialized: dict[str, Any], query: str, *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Remember the query until the documents are there."""
        self._note(self._queries, run_id, str(query))

    def on_retriever_end(
        self, documents: Sequence[Document], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Register the documents."""
        query = self._forget(self._queries, run_id)
        texts = [document.page_content for document in documents]
        register_everywhere(texts, query, relevance_scores(documents))

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget the query."""
        self._forget(self._queries, run_id)

    def on_chain_start(
        self,
        serialized: Any,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember what is asked, and register documents that a step is given."""
        self._note(self._chains, run_id, (parent_run_id, question_in(inputs)))
        self._pass(inputs, run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Register documents that a step returns."""
        self._pass(outputs, run_id)
        self._forget(self._chains, run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget what was asked."""
        self._forget(self._chains, run_id)

    def on_tool_end(
        self, output: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Register documents that a tool returns, or hands over besides its answer."""
        self._pass(output, parent_run_id)

    def _pass(self, value: Any, run_id: UUID | None) -> None:
        documents = list(documents_within(value))
        texts = [document.page_content for document in documents]
        if texts:
            asked = self._asked(run_id, texts)
            # From step to step they are the same ones.
            register_everywhere(texts, asked, relevance_scores(documents), again=False)

    def _asked(self, run_id: UUID | None, texts: Sequence[str]) -> str | None:
        """Return the question of a run, or of the nearest one around it that has one."""
        with self._lock:
            while run_id is not None:
                run_id, question = self._chains.get(run_id, (None, None))
                # A question that was joined with the documents already is a prompt.
                if question and not any(text in question for text in texts):
                    return question
        return None

    def _note(self, memory: OrderedDict[UUID, Any], run_id: UUID, value: Any) -> None:
        with self._lock:
            memory[run_id] = value
            while len(memory) > _MAX_RUNNING:
                memory.popitem(last=False)

    def _forget(self, memory: OrderedDict[UUID, Any], run_id: UUID) -> Any:
        with self._lock:
            return memory.pop(run_id, None)


_CAPTURE = RetrievalCapture()

#: LangChain adds the handler to every callback manager, and those of nested runs inherit it. The
#: default makes it so in every thread and task.
capture_hook: ContextVar[RetrievalCapture | None] = ContextVar(
    "ape_retrieval_capture", default=_CAPTURE
)
register_configure_hook(capture_hook, inheritable=True)
