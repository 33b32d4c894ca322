"""Nodes that exceed the model's window together: packed into one prompt, never cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import PromptHelper, Settings
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode

from ape_integrations.core.config import APEConfig
from ape_integrations.llama_index import APELLM
from tests.llama_index.conftest import Calls, FixedRetriever, entries
from tests.models import tiny_model

POSITIONS = 4096


def letters(first: int, count: int) -> str:
    """Return a text that takes LlamaIndex a token, and the tests' tokenizer two, for a letter."""
    return " ".join(chr(ord("a") + (first + i * i) % 26) for i in range(count))


NODES = [TextNode(text=letters(i, 800), id_=f"n{i}") for i in range(8)]
RETRIEVER = FixedRetriever(NODES, range(len(NODES)))


@pytest.fixture
def make(make_llm: Callable[..., APELLM]) -> Callable[..., APELLM]:
    """Return a factory of LLMs with fewer positions than the nodes have tokens."""
    model = tiny_model(max_position_embeddings=POSITIONS)
    return lambda **changes: make_llm(**{"model": model, **changes})


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize"])
def test_nodes_stand_in_one_prompt(make: Callable[..., APELLM], calls: Calls, mode: str) -> None:
    llm = make()
    engine = RetrieverQueryEngine.from_args(RETRIEVER, llm=llm, response_mode=mode)
    for question, misses in (("Which?", len(NODES)), ("Which one is it, then?", 0)):
        calls.clear()
        engine.query(question)
        [report] = calls.reports
        assert (report["contexts"], report["misses"]) == (len(NODES), misses)
    assert entries(llm) == len(NODES) + 1


async def test_asynchronous_calls_and_chats_likewise(
    make: Callable[..., APELLM], calls: Calls
) -> None:
    llm = make()
    engine = RetrieverQueryEngine.from_args(RETRIEVER, llm=llm)
    await engine.aquery("Which?")
    chat = ContextChatEngine.from_defaults(retriever=RETRIEVER, llm=llm)
    chat.chat("Which?")
    await chat.achat("And then?")
    assert [report["contexts"] for report in calls.reports] == [len(NODES)] * 3
    # What a memory takes for granted is what the model can read in a row.
    assert llm.metadata.context_window == POSITIONS


def test_nodes_that_fit_leave_the_synthesizer_alone(make: Callable[..., APELLM]) -> None:
    engine = RetrieverQueryEngine.from_args(FixedRetriever(NODES, [0]), llm=make())
    engine.query("Which?")
    assert engine._response_synthesizer._prompt_helper.context_window == POSITIONS


def helper() -> PromptHelper:
    return PromptHelper(context_window=POSITIONS - 1, num_output=6)


@pytest.mark.parametrize(
    "changes, arguments",
    [
        ({"context_window": POSITIONS}, {}),
        ({"capture": False}, {}),
        ({"ape_config": APEConfig(context_positions="sequential")}, {}),
        ({"ape_config": APEConfig(prefill="plain")}, {}),
        ({}, {"prompt_helper": helper()}),
    ],
)
def test_a_window_that_was_chosen_is_kept(
    make: Callable[..., APELLM], changes: dict[str, Any], arguments: dict[str, Any]
) -> None:
    from llama_index.core.response_synthesizers import get_response_synthesizer

    synthesizer = get_response_synthesizer(llm=make(**changes), **arguments)
    before = synthesizer._prompt_helper.context_window
    short = [TextNode(text=letters(i, 200)) for i in range(24)]
    engine = RetrieverQueryEngine(FixedRetriever(short, range(24)), synthesizer)
    if "context_window" in changes or arguments:
        engine.query("Which?")
    else:
        # Text in a row takes this tokenizer more than LlamaIndex counts.
        with pytest.raises(Exception, match="positions"):
            engine.query("Which?")
    assert synthesizer._prompt_helper.context_window == before


def test_a_global_helper_is_kept(make: Callable[..., APELLM]) -> None:
    Settings.prompt_helper = helper()
    try:
        engine = RetrieverQueryEngine.from_args(RETRIEVER, llm=make())
        engine.query("Which?")
        assert Settings.prompt_helper.context_window == POSITIONS - 1
    finally:
        Settings._prompt_helper = None


def test_memory_bounds_what_is_packed(make: Callable[..., APELLM]) -> None:
    llm = make()
    assert llm._lazy.packed_window(POSITIONS) == 4 * POSITIONS
    token = llm.generator.info.spec(1).nbytes
    llm.generator._sets._max_idle_bytes = 6000 * token
    assert llm._lazy.packed_window(POSITIONS) == 6000
    llm.generator._sets._max_idle_bytes = 0
    assert llm._lazy.packed_window(POSITIONS) == POSITIONS


def test_structured_answers_likewise(make: Callable[..., APELLM]) -> None:
    from pydantic import BaseModel

    class Letter(BaseModel):
        letter: str

    engine = RetrieverQueryEngine.from_args(RETRIEVER, llm=make().as_structured_llm(Letter))
    with pytest.raises(Exception):  # noqa: B017 - the tiny model writes no JSON
        engine.query("Which?")
    assert engine._response_synthesizer._prompt_helper.context_window == 4 * POSITIONS
