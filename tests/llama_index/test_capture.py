"""What instrumentation reports, and what it must not bring into the store."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.query_engine import CustomQueryEngine, RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index_instrumentation import get_dispatcher

from ape_integrations.core.config import APEConfig
from ape_integrations.errors import ConfigError
from ape_integrations.llama_index import APELLM, capture
from tests.llama_index.conftest import (
    TEXTS,
    Calls,
    FixedRetriever,
    entries,
    make_nodes,
    window_engine,
)

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
    with pytest.raises(ConfigError, match="capture cannot change"):
        llm.capture = False
    with pytest.raises(ConfigError, match="capture cannot change"):
        llm.model_copy(update={"capture": False})


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


# With and without metadata ------------------------------------------------------------------------


class _OwnPrompt(CustomQueryEngine):
    """An engine as in LlamaIndex's documentation, which leaves the metadata out."""

    llm: APELLM
    retriever: FixedRetriever

    def custom_query(self, query_str: str) -> str:
        contexts = "\n\n".join(n.node.get_content() for n in self.retriever.retrieve(query_str))
        return str(self.llm.complete(f"Context:\n{contexts}\n\nQuestion: {query_str}"))


def test_nodes_are_found_without_their_metadata(llm: APELLM, calls: Calls) -> None:
    engine = _OwnPrompt(llm=llm, retriever=FixedRetriever(make_nodes(file="a.txt")))
    for question in (QUESTION, "What does the boat carry?"):
        engine.query(question)
    assert [(report["hits"], report["misses"]) for report in calls.reports] == [(0, 3), (3, 0)]


def test_nodes_are_found_with_their_metadata_where_a_prompt_has_it(
    llm: APELLM, calls: Calls
) -> None:
    nodes = make_nodes(file="a.txt")
    RetrieverQueryEngine.from_args(FixedRetriever(nodes), llm=llm).query(QUESTION)
    texts = [node.get_content(MetadataMode.LLM) for node in nodes[:3]]
    parts = llm.generator.split("Context:\n" + "\n\n".join(texts) + f"\n\nQuestion: {QUESTION}")
    assert [context.strip() for context in parts.contexts] == texts
    assert calls.reports[0]["contexts"] == 3
    assert entries(llm) == 4


def test_highest_scores_are_read_without_metadata_too(
    make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    llm = make_llm(ape_config=APEConfig(max_contexts=2))
    nodes = make_nodes(file="a.txt")
    _OwnPrompt(llm=llm, retriever=FixedRetriever(nodes)).query(QUESTION)
    assert (calls.reports[0]["contexts"], calls.reports[0]["dropped"]) == (2, 1)
    for texts in (TEXTS[:3], [node.get_content(MetadataMode.LLM) for node in nodes[:3]]):
        scores = llm.generator.registry.scores(texts, QUESTION)
        assert scores == pytest.approx([1.0, 0.9, 0.8])


def test_window_with_metadata_is_one_context(llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes(file="a.txt")
    for node in nodes:
        node.metadata["window"] = f"Before.\n{node.text}\nAfter."
    engine = window_engine(llm, nodes)
    for _ in range(2):
        engine.query(QUESTION)
    assert [report["hits"] for report in calls.reports] == [0, 3]
    assert entries(llm) == 4


# Registered by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_nodes_can_be_registered(
    loaded: bool, scored: bool, make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    llm = make_llm(capture=False)
    assert not loaded or llm.generator
    nodes = make_nodes(file="a.txt")
    given = [NodeWithScore(node=node, score=0.5) for node in nodes] if scored else nodes
    llm.register_contexts(iter(given), QUESTION)
    for mode in (MetadataMode.LLM, MetadataMode.NONE):
        contexts = "\n\n".join(node.get_content(mode) for node in nodes)
        llm.complete(f"Context:\n{contexts}\n\nQuestion: {QUESTION}")
    assert [report["contexts"] for report in calls.reports] == [4, 4]
    scores = llm.generator.registry.scores(TEXTS, QUESTION)
    assert scores == ([0.5] * 4 if scored else None)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc",), "list of texts or nodes, not str"),
        ((make_nodes()[0],), "list of texts or nodes, not TextNode"),
        ((None,), "list of texts or nodes, not NoneType"),
        (([*TEXTS, 3],), "not int"),
        ((TEXTS, 3), "query"),
        ((TEXTS, None, [1.0]), "scores"),
        ((TEXTS, None, {TEXTS[0]: "high"}), "scores"),
    ],
)
def test_what_cannot_be_registered_is_refused_at_once(
    arguments: Any, message: str, loaded: bool, llm: APELLM
) -> None:
    assert not loaded or llm.generator
    with pytest.raises(ConfigError, match=message):
        llm.register_contexts(*arguments)
    assert llm.complete(f"Context:\n{TEXTS[0]}").raw["ape"]["contexts"] == 0
