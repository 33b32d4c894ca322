"""Nodes that were warmed are hits on the first question."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.query.query_transform import StepDecomposeQueryTransform
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    ToolRetrieverRouterQueryEngine,
)
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.tools import QueryEngineTool

from ape_integrations.errors import ConfigError
from ape_integrations.llama_index import APELLM, APECacheWarmer
from tests.llama_index.conftest import TEXTS, Calls, FixedRetriever, entries, make_nodes, user

QUESTION = "Where is the lamp?"


class _Choice(BaseSelector):
    """Always selects the same engine."""

    def __init__(self, index: int) -> None:
        self.index = index

    def _select(self, choices: Any, query: Any) -> SelectorResult:
        return SelectorResult(selections=[SingleSelection(index=self.index, reason="")])

    async def _aselect(self, choices: Any, query: Any) -> SelectorResult:
        return self._select(choices, query)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        return None


def engine_for(llm: APELLM, nodes: Any, **kwargs: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(FixedRetriever(nodes), llm=llm, **kwargs)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("system_prompt", [None, "Be kind."])
def test_first_question_finds_warmed_nodes(
    chat: bool, system_prompt: str | None, make_llm: Callable[..., APELLM], calls: Calls
) -> None:
    llm = make_llm(is_chat_model=chat, system_prompt=system_prompt)
    nodes = make_nodes(file="a.txt")
    returned = APECacheWarmer(llm=llm, show_progress=False)(nodes)
    assert returned is nodes
    stored = entries(llm)
    engine_for(llm, nodes).query(QUESTION)
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (3, 0)
    assert entries(llm) == stored == len(nodes) + 1


def test_nodes_come_out_as_they_went_in(llm: APELLM) -> None:
    nodes = make_nodes(file="a.txt")
    before = [node.to_dict() for node in copy.deepcopy(nodes)]
    APECacheWarmer(llm=llm, show_progress=False)(nodes)
    assert [node.to_dict() for node in nodes] == before


TEMPLATE = PromptTemplate("Read this:\n{context_str}\nand answer {query_str}")
CHAT = ChatPromptTemplate.from_messages([user("Read:\n{context_str}"), user("{query_str}")])


MAPPING = {"context_str": "texts", "query_str": "ask"}
MAPPED = PromptTemplate("Read this:\n{texts}\nand answer {ask}", template_var_mappings=MAPPING)
RICH = RichPromptTemplate(
    "{% chat role='user' %}Read:\n{{ texts }}\nand answer {{ ask }}{% endchat %}",
    template_var_mappings=MAPPING,
)
PARTLY = PromptTemplate(
    "{role}\nRead this:\n{texts}\nand answer {ask}", template_var_mappings=MAPPING, role="Be kind."
)


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, CHAT, MAPPED, RICH, PARTLY],
    ids=["text", "chat", "mapped", "rich", "partly"],
)
def test_prompt_template_tells_the_prefix(template: Any, llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    APECacheWarmer(llm=llm, prompt=template, show_progress=False)(nodes)
    engine_for(llm, nodes, text_qa_template=template).query(QUESTION)
    assert calls.reports[0]["misses"] == 0


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "accumulate"])
def test_engine_tells_the_prefix(mode: str, llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    engine = engine_for(llm, nodes, response_mode=mode)
    APECacheWarmer(llm=llm, prompt=engine, show_progress=False)(nodes)
    engine.query(QUESTION)
    assert sum(report["misses"] for report in calls.reports) == 0


def test_synthesizer_tells_the_prefix(llm: APELLM, calls: Calls) -> None:
    synthesizer = get_response_synthesizer(llm=llm, text_qa_template=TEMPLATE)
    nodes = make_nodes()
    APECacheWarmer(llm=llm, prompt=synthesizer, show_progress=False)(nodes)
    synthesizer.synthesize(QUESTION, FixedRetriever(nodes).retrieve(QUESTION))
    assert calls.reports[0]["misses"] == 0


@pytest.mark.parametrize("engine_class", [ContextChatEngine, CondensePlusContextChatEngine])
def test_chat_engine_tells_the_prefix(engine_class: Any, llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    engine = engine_class.from_defaults(
        FixedRetriever(nodes), llm=llm, system_prompt="You are kind."
    )
    APECacheWarmer(llm=llm, prompt=engine, show_progress=False)(nodes)
    engine.chat(QUESTION)
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (3, 0)


def test_router_engine_tells_the_prefixes_of_its_engines(llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    engines = [engine_for(llm, nodes), engine_for(llm, nodes, text_qa_template=TEMPLATE)]
    for chosen in range(2):
        router = RouterQueryEngine(
            _Choice(chosen), [QueryEngineTool.from_defaults(engine) for engine in engines], llm=llm
        )
        APECacheWarmer(llm=llm, prompt=router, show_progress=False)(nodes)
        router.query(QUESTION)
    assert [(report["hits"], report["misses"]) for report in calls.reports] == [(3, 0)] * 2
    assert entries(llm) == 2 * (len(TEXTS) + 1)


def test_wrapped_engine_tells_the_prefix(llm: APELLM, calls: Calls) -> None:
    nodes = make_nodes()
    inner = engine_for(llm, nodes, text_qa_template=TEMPLATE)
    joining = get_response_synthesizer(llm=llm)
    engine = MultiStepQueryEngine(inner, StepDecomposeQueryTransform(llm=llm), joining)
    APECacheWarmer(llm=llm, prompt=engine, show_progress=False)(nodes)
    inner.query(QUESTION)
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (3, 0)
    assert entries(llm) == len(TEXTS) + 1


def test_engines_whose_prompts_nobody_can_foresee_are_refused(llm: APELLM) -> None:
    retriever = FixedRetriever(make_nodes())
    citing = CitationQueryEngine(retriever, llm=llm)
    router = RouterQueryEngine(_Choice(0), [QueryEngineTool.from_defaults(citing)], llm=llm)
    searching = ToolRetrieverRouterQueryEngine(retriever, llm=llm)  # type: ignore[arg-type]
    for engine, message in ((citing, "rank"), (router, "rank"), (searching, "pass a list")):
        with pytest.raises(ConfigError, match=message):
            APECacheWarmer(llm=llm, prompt=engine, show_progress=False)(make_nodes())
    assert entries(llm) == 0


def test_prefix_can_be_given(llm: APELLM, calls: Calls) -> None:
    prefix = llm.render_completion("Context:\nX").partition("X")[0]
    APECacheWarmer(llm=llm, prompt=prefix, show_progress=False)(make_nodes())
    llm.register_contexts(TEXTS)
    llm.complete(f"Context:\n{TEXTS[0]}\n\nQuestion: {QUESTION}")
    assert calls.reports[0]["hits"] == 1


def test_several_prompts_are_warmed_once_each(llm: APELLM) -> None:
    warmer = APECacheWarmer(llm=llm, prompt=[TEMPLATE, CHAT, TEMPLATE], show_progress=False)
    warmer(make_nodes())
    assert entries(llm) == 2 * (len(TEXTS) + 1)


@pytest.mark.parametrize("prompt", [PromptTemplate("Only {query_str}"), 3, object()])
def test_what_is_no_prompt_is_refused(prompt: Any, llm: APELLM) -> None:
    with pytest.raises(ConfigError):
        APECacheWarmer(llm=llm, prompt=prompt, show_progress=False)(make_nodes())
    assert entries(llm) == 0


def test_warming_again_encodes_nothing(llm: APELLM, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[dict[str, int]] = []
    warm = llm.generator.warm
    monkeypatch.setattr(
        llm.generator, "warm", lambda *a, **k: warmed.append(warm(*a, **k)) or warmed[-1]
    )
    warmer = APECacheWarmer(llm=llm, show_progress=False)
    warmer(make_nodes())
    warmer(make_nodes())
    assert [figures["misses"] for figures in warmed] == [4, 0]


def test_ingestion_pipeline_warms(llm: APELLM, calls: Calls) -> None:
    documents = [Document(text=text, metadata={"file": "a"}) for text in TEXTS]
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), APECacheWarmer(llm=llm, show_progress=False)]
    )
    nodes = pipeline.run(documents=documents)
    engine_for(llm, nodes).query(QUESTION)
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (3, 0)


async def test_async_ingestion_pipeline_warms(llm: APELLM) -> None:
    pipeline = IngestionPipeline(transformations=[APECacheWarmer(llm=llm, show_progress=False)])
    await pipeline.arun(nodes=make_nodes())
    assert entries(llm) == len(TEXTS) + 1


def test_index_from_documents_warms(llm: APELLM, calls: Calls) -> None:
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in TEXTS],
        transformations=[SentenceSplitter(), APECacheWarmer(llm=llm, show_progress=False)],
        embed_model=MockEmbedding(8),
    )
    index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert (calls.reports[0]["hits"], calls.reports[0]["misses"]) == (3, 0)


def test_ingestion_cache_tells_stores_and_prompts_apart(make_llm: Callable[..., APELLM]) -> None:
    cache = IngestionCache()
    first, second = make_llm(), make_llm()
    for llm, prompt in ((first, None), (second, None), (first, TEMPLATE)):
        before = entries(llm)
        warmer = APECacheWarmer(llm=llm, prompt=prompt, show_progress=False)
        IngestionPipeline(transformations=[warmer], cache=cache).run(nodes=make_nodes())
        assert entries(llm) == before + len(TEXTS) + 1


def test_warmer_works_in_another_process(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    llm = APELLM(model_name=str(tmp_path / "model"), cache_dir=tmp_path / "cache", max_new_tokens=2)
    nodes = make_nodes()
    engine = engine_for(llm, nodes)
    data = pickle.dumps(APECacheWarmer(llm=llm, prompt=engine, show_progress=False))
    assert len(data) < 10_000
    pickle.loads(data)(nodes)
    assert entries(APELLM(model_name=str(tmp_path / "model"), cache_dir=tmp_path / "cache")) == 5


def test_warmer_of_loaded_objects_cannot_leave_the_process(llm: APELLM) -> None:
    with pytest.raises(ConfigError, match="model_name"):
        pickle.dumps(APECacheWarmer(llm=llm))


def test_blank_nodes_are_skipped(llm: APELLM) -> None:
    nodes = make_nodes()
    for node in nodes:
        node.set_content("  \n")
    APECacheWarmer(llm=llm, show_progress=False)(nodes)
    assert entries(llm) == 0
