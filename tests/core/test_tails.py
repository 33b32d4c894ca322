"""Conversations over the same documents: each turn reads what is new, whoever else asks."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import MemoryKVStore
from tests.families.registry import model_of
from tests.families.test_families import CONTEXTS, PREFIX, ids
from tests.models import byte_tokenizer, tiny_model

#: Learned positions, windows, sinks: what padding and positions could get wrong.
FAMILIES = ["Llama 2, 3.x", "Gemma 3 (text)", "GPT-OSS", "GPT-2"]
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FIRST = [ids(11, 7), ids(12, 12), ids(13, 9)]
NEXT = [ids(14, 5), ids(15, 3), ids(16, 8)]


def make(model: Any, **arguments: Any) -> APEGenerator:
    config = APEConfig(attention_temperature=0.8, scaling_factor=1.2)
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), config, **arguments)


def prompts(queries: list[list[int]]) -> list[PreparedPrompt]:
    return [PreparedPrompt(PREFIX, CONTEXTS, query) for query in queries]


def together(
    generator: APEGenerator, queries: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    results = generator.generate_batch_ids(prompts(queries), **LENGTH)
    return [r.token_ids for r in results], [r.cache["tokens_reused"] for r in results]


def alone(generator: APEGenerator, query: list[int]) -> tuple[list[int], int]:
    result = generator.generate_ids(*prompts([query]), **LENGTH)
    return result.token_ids, result.cache["tokens_reused"]


def fresh(model: Any, queries: list[list[int]]) -> list[list[int]]:
    return [alone(make(copy.deepcopy(model)), query)[0] for query in queries]


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_that_take_turns(family: str) -> None:
    model = model_of(family)
    generator = make(copy.deepcopy(model))
    turns = list(FIRST)
    for following in (NEXT, [query[::-1] for query in NEXT]):
        answers = [alone(generator, turn)[0] for turn in turns]
        turns = [[*t, *a, *n] for t, a, n in zip(turns, answers, following, strict=True)]
    for turn, following, expected in zip(turns, NEXT, fresh(model, turns), strict=True):
        tokens, reused = alone(generator, turn)
        assert tokens == expected
        assert reused == len(turn) - len(following) - 1  # the last token was never read


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_that_are_answered_together(family: str) -> None:
    model = model_of(family)
    generator = make(copy.deepcopy(model))
    answers, reused = together(generator, FIRST)
    assert answers == fresh(model, FIRST) and reused == [0, 0, 0]
    turns = [[*t, *a, *n] for t, a, n in zip(FIRST, answers, NEXT, strict=True)]
    expected = fresh(model, turns)
    answers, reused = together(generator, turns)
    assert answers == expected
    # As many tokens are read of all as of the one with the most new ones.
    read = max(map(len, NEXT)) + 1
    assert reused == [len(turn) - read for turn in turns]
    # What was answered together goes on alone, in another batch, and beside who is new.
    turns = [[*t, *a, *n] for t, a, n in zip(turns, answers, NEXT, strict=True)]
    expected = fresh(model, turns)
    assert alone(generator, turns[1]) == (expected[1], len(turns[1]) - len(NEXT[1]) - 1)
    assert together(generator, [turns[2], turns[0]])[0] == [expected[2], expected[0]]
    newcomer = ids(17, 4)
    found, reused = together(generator, [newcomer, turns[2]])
    assert found == [*fresh(model, [newcomer]), expected[2]]
    assert reused == [0, len(turns[2]) - len(newcomer)]
    longer = ids(18, len(turns[2]) + 1)
    found, reused = together(generator, [longer, turns[2]])
    assert found == [*fresh(model, [longer]), expected[2]]
    assert reused == [0, 0]


def test_latest_conversations_are_kept_within_the_budget() -> None:
    model = tiny_model("llama")
    generator = make(model)
    alone(generator, FIRST[0])
    [tail] = generator._tails._tails
    size = tail.memory.nbytes
    generator = make(model, tail_bytes=2 * size + 100)
    turns = []
    for query in (FIRST[0], ids(20, 7), ids(21, 7)):
        turns.append([*query, *alone(generator, query)[0], 40])
    reused = [alone(generator, turn)[1] for turn in (turns[2], turns[0])]
    assert reused == [len(turns[2]) - 2, 0]


def test_what_exceeds_the_budget_drops_nothing_else() -> None:
    generator = make(tiny_model("llama"))
    answer, _ = alone(generator, FIRST[0])
    [tail] = generator._tails._tails
    generator._tails._max_bytes = 2 * tail.memory.nbytes
    together(generator, FIRST)
    assert generator._tails._tails == [tail]
    assert alone(generator, [*FIRST[0], *answer, 40])[1] == len(FIRST[0]) + len(answer) - 1


def test_tails_of_one_batch_count_once_and_a_turn_replaces_the_last() -> None:
    generator = make(tiny_model("llama"))
    answers, _ = together(generator, FIRST)
    tails = generator._tails._tails
    assert len(tails) == 3 and len({tail.memory for tail in tails}) == 1
    assert generator._tails._nbytes() == tails[0].memory.nbytes
    alone(generator, [*FIRST[0], *answers[0], 50])
    kept = [len(tail.ids) for tail in generator._tails._tails]
    assert kept == [len(FIRST[1]) + 5, len(FIRST[2]) + 5, len(FIRST[0]) + 6 + 1 + 5]


def test_beams_leave_no_tail() -> None:
    generator = make(tiny_model("llama"))
    generator.generate_ids(*prompts(FIRST[:1]), num_beams=3, **LENGTH)
    assert not generator._tails._tails
