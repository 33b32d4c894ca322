"""What instrumentation reports, and what it must not bring into the store."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, TextNode
from llama_index_instrumentation import get_dispatcher
from pydantic import ValidationError

from ape_integrations.llama_index import APELLM, capture
from tests.llama_index.conftest import TEXTS, Calls, FixedRetriever, entries, make_nodes

QUESTION = "Where is the lamp?"


class _BrokenNode(TextNode):
    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        raise RuntimeError("this node has no content")


def test_capture_can_be_switched_off(make_llm: Callable[..., APELLM], calls: Calls) -> None:
    llm = make_llm(capture=False)
    engine = RetrieverQueryEngine.from_args(FixedRetriever(make_nodes()), llm=llm)
    engine.query(QUESTION)
    engine.query(QUESTION)
    assert [report["contexts"] for report in calls.reports] == [0, 0]
    assert entries(llm) == 0


def test_switching_off_later_is_refused_rather_than_ignored(llm: APELLM) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        llm.capture = False


def test_retrieval_before_loading_is_remembered(llm: APELLM, calls: Calls) -> None:
    nodes = FixedRetriever(make_nodes()).retrieve(QUESTION)
    contexts = "\n\n".join(node.get_content() for node in nodes)
    llm.complete(f"Context:\n{contexts}\n\nQuestion: {QUESTION}")
    assert calls.reports[0]["contexts"] == 3


def test_handlers_are_installed_once(make_llm: Callable[..., APELLM]) -> None:
    llms = [make_llm() for _ in range(3)]
    root = get_dispatcher()
    names = [handler.class_name() for handler in root.event_handlers]
    spans = [handler.class_name() for handler in root.span_handlers]
    assert names.count("APEEventCapture") == spans.count("APESpanCapture") == 1
    assert len(llms) == 3


def test_handlers_come_back_where_an_application_replaced_them(
    make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    root = get_dispatcher()
    root.event_handlers = [h for h in root.event_handlers if h.class_name() != "APEEventCapture"]
    test_retrieval_before_loading_is_remembered(make_llm(), calls)


def test_dropped_llm_is_forgotten(make_llm: Callable[..., APELLM]) -> None:
    llm = make_llm()
    count = len(capture._listeners)
    del llm
    gc.collect()
    assert len(capture._listeners) < count


def test_every_live_llm_learns_the_texts(make_llm: Callable[..., APELLM], calls: Calls) -> None:
    llms = [make_llm(), make_llm()]
    contexts = "\n\n".join(n.get_content() for n in FixedRetriever(make_nodes()).retrieve("?"))
    for llm in llms:
        llm.complete(f"Context:\n{contexts}\n\nQuestion: {QUESTION}")
    assert [report["contexts"] for report in calls.reports] == [3, 3]


def test_joined_chunks_are_no_text_of_their_own(llm: APELLM, calls: Calls) -> None:
    # Refine reports what compacting joined: all nodes as one text, different for every question.
    synthesizer = get_response_synthesizer(llm=llm, response_mode="compact")  # type: ignore
    nodes = FixedRetriever(make_nodes()).retrieve(QUESTION)
    synthesizer.synthesize(QUESTION, nodes)
    assert calls.reports[0]["contexts"] == len(nodes)
    assert not any("\n\n" in context for context in TEXTS)


def test_small_window_still_finds_whole_nodes(
    make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    # The window holds two nodes and a piece of the third, which is cut anew for every question.
    llm = make_llm(context_window=640, is_chat_model=False)
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes(), range(4)), llm=llm, response_mode="compact"
    )
    engine.query(QUESTION)
    assert len(calls.reports) > 1
    first = sum(report["contexts"] for report in calls.reports)
    assert first >= 2
    stored = entries(llm)
    for question in (QUESTION, "Who found the ring in the garden?", "What does the boat carry?"):
        calls.clear()
        engine.query(question)
        assert sum(report["hits"] for report in calls.reports) >= 2
    assert entries(llm) <= stored + 4


def test_failing_node_does_not_fail_the_request(
    llm: APELLM, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [_BrokenNode(text=text) for text in TEXTS]
    assert len(FixedRetriever(nodes).retrieve(QUESTION)) == 3
    assert "could not be captured" in caplog.text
