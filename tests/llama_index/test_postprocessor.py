"""The postprocessor starts loading early and leaves the nodes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, QueryBundle

from ape_integrations.llama_index import APELLM, APECacheWarmer, APENodePostprocessor
from ape_integrations.store import MemoryKVStore
from tests.llama_index.conftest import Calls, FixedRetriever, entries, make_nodes

QUESTION = "Where is the lamp?"


def settle(llm: APELLM) -> None:
    """Wait for what runs in the background."""
    loading = llm._lazy._loading
    if loading is not None:
        loading.join(timeout=60)
    llm.generator._background.submit(lambda: None).result(timeout=60)


@pytest.fixture
def prefetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str | None, bool]]:
    """Record what is prefetched: texts, prefix, and whether missing ones are encoded."""
    from ape_integrations.core.generator import APEGenerator

    recorded: list[tuple[list[str], str | None, bool]] = []
    original = APEGenerator.prefetch

    def prefetch(
        self: APEGenerator, texts: Any, prefix: str | None = None, *, encode: bool = True
    ) -> None:
        recorded.append((list(texts), prefix, encode))
        original(self, recorded[-1][0], prefix, encode=encode)

    monkeypatch.setattr(APEGenerator, "prefetch", prefetch)
    return recorded


def test_nodes_pass_untouched(llm: APELLM) -> None:
    nodes = FixedRetriever(make_nodes(file="a")).retrieve(QUESTION)
    scores = [node.score for node in nodes]
    contents = [node.get_content(MetadataMode.ALL) for node in nodes]
    postprocessor = APENodePostprocessor(llm=llm)
    result = postprocessor.postprocess_nodes(nodes, query_bundle=QueryBundle(QUESTION))
    assert all(after is before for after, before in zip(result, nodes, strict=True))
    assert [node.score for node in result] == scores
    assert [node.get_content(MetadataMode.ALL) for node in result] == contents


async def test_async_registers_as_well(make_llm: Callable[..., APELLM], calls: Calls) -> None:
    llm = make_llm(capture=False)
    nodes = FixedRetriever(make_nodes()).retrieve(QUESTION)
    await APENodePostprocessor(llm=llm).apostprocess_nodes(nodes, query_str=QUESTION)
    contexts = "\n\n".join(node.get_content() for node in nodes)
    await llm.acomplete(f"Context:\n{contexts}\n\nQuestion: {QUESTION}")
    assert calls.reports[0]["contexts"] == 3


def test_it_replaces_capture(make_llm: Callable[..., APELLM], calls: Calls) -> None:
    llm = make_llm(capture=False)
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, node_postprocessors=[APENodePostprocessor(llm=llm)]
    )
    for _ in range(2):
        calls.clear()
        engine.query(QUESTION)
    assert calls.reports[0]["hits"] == 3


def test_model_starts_loading_at_retrieval(llm: APELLM) -> None:
    nodes = FixedRetriever(make_nodes()).retrieve(QUESTION)
    assert not llm._lazy.is_loaded
    APENodePostprocessor(llm=llm).postprocess_nodes(nodes, query_str=QUESTION)
    settle(llm)
    assert llm._lazy.is_loaded


def test_first_request_encodes_nothing_on_a_guess(
    llm: APELLM, prefetched: list[tuple[list[str], str | None, bool]]
) -> None:
    llm.generator  # noqa: B018  (loaded before, so that nothing but the prefetch happens)
    nodes = FixedRetriever(make_nodes()).retrieve(QUESTION)
    APENodePostprocessor(llm=llm).postprocess_nodes(nodes, query_str=QUESTION)
    settle(llm)
    assert [encode for _, _, encode in prefetched] == [False]
    assert entries(llm) == 0


def test_later_requests_encode_ahead_behind_the_pipelines_prefix(
    llm: APELLM, prefetched: list[tuple[list[str], str | None, bool]], calls: Calls
) -> None:
    retriever = FixedRetriever(make_nodes(), (0, 1))
    postprocessor = APENodePostprocessor(llm=llm)
    engine = ContextChatEngine.from_defaults(
        retriever, llm=llm, node_postprocessors=[postprocessor]
    )
    engine.chat(QUESTION)
    # Another pipeline of the same LLM uses another prefix in between.
    RetrieverQueryEngine.from_args(FixedRetriever(make_nodes()), llm=llm).query(QUESTION)
    settle(llm)
    before = entries(llm)
    prefetched.clear()
    retriever.wanted = (2, 3)
    nodes = retriever.retrieve("What does the map show?")
    postprocessor.postprocess_nodes(nodes, query_str="What does the map show?")
    settle(llm)
    ((_, prefix, encode),) = prefetched
    assert encode
    assert prefix is not None and "Use the context information" in prefix
    assert entries(llm) == before + 2
    calls.clear()
    engine.chat("What does the map show?")
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (2, 0)


def test_warmed_states_are_brought_to_memory_on_the_first_request(
    make_llm: Callable[..., APELLM],
) -> None:
    class Counting(MemoryKVStore):
        read: list[str] = []

        def get(self, key: str, spec: Any) -> Any:
            found = super().get(key, spec)
            if found is not None:
                self.read.append(key)
            return found

    store = Counting()
    nodes = make_nodes()
    APECacheWarmer(llm=make_llm(store=store), show_progress=False)(nodes)
    llm = make_llm(store=store)  # as in a new process
    llm.generator  # noqa: B018
    store.read.clear()
    retrieved = FixedRetriever(nodes).retrieve(QUESTION)
    APENodePostprocessor(llm=llm).postprocess_nodes(retrieved, query_str=QUESTION)
    settle(llm)
    assert len(store.read) >= 3


def test_texts_that_get_labels_later_are_not_encoded_bare(
    llm: APELLM, prefetched: list[tuple[list[str], str | None, bool]]
) -> None:
    engine = CitationQueryEngine(
        FixedRetriever(make_nodes()),
        llm=llm,
        node_postprocessors=[APENodePostprocessor(llm=llm)],
    )
    engine.query(QUESTION)
    settle(llm)
    stored = entries(llm)
    for _ in range(3):
        engine.query(QUESTION)
        settle(llm)
    assert entries(llm) == stored == 4
    assert not any(encode for _, _, encode in prefetched)


def test_no_nodes_are_fine(llm: APELLM) -> None:
    assert APENodePostprocessor(llm=llm).postprocess_nodes([], query_str=QUESTION) == []
    assert APENodePostprocessor(llm=llm).postprocess_nodes([]) == []
