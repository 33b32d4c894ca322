"""Engines, unchanged: what was retrieved before is read from the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
)
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer

from ape_integrations.core.config import APEConfig
from ape_integrations.llama_index import APELLM
from tests.llama_index.conftest import (
    TEXTS,
    Calls,
    FixedRetriever,
    entries,
    make_nodes,
    window_engine,
)

MODES = [
    "compact",
    "refine",
    "tree_summarize",
    "accumulate",
    "compact_accumulate",
    "simple_summarize",
]
STREAMING = ["compact", "refine", "tree_summarize", "simple_summarize"]
QUESTIONS = [
    "Where is the lamp?",
    "Who owns the boat that carries salt?",
    "What does the map show, and where is it?",
    "Lamp?",
    "Where does Dora read, and what is the name of the room in which she does so?",
]


def expected_entries(mode: str, nodes: int = 3) -> int:
    """Entries of nodes and prefixes after any number of questions."""
    if mode == "refine":
        # The first node stands behind the first prompt's prefix, the others behind the refine one.
        return nodes + 2
    return nodes + 1


def assert_all_hits(calls: Calls, mode: str) -> None:
    reports = calls.with_contexts
    assert sum(report["contexts"] for report in reports) == 3, mode
    assert [report["misses"] for report in reports] == [0] * len(reports), mode


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("mode", MODES)
def test_second_question_finds_every_node(
    mode: str, chat: bool, make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    llm = make_llm(is_chat_model=chat)
    retriever = FixedRetriever(make_nodes(file="a.txt"))
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, response_mode=mode)
    engine.query(QUESTIONS[0])
    assert sum(report["misses"] for report in calls.reports) == 3
    stored = entries(llm)
    for question in QUESTIONS[:3]:
        calls.clear()
        engine.query(question)
        assert_all_hits(calls, mode)
    assert entries(llm) == stored == expected_entries(mode)


@pytest.mark.parametrize("mode", STREAMING)
def test_streaming_engine_finds_every_node(mode: str, llm: APELLM, calls: Calls) -> None:
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, response_mode=mode, streaming=True
    )
    for _ in range(2):
        calls.clear()
        answer = engine.query(QUESTIONS[0])
        "".join(answer.response_gen)  # type: ignore[union-attr]
    assert_all_hits(calls, mode)
    assert entries(llm) == expected_entries(mode)


@pytest.mark.parametrize("mode", MODES)
async def test_async_engine_finds_every_node(mode: str, llm: APELLM, calls: Calls) -> None:
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, response_mode=mode, use_async=True
    )
    for question in QUESTIONS[:2]:
        calls.clear()
        await engine.aquery(question)
    assert_all_hits(calls, mode)
    assert entries(llm) == expected_entries(mode)


async def test_async_streaming_engine_finds_every_node(llm: APELLM, calls: Calls) -> None:
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, streaming=True, use_async=True
    )
    for question in QUESTIONS[:2]:
        calls.clear()
        answer = await engine.aquery(question)
        async for _ in answer.async_response_gen():  # type: ignore[union-attr]
            pass
    assert_all_hits(calls, "compact")


def test_node_has_one_entry_whatever_its_rank(llm: APELLM, calls: Calls) -> None:
    retriever = FixedRetriever(make_nodes())
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    for wanted in [(0, 1, 2), (2, 0, 1), (1,), (2, 1), (3, 0)]:
        retriever.wanted = wanted
        engine.query(QUESTIONS[0])
    assert entries(llm) == len(TEXTS) + 1


def test_recomputed_nodes_serve_the_next_question(
    make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    """Nodes in another order are put in sequence again, but never encoded again."""
    llm = make_llm(ape_config=APEConfig(recompute_ratio=0.3))
    retriever = FixedRetriever(make_nodes())
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
    for wanted in [(0, 1, 2), (0, 1, 2), (2, 1, 0)]:
        retriever.wanted = wanted
        str(engine.query(QUESTIONS[0]))
    first, again, other = calls.with_contexts
    assert [report["misses"] for report in calls.with_contexts] == [3, 0, 0]
    assert first["recompute_seconds"] > 0 == again["recompute_seconds"]
    assert other["recompute_seconds"] > 0


@pytest.mark.parametrize("first", [True, False])
def test_nodes_with_the_highest_scores_are_read(
    first: bool, make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    """Known scores decide before anything is looked up, loaded model or not."""
    llm = make_llm(ape_config=APEConfig(max_contexts=2))
    if not first:
        llm.complete("Load.")
        calls.clear()
    RetrieverQueryEngine.from_args(FixedRetriever(make_nodes()), llm=llm).query(QUESTIONS[0])
    [report] = calls.with_contexts
    assert (report["contexts"], report["dropped"], report["misses"]) == (2, 1, 2)
    scores = llm.generator.registry.scores(TEXTS[:3], QUESTIONS[0])
    assert scores == pytest.approx([1.0, 0.9, 0.8])


@pytest.mark.parametrize("mode", ["generation", "no_text", "context_only"])
def test_modes_without_context_store_nothing(
    mode: str, llm: APELLM, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", llm)  # what these modes ask for, though they need none
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, response_mode=mode
    )
    engine.query(QUESTIONS[0])
    assert calls.with_contexts == []
    assert entries(llm) == 0


def test_summaries_of_summaries_are_not_stored(
    make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    # A window of two nodes: tree_summarize asks about parts, then about the answers to them.
    llm = make_llm(context_window=110, is_chat_model=False)
    nodes = make_nodes()
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(nodes, range(len(nodes))), llm=llm, response_mode="tree_summarize"
    )
    for question in QUESTIONS[:3]:
        calls.clear()
        engine.query(question)
        assert len(calls.reports) > 2
        assert calls.reports[-1]["contexts"] == 0
    assert entries(llm) <= len(nodes) + 1


def test_citation_engine_reuses_labelled_chunks(llm: APELLM, calls: Calls) -> None:
    engine = CitationQueryEngine(FixedRetriever(make_nodes(file="a.txt")), llm=llm)
    engine.query(QUESTIONS[0])
    stored = entries(llm)
    for question in QUESTIONS[:3]:
        calls.clear()
        engine.query(question)
        assert_all_hits(calls, "citation")
    assert entries(llm) == stored == 4


def test_citation_engine_reuses_cut_chunks(llm: APELLM, calls: Calls) -> None:
    splitter = SentenceSplitter(chunk_size=12, chunk_overlap=0)
    engine = CitationQueryEngine(
        FixedRetriever(make_nodes(file="b")), llm=llm, text_splitter=splitter
    )
    answer = engine.query(QUESTIONS[0])
    chunks = len(answer.source_nodes)
    assert chunks > 3
    stored = entries(llm)
    for question in QUESTIONS[:3]:
        calls.clear()
        engine.query(question)
        assert sum(report["hits"] for report in calls.reports) == chunks
        assert sum(report["misses"] for report in calls.reports) == 0
    assert entries(llm) == stored


CHATS: dict[str, Callable[[APELLM, Any], Any]] = {
    "context": lambda llm, retriever: ContextChatEngine.from_defaults(
        retriever, llm=llm, system_prompt="You are kind."
    ),
    "condense_plus_context": lambda llm, retriever: CondensePlusContextChatEngine.from_defaults(
        retriever, llm=llm
    ),
    "condense_question": lambda llm, retriever: CondenseQuestionChatEngine.from_defaults(
        RetrieverQueryEngine.from_args(retriever, llm=llm), llm=llm
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_engine_finds_every_node_on_every_turn(name: str, llm: APELLM, calls: Calls) -> None:
    engine = CHATS[name](llm, FixedRetriever(make_nodes()))
    engine.chat(QUESTIONS[0])
    stored = entries(llm)
    assert stored == 4
    for question in QUESTIONS[:3]:
        calls.clear()
        engine.chat(question)
        assert_all_hits(calls, name)
    assert entries(llm) == stored


@pytest.mark.parametrize("name", CHATS)
def test_chat_engine_streams_from_stored_states(name: str, llm: APELLM, calls: Calls) -> None:
    engine = CHATS[name](llm, FixedRetriever(make_nodes()))
    for question in QUESTIONS[:3]:
        calls.clear()
        answer = engine.stream_chat(question)
        "".join(answer.response_gen)
    assert_all_hits(calls, name)
    assert entries(llm) == 4


@pytest.mark.parametrize("name", CHATS)
async def test_chat_engine_is_async(name: str, llm: APELLM, calls: Calls) -> None:
    engine = CHATS[name](llm, FixedRetriever(make_nodes()))
    for question in QUESTIONS[:3]:
        calls.clear()
        await engine.achat(question)
    assert_all_hits(calls, name)
    calls.clear()
    answer = await engine.astream_chat(QUESTIONS[0])
    async for _ in answer.async_response_gen():
        pass
    assert_all_hits(calls, name)
    assert entries(llm) == 4


def test_system_prompt_joins_the_context_message(make_llm: Callable[..., APELLM]) -> None:
    llm = make_llm(system_prompt="Answer in one word.")
    seen: list[str] = []
    template = llm.messages_to_prompt
    assert template is not None

    def record(messages: Any) -> str:
        seen.append(template(messages))
        return seen[-1]

    llm.messages_to_prompt = record
    engine = ContextChatEngine.from_defaults(FixedRetriever(make_nodes()), llm=llm)
    engine.chat(QUESTIONS[0])
    assert seen[0].count("<|im_start|>system") == 1
    assert seen[0].startswith("<|im_start|>system\nAnswer in one word.\n\nUse the context")


def test_replaced_node_texts_are_found(llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    for node in nodes:
        node.metadata["window"] = f"Before. {node.text} After."
    engine = window_engine(llm, nodes)
    for question in QUESTIONS[:2]:
        calls.clear()
        engine.query(question)
    assert_all_hits(calls, "window")


def test_chunks_given_to_a_synthesizer_are_found(llm: APELLM, calls: Calls) -> None:
    synthesizer = get_response_synthesizer(llm=llm)
    for question in QUESTIONS[:2]:
        calls.clear()
        synthesizer.get_response(question, TEXTS[:3])
    assert_all_hits(calls, "chunks")
    assert entries(llm) == 4


def test_vector_index_of_documents_is_accelerated(llm: APELLM, calls: Calls) -> None:
    documents = [Document(text=text, metadata={"file_name": "x.txt"}) for text in TEXTS]
    index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(8))
    engine = index.as_query_engine(llm=llm, similarity_top_k=3)
    for _ in range(2):
        calls.clear()
        engine.query(QUESTIONS[0])
    assert_all_hits(calls, "vector")


def test_evaluator_reuses_contexts_behind_a_changing_response(llm: APELLM, calls: Calls) -> None:
    evaluator = FaithfulnessEvaluator(llm=llm)
    stored = []
    for response in ["It is in the hall.", "Salt is what it carries.", "Nobody knows that."]:
        calls.clear()
        evaluator.evaluate(query=QUESTIONS[0], response=response, contexts=TEXTS[:3])
        stored.append(entries(llm))
    assert_all_hits(calls, "evaluator")
    assert stored[0] == stored[-1]


def test_summary_index_answers_from_stored_states(llm: APELLM, calls: Calls) -> None:
    index = SummaryIndex(make_nodes()[:3])
    engine = index.as_query_engine(llm=llm, response_mode="tree_summarize")
    for question in QUESTIONS[:2]:
        calls.clear()
        engine.query(question)
    assert_all_hits(calls, "summary")
