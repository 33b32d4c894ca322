"""Every pipeline reuses what it retrieved, and answers as the generator itself would."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig

from ape_integrations import ChatAPE, DiskKVStore, MemoryKVStore
from ape_integrations.core.prompt import PromptParts
from tests.langchain.helpers import QUESTIONS, TEXTS, Calls, WordRetriever, reference_generator
from tests.langchain.pipelines import PIPELINES, Pipeline, chat_for

Ask = Callable[[Pipeline, RunnableConfig], None]


def ask(pipeline: Pipeline, config: RunnableConfig) -> None:
    pipeline.invoke(QUESTIONS[0], config)


def ask_async(pipeline: Pipeline, config: RunnableConfig) -> None:
    asyncio.run(pipeline.ainvoke(QUESTIONS[0], config))


def ask_batch(pipeline: Pipeline, config: RunnableConfig) -> None:
    pipeline.batch(list(QUESTIONS), config)


def ask_stream(pipeline: Pipeline, config: RunnableConfig) -> None:
    assert list(pipeline.stream(QUESTIONS[0], config))


def ask_async_stream(pipeline: Pipeline, config: RunnableConfig) -> None:
    async def read() -> list[Any]:
        return [piece async for piece in pipeline.astream(QUESTIONS[0], config)]

    assert asyncio.run(read())


WAYS = (ask, ask_async, ask_batch, ask_stream, ask_async_stream)


def run(name: str, model: ChatAPE, way: Ask, retriever: BaseRetriever | None = None) -> Calls:
    calls = Calls()
    way(PIPELINES[name](model, retriever or WordRetriever()), {"callbacks": [calls]})
    return calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PIPELINES)
def test_second_run_reuses_all_documents_and_answers_the_same(name: str, way: Ask) -> None:
    model = chat_for(name)
    first, second = run(name, model, way), run(name, model, way)
    assert second.reading
    for report in second.reading:
        assert report["hits"] == report["contexts"] and report["misses"] == 0
    assert Counter(second.texts) == Counter(first.texts)
    retrieved = 3 * (len(QUESTIONS) if way is ask_batch else 1)
    assert second.total("contexts") == first.total("contexts")
    # The queries that a tiny model makes up for MultiQueryRetriever may find more than three.
    assert second.total("contexts") == retrieved or name == "multi_query"
    assert second.total("contexts") >= retrieved


class SameDocuments(WordRetriever):
    """Returns the same documents in the same order, whatever is asked."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return list(self.documents[: self.k])


@pytest.mark.parametrize("name", PIPELINES)
def test_other_questions_reuse_the_documents_of_the_first(name: str) -> None:
    model = chat_for(name)
    first = run(name, model, ask, SameDocuments())
    assert first.total("misses") == 3
    for question in QUESTIONS[1:3]:

        def ask_another(pipeline: Pipeline, config: RunnableConfig, asked: str = question) -> None:
            pipeline.invoke(asked, config)

        calls = run(name, model, ask_another, SameDocuments())
        assert (calls.total("hits"), calls.total("misses")) == (3, 0)


@pytest.mark.parametrize("name", PIPELINES)
def test_answers_are_those_of_the_generator_on_the_same_parts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chat_for(name)
    parts: list[PromptParts] = []
    split = model.generator.split

    def recording(prompt: str) -> PromptParts:
        parts.append(split(prompt))
        return parts[-1]

    monkeypatch.setattr(model.generator, "split", recording)
    calls = run(name, model, ask)
    direct = reference_generator(tools=name == "agent")
    generation = model._generation_kwargs(None, {})
    answers = [
        direct.generate(part.prefix, part.contexts, part.query, **generation).text for part in parts
    ]
    # A tool call is read out of the text; what remains is empty.
    expected = ["" if "<tool_call>" in answer else answer for answer in answers]
    assert calls.texts == expected
    contexts = [context for part in parts for context in part.contexts]
    assert contexts and all(any(text in context for text in TEXTS) for context in contexts)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_new_process_finds_what_the_last_one_stored(name: str, tmp_path: Path) -> None:
    with_store = [DiskKVStore(tmp_path / "kv"), DiskKVStore(tmp_path / "kv")]
    models = [chat_for(name, store=store) for store in with_store]
    first = run(name, models[0], ask)
    models[0].generator.close()
    second = run(name, models[1], ask)
    assert first.total("misses") > 0
    assert second.reading and second.total("misses") == 0
    assert second.total("bytes_loaded") > 0
    assert second.texts == first.texts


def test_one_store_serves_several_pipelines() -> None:
    store = MemoryKVStore()
    run("stuff", chat_for("stuff", store=store), ask)
    calls = run("lcel", chat_for("lcel", store=store), ask)
    assert calls.total("misses") == 0 < calls.total("hits")
