"""Below the break-even a prompt is prefilled as a whole; above it, always from stored states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ape_integrations.core import state_source
from ape_integrations.core.batching import run_together
from ape_integrations.core.break_even import BreakEven
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import ConfigError, ContextWindowError
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

DOCUMENTS = ["Ada lives in Porto.", "Bo is a welder, and has been for ten years.", "Cy sings."]
PREFIX, QUERY = "<s>Read this.\n\n", "\nWho sings?"
GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": -1}
MEGABYTE = 1 << 20


def never() -> bool:
    return False


def always() -> bool:
    return True


def learned(
    load: float, prefill: float, *, loads: int = 6, prefills: int = 6, tokens: int = 1000
) -> BreakEven:
    """Return what saw sets of 10 MB in 10 entries, and prompts of so many tokens."""
    costs = BreakEven()
    for _ in range(loads):
        costs.observe_load(10 * MEGABYTE, 10, load)
    for _ in range(prefills):
        costs.observe_prefill(tokens, tokens, prefill)
    return costs


def plan(costs: BreakEven, assembled: Callable[[], bool] = never, tokens: int = 1000) -> str:
    return costs.plan(10 * MEGABYTE, 10, tokens, assembled)


def test_slow_loading_is_given_up_for_a_plain_prefill() -> None:
    assert plan(learned(load=1.0, prefill=0.1)) == "plain"


@pytest.mark.parametrize(
    ("load", "prefill"),
    [
        (0.01, 1.0),  # a fast disk
        (0.19, 0.1),  # less than twice as long
        (0.019, 0.0001),  # less than 20 ms to save
    ],
)
def test_little_to_gain_keeps_the_states(load: float, prefill: float) -> None:
    assert plan(learned(load, prefill)) == "cached"


@pytest.mark.parametrize(("loads", "prefills"), [(0, 6), (5, 6), (6, 5), (6, 0)])
def test_little_evidence_keeps_the_states(loads: int, prefills: int) -> None:
    assert plan(learned(1.0, 0.1, loads=loads, prefills=prefills)) == "cached"


def test_slow_loads_beside_a_fast_one_decide_nothing() -> None:
    costs = learned(load=30.0, prefill=0.1)
    assert plan(costs) == "plain"
    costs.observe_load(10 * MEGABYTE, 10, 0.01)
    assert plan(costs) == "cached"


def test_set_that_stands_assembled_is_never_given_up() -> None:
    assert plan(learned(load=1.0, prefill=0.1), always) == "cached"


def test_loading_is_tried_again_now_and_then() -> None:
    costs = learned(load=1.0, prefill=0.1)
    assert [plan(costs) for _ in range(64)].count("cached") == 4


def test_costs_scale_with_entries_and_bytes_and_are_never_overestimated() -> None:
    costs = learned(load=1.0, prefill=0.1)
    assert costs.load_seconds(20 * MEGABYTE, 20) == pytest.approx(2.0)
    # A price per entry alone, or per byte alone, would have given these.
    assert costs.load_seconds(20 * MEGABYTE, 10) == pytest.approx(1.0)
    assert costs.load_seconds(10 * MEGABYTE, 1) == pytest.approx(0.1)
    assert costs.prefill_seconds(2000) == pytest.approx(0.2)
    assert costs.prefill_seconds(10) == pytest.approx(0.1)


def test_prompts_far_longer_than_any_seen_are_not_judged() -> None:
    costs = learned(load=100.0, prefill=0.1)
    assert costs.prefill_seconds(4001) is None
    assert plan(costs, tokens=4001) == "cached"


def test_long_passes_are_better_evidence_than_short_ones() -> None:
    costs = learned(load=1.0, prefill=0.1)
    for _ in range(8):
        costs.observe_prefill(20, 1000, 0.05)  # reading a query: mostly the cost of a pass
    assert costs.prefill_seconds(1000) == pytest.approx(0.1)


# In a generator ----------------------------------------------------------------------------------


class SlowStore(MemoryKVStore):
    """A store whose entries take so many seconds each, on a clock of its own."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock, self.loads = 0.0, 0

    def load(self, *args: Any) -> int | None:
        self.clock += self.seconds
        self.loads += 1
        return super().load(*args)


class _Time:
    def __init__(self, store: SlowStore) -> None:
        self._store = store

    def perf_counter(self) -> float:
        return self._store.clock


def make_generator(store: Any = None, **config: Any) -> APEGenerator:
    return APEGenerator(
        tiny_model("llama"),
        byte_tokenizer(),
        MemoryKVStore() if store is None else store,
        APEConfig(**config),
    )


def sequential(query: str = QUERY) -> list[int]:
    """Return what transformers alone generates from the joined prompt."""
    prompt = make_generator().prepare(PREFIX, DOCUMENTS, query)
    contexts = [token for ids in prompt.contexts for token in ids]
    # The query follows the last context as it does in the prompt, without a separator.
    ids = torch.tensor([[*prompt.prefix, *contexts[: -len("\n\n")], *prompt.query]])
    answer = tiny_model("llama").generate(ids, **GREEDY)
    return answer[0, ids.shape[1] :].tolist()


def test_plain_prefill_answers_as_transformers_alone_and_leaves_the_store_alone() -> None:
    generator = make_generator(prefill="plain")
    result = generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)
    assert result.token_ids == sequential()
    assert generator.store.stats().entries == 0
    assert result.cache["plan"] == result.report()["plan"] == "plain"
    assert result.cache["contexts"] == 3
    assert (result.cache["hits"], result.cache["misses"], result.cache["bytes_loaded"]) == (0, 0, 0)
    cached = make_generator().generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)
    assert cached.cache["plan"] == "cached"
    assert result.usage == cached.usage and result.token_ids != cached.token_ids
    stream = generator.stream(PREFIX, DOCUMENTS, QUERY, **GREEDY)
    assert "".join(stream) == result.text


def test_plain_prefill_of_several_questions_answers_each() -> None:
    generator = make_generator(prefill="plain")
    queries = [QUERY, "\nWhere does Ada live, and since when?", "?"]
    expected = [sequential(query) for query in queries]
    batch = generator.generate_batch(PREFIX, DOCUMENTS, queries, **GREEDY)
    assert [result.token_ids for result in batch] == expected
    together = run_together(
        lambda query: generator.generate(PREFIX, DOCUMENTS, query, **GREEDY), queries
    )
    assert [result.token_ids for result in together] == expected


def test_prompt_too_long_to_be_plain_names_the_way_out() -> None:
    long = [f"{word} " * 25 for word in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")]
    with pytest.raises(ContextWindowError, match="cached"):
        make_generator(prefill="plain").generate(PREFIX, long, QUERY, **GREEDY)
    assert make_generator().generate(PREFIX, long, QUERY, **GREEDY).cache["plan"] == "cached"


def test_prompt_without_contexts_is_plain() -> None:
    assert make_generator().generate("", [], QUERY, **GREEDY).cache["plan"] == "plain"


@pytest.mark.parametrize(
    ("prefill", "seconds", "given_up"),
    [("auto", 1000.0, 3), ("auto", 0.001, 0), ("cached", 1000.0, 0)],
)
def test_slow_store_is_left_aside_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, prefill: str, seconds: float, given_up: int
) -> None:
    store = SlowStore(seconds)
    monkeypatch.setattr(state_source, "time", _Time(store))
    generator = make_generator(store, prefill=prefill)
    generator.warm(PREFIX, DOCUMENTS, show_progress=False)
    results = []
    for _ in range(9):
        generator.clear_assembled()
        before = store.loads
        result = generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)
        results.append((result.cache["plan"], store.loads - before))
        expected = sequential() if result.cache["plan"] == "plain" else None
        assert expected is None or result.token_ids == expected
    assert results == [("cached", 3)] * (9 - given_up) + [("plain", 0)] * given_up
    assert store.stats().entries == 4  # the prefix too


def test_plain_prompts_store_no_missing_context_but_warming_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = make_generator()
    monkeypatch.setattr(generator._break_even, "plan", lambda *_: "plain")
    assert generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY).cache["misses"] == 0
    assert generator.store.stats().entries == 0
    assert generator.warm(PREFIX, DOCUMENTS, show_progress=False)["misses"] == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_plain_prompts_choose_no_contexts_by_their_states(batch: int) -> None:
    generator = make_generator(prefill="plain", max_contexts=2)
    for result in generator.generate_batch(PREFIX, DOCUMENTS, [QUERY] * batch, **GREEDY):
        assert result.cache["contexts"] == 3
        assert (result.cache["hits"], result.cache["misses"]) == (0, 0)
    assert generator.store.stats().entries == 0


@pytest.mark.parametrize("way", ["plain", "cached"])
def test_contexts_are_counted_once_where_some_are_chosen(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    generator = make_generator(max_contexts=2)
    monkeypatch.setattr(generator._break_even, "plan", lambda *_: way)
    counts = []
    for _ in range(2):
        cache = generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY).cache
        counts.append((cache["plan"], cache["hits"], cache["misses"]))
    assert counts == [(way, 0, 3), (way, 3, 0)]


def test_assembled_set_is_found_before_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    asked: list[bool] = []

    def record(*args: Any) -> str:
        asked.append(args[-1]())
        return "cached"

    monkeypatch.setattr(generator._break_even, "plan", record)
    generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)
    generator.generate(PREFIX, DOCUMENTS[::-1], QUERY, **GREEDY)
    generator.clear_assembled()
    generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)
    assert asked == [False, True, False]


def test_unknown_way_to_prefill_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill"):
        APEConfig(prefill="fast")  # type: ignore[arg-type]
