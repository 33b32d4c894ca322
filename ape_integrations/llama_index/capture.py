"""Texts and query strings that LlamaIndex's instrumentation reports, handed to every live LLM.

This is what makes an engine fast without any change to it. Two public hooks are used:

- events: a retriever reports what it retrieved, engines and retrievers report query strings;
- spans: a response synthesizer's ``synthesize(query, nodes)`` shows the nodes exactly as they
  enter the prompt, after postprocessors and after the re-chunking of ``CitationQueryEngine``, and
  a direct ``get_response(query_str, text_chunks)`` its chunks.

Texts are registered only; nothing is encoded before a prompt contains them. What a synthesizer
makes itself (chunks joined to fill a window, summaries of summaries) is no retrieved text and is
left alone, so that it does not flood the store.

A synthesizer cuts nodes that do not fit the LLM's window together, each time elsewhere, and what
was cut is never found again. Contexts share positions, so that more of them fit than it takes for
granted: before it packs more than one window, its own prompt helper is given a larger one. A chat's
memory, which is sized by the LLM's metadata, keeps to the model's positions.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.query import QueryStartEvent
from llama_index.core.instrumentation.events.retrieval import (
    RetrievalEndEvent,
    RetrievalStartEvent,
)
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import BaseSpan
from llama_index_instrumentation.span_handlers import BaseSpanHandler

from ape_integrations.errors import ConfigError
from ape_integrations.llama_index.lazy import LazyGenerator

logger = logging.getLogger(__name__)

_listeners: WeakSet[LazyGenerator] = WeakSet()
_lock = threading.Lock()

#: A retrieved text, or a node that holds one.
Context = str | BaseNode | NodeWithScore

#: How a node's text may be written. A score of the last stands where texts are the same.
_MODES = (MetadataMode.NONE, MetadataMode.LLM)

_SYNTHESIS = ("synthesize", "asynthesize")
_RESPONSE = ("get_response", "aget_response")


def node_text(node: BaseNode | NodeWithScore) -> str:
    """Return a node's text as response synthesizers put it into a prompt."""
    return _content(node, MetadataMode.LLM)


def _content(node: BaseNode | NodeWithScore, mode: MetadataMode) -> str:
    inner = node.node if isinstance(node, NodeWithScore) else node
    return inner.get_content(metadata_mode=mode).strip()


def context_list(contexts: Iterable[Context]) -> list[Context]:
    """Return texts and nodes as a list.

    Raises
    ------
    ConfigError
        Something is neither, or is not in a list.
    """
    if isinstance(contexts, Context) or not isinstance(contexts, Iterable):
        raise ConfigError(f"Pass a list of texts or nodes, not {type(contexts).__name__}.")
    listed = list(contexts)
    wrong = [type(context).__name__ for context in listed if not isinstance(context, Context)]
    if wrong:
        raise ConfigError(f"Contexts are texts or nodes of LlamaIndex, not {wrong[0]}.")
    return listed


def context_texts(contexts: Iterable[Context]) -> list[str]:
    """Return texts as they are, and those of nodes with and without their metadata.

    A synthesizer writes a node's metadata before its text. An application's own prompt mostly
    holds the text alone, from ``node.get_content()`` or ``node.text``.
    """
    texts: list[str] = []
    for context in contexts:
        if isinstance(context, str):
            texts.append(context.strip())
        else:
            texts += [_content(context, mode) for mode in _MODES]
    return [text for text in dict.fromkeys(texts) if text]


def context_scores(contexts: Iterable[Context]) -> dict[str, float]:
    """Return the retrieval scores of nodes that have one, by each of their texts."""
    nodes = [context for context in contexts if isinstance(context, NodeWithScore)]
    return {
        text: node.score
        for mode in _MODES
        for node in nodes
        if node.score is not None and (text := _content(node, mode))
    }


def listen(generator: LazyGenerator) -> None:
    """Register captured texts with a generator as long as it lives."""
    root = get_dispatcher()
    with _lock:
        _listeners.add(generator)
        # Looked up every time: applications may replace the root's handlers.
        if _events not in root.event_handlers:
            root.add_event_handler(_events)
        if _spans not in root.span_handlers:
            root.add_span_handler(_spans)


def _register(contexts: Iterable[Context], query: Any = None) -> None:
    try:
        listed = context_list(contexts)
        kept, scores = context_texts(listed), context_scores(listed)
        text = query.query_str if isinstance(query, QueryBundle) else query
        with _lock:
            listeners = list(_listeners)
        for listener in listeners:
            listener.register(kept, text if isinstance(text, str) else None, scores)
    except Exception:
        # The dispatcher would swallow it; reuse is lost for this text, the answer is not.
        logger.warning("Retrieved texts could not be captured.", exc_info=True)


def _widen(synthesizer: BaseSynthesizer, contexts: Iterable[Context]) -> None:
    """Let a synthesizer pack more into one prompt, unless the application has chosen a window."""
    try:
        llm: Any = synthesizer._llm
        llm = getattr(llm, "llm", llm)  # of a StructuredLLM
        lazy = getattr(llm, "_lazy", None)
        if not isinstance(lazy, LazyGenerator) or not lazy.capture or llm.context_window:
            return
        helper, window = synthesizer._prompt_helper, llm.metadata.context_window
        if helper.context_window != window:
            return
        # A token is a byte or more.
        if sum(len(text.encode(errors="replace")) for text in context_texts(contexts)) > window:
            wider = lazy.packed_window(window)
            synthesizer._prompt_helper = helper.model_copy(update={"context_window": wider})
    except Exception:
        # Where the model cannot be loaded, its first call says so.
        logger.debug("The window of a synthesizer stays as it is.", exc_info=True)


class _EventCapture(BaseEventHandler):
    """Registers retrieved nodes and query strings."""

    @classmethod
    def class_name(cls) -> str:
        return "APEEventCapture"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, RetrievalEndEvent):
            _register(event.nodes, event.str_or_query_bundle)
        elif isinstance(event, RetrievalStartEvent):
            _register((), event.str_or_query_bundle)
        elif isinstance(event, QueryStartEvent):
            _register((), event.query)


class _SpanCapture(BaseSpanHandler[BaseSpan]):
    """Registers the nodes that a response synthesizer is called with; keeps no spans."""

    @classmethod
    def class_name(cls) -> str:
        return "APESpanCapture"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(instance, BaseSynthesizer):
            return
        method, arguments = _method(id_), bound_args.arguments
        if method in _SYNTHESIS:
            contexts, query = arguments.get("nodes", ()), arguments.get("query")
        elif method in _RESPONSE and _method(parent_span_id) not in (*_SYNTHESIS, *_RESPONSE):
            contexts, query = arguments.get("text_chunks", ()), arguments.get("query_str")
        else:
            return
        _register(contexts, query)
        _widen(instance, contexts)

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        return None

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        return None


def _method(span_id: str | None) -> str:
    """Return the method's name in a span id, ``Class.method-uuid``."""
    return (span_id or "").partition("-")[0].rpartition(".")[2]


_events = _EventCapture()
_spans = _SpanCapture()
