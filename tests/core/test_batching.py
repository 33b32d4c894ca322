"""Questions over one context set that arrive together: one generation, the same answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from ape_integrations.core import batching
from ape_integrations.core.batching import Request, run_together
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generation import Cancellation, GenerationResult
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import ContextWindowError
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

DOCUMENTS = ["Ada lives in Porto.", "Bo is a welder, and has been for ten years.", "Cy sings."]
PREFIX = "<s>Read this.\n\n"
QUERIES = ["\nWho sings?", "\nWhere does Ada live, and since when?", "\nWho?", "\nWhy is that so?"]
GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": -1}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a slow machine from splitting a batch."""
    monkeypatch.setattr(batching, "_PATIENCE", 60.0)


def make_generator(**kwargs: Any) -> APEGenerator:
    return APEGenerator(tiny_model("llama"), byte_tokenizer(), MemoryKVStore(), **kwargs)


class Batches:
    """Counts the rows of every generation, and holds the first one back until it is told."""

    def __init__(self, generator: APEGenerator) -> None:
        self.sizes: list[int] = []
        self.failures: list[type[Exception]] = []
        self.go, self.begun = threading.Event(), threading.Event()
        self._run = generator._batches._run
        generator._batches._run = self  # type: ignore[assignment]

    def __call__(self, requests: Sequence[Request]) -> list[GenerationResult]:
        self.sizes.append(len(requests))
        if len(self.sizes) == 1:
            self.begun.set()
            assert self.go.wait(30)
        if len(requests) > 1 and self.failures:
            raise self.failures.pop()("out of memory")
        return self._run(requests)


Ask = Callable[..., "Future[GenerationResult]"]


@contextmanager
def busy(generator: APEGenerator) -> Iterator[tuple[Batches, Ask]]:
    """Let calls collect behind a generation over the same set, which ends with the block."""
    batches = Batches(generator)
    with ThreadPoolExecutor(16) as pool:

        def ask(query: str, contexts: Sequence[str] = DOCUMENTS, **kwargs: Any) -> Any:
            return pool.submit(generator.generate, PREFIX, contexts, query, **{**GREEDY, **kwargs})

        try:
            first = ask("\nFirst.")
            assert batches.begun.wait(30)
            yield batches, ask
        finally:
            batches.go.set()
        first.result(30)


def wait_for(generator: APEGenerator, count: int) -> None:
    """Wait until so many calls wait for their batch."""
    deadline = time.monotonic() + 30
    while generator._batches.waiting() < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def alone(query: str, contexts: Sequence[str] = DOCUMENTS, **kwargs: Any) -> GenerationResult:
    return make_generator().generate(PREFIX, contexts, query, **{**GREEDY, **kwargs})


def test_calls_that_collect_are_one_generation_with_the_answers_of_each_alone() -> None:
    generator = make_generator()
    with busy(generator) as (batches, ask):
        answers = [ask(query) for query in QUERIES]
        wait_for(generator, len(QUERIES))
    assert batches.sizes == [1, len(QUERIES)]
    expected = [alone(query) for query in QUERIES]
    assert len({tuple(one.token_ids) for one in expected}) > 1
    for answer, one in zip(answers, expected, strict=True):
        result = answer.result()
        assert (result.text, result.token_ids) == (one.text, one.token_ids)
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert result.usage[count] == one.usage[count]
        assert result.cache["batch"] == len(QUERIES)
        assert (result.cache["hits"], result.cache["misses"]) == (3, 0)
        assert 0 < result.timings["first_token"] <= result.timings["total"]


def test_misses_of_a_batch_are_counted_once() -> None:
    generator = make_generator()
    results = run_together(
        lambda query: generator.generate(PREFIX, DOCUMENTS, query, **GREEDY), QUERIES
    )
    assert [result.cache["batch"] for result in results] == [4] * 4
    assert sum(result.cache["misses"] for result in results) == 3
    assert sum(result.cache["hits"] for result in results) == 3 * 3


def test_order_of_contexts_does_not_keep_calls_apart() -> None:
    generator = make_generator()
    with busy(generator) as (batches, ask):
        answers = [ask(QUERIES[0], DOCUMENTS[::-1]), ask(QUERIES[0], DOCUMENTS)]
        wait_for(generator, 2)
    assert batches.sizes == [1, 2]
    assert {tuple(answer.result().token_ids) for answer in answers} == {
        tuple(alone(QUERIES[0]).token_ids)
    }


def test_seeds_are_kept_apart() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.4, "top_k": 0, "seed": 1},
        {"temperature": 1.4, "top_k": 0, "seed": 2},
        {"temperature": 0.7, "top_k": 5, "seed": 1},
    ]
    generator = make_generator()

    def sample(kind: dict[str, Any]) -> GenerationResult:
        return generator.generate(
            PREFIX, DOCUMENTS, QUERIES[0], **{**GREEDY, **kind, "do_sample": True}
        )

    together = run_together(sample, kinds)
    assert [result.cache["batch"] for result in together] == [3] * 3
    assert [result.token_ids for result in together] == [sample(kind).token_ids for kind in kinds]
    assert len({result.text for result in together}) == 3


def test_stop_strings_are_kept_apart() -> None:
    whole = alone(QUERIES[0]).text
    stops = [whole[1:3], whole[4:6], None]
    generator = make_generator()
    with busy(generator) as (batches, ask):
        answers = [ask(QUERIES[0], stop=stop) for stop in stops]
        wait_for(generator, 3)
    assert batches.sizes == [1, 3]
    for stop, answer in zip(stops, answers, strict=True):
        one, result = alone(QUERIES[0], stop=stop), answer.result()
        assert (result.text, result.token_ids, result.finish_reason) == (
            one.text,
            one.token_ids,
            one.finish_reason,
        )
    assert len({answer.result().text for answer in answers}) == 3


def test_padding_does_not_change_penalties() -> None:
    generator = make_generator()
    with busy(generator) as (batches, ask):
        answers = [ask(query, repetition_penalty=3.0) for query in QUERIES]
        wait_for(generator, 3)
    assert max(batches.sizes) >= 3
    for query, answer in zip(QUERIES, answers, strict=True):
        assert answer.result().token_ids == alone(query, repetition_penalty=3.0).token_ids
    prompts = [generator.prepare(PREFIX, DOCUMENTS, query) for query in QUERIES]
    longest = max(prompts, key=lambda prompt: len(prompt.query))
    ids, _ = generator._padded(longest, [prompt.query for prompt in prompts])
    for row, prompt in zip(ids.tolist(), prompts, strict=True):
        assert set(row) == set(prompt.logical_ids())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 4},
        {"contexts": DOCUMENTS[:2]},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores, **_: ids.new_zeros(ids.shape[0]).bool()]},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2},
    ],
)
def test_what_cannot_share_runs_by_itself(changes: dict[str, Any]) -> None:
    generator = make_generator()
    with busy(generator) as (batches, ask):
        other = ask(QUERIES[0], **changes)
        assert other.result(30).cache["batch"] == 1  # while the first one still runs
        assert batches.sizes == [1, 1]
    assert other.result().token_ids == alone(QUERIES[0], **changes).token_ids


@pytest.mark.parametrize(
    "config",
    [
        APEConfig(max_contexts=2),
        APEConfig(recompute_ratio=0.2),
        APEConfig(context_positions="sequential"),
    ],
)
def test_sets_that_depend_on_query_or_order_are_not_shared(config: APEConfig) -> None:
    generator = make_generator(config=config)
    prompt = generator.prepare(PREFIX, DOCUMENTS, QUERIES[0])
    assert generator._batch_key(prompt, generator._settings(dict(GREEDY))) is None


def test_prompt_that_does_not_fit_fails_alone() -> None:
    generator = make_generator()
    with busy(generator) as (_, ask):
        right, wrong = ask(QUERIES[0]), ask("long " * 200)
        with pytest.raises(ContextWindowError):
            wrong.result(30)
        wait_for(generator, 1)
    assert right.result().token_ids == alone(QUERIES[0]).token_ids


def test_failed_batch_is_answered_one_by_one() -> None:
    generator = make_generator()
    with busy(generator) as (batches, ask):
        batches.failures.append(MemoryError)
        answers = [ask(query) for query in QUERIES]
        wait_for(generator, len(QUERIES))
    assert batches.sizes == [1, 4, 1, 1, 1, 1]
    for query, answer in zip(QUERIES, answers, strict=True):
        assert answer.result().token_ids == alone(query).token_ids


def test_error_of_the_first_does_not_reach_those_who_wait() -> None:
    generator = make_generator()
    batches = Batches(generator)
    run = batches._run

    def fail_first(requests: Sequence[Request]) -> list[GenerationResult]:
        if len(batches.sizes) == 1:
            raise ZeroDivisionError("mine")
        return run(requests)

    batches._run = fail_first  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:

        def ask(query: str) -> Any:
            return pool.submit(generator.generate, PREFIX, DOCUMENTS, query, **GREEDY)

        first = ask("\nFirst.")
        assert batches.begun.wait(30)
        others = [ask(query) for query in QUERIES[:2]]
        wait_for(generator, 2)
        batches.go.set()
        with pytest.raises(ZeroDivisionError):
            first.result(30)
        assert [o.result(30).token_ids for o in others] == [
            alone(query).token_ids for query in QUERIES[:2]
        ]
    assert not generator._batches._waiting


def test_cancelled_calls_are_left_out_and_stopped() -> None:
    generator = make_generator()
    before, during = Cancellation(), Cancellation()
    with busy(generator) as (batches, ask):
        gone = ask(QUERIES[0], stopping_criteria=[before])
        wait_for(generator, 1)
        leaving = ask(QUERIES[1], stopping_criteria=[during])
        staying = ask(QUERIES[2])
        wait_for(generator, 3)
        before.requested.set()
        run = batches._run

        def cancel_second(requests: Sequence[Request]) -> list[GenerationResult]:
            if len(requests) == 2:
                during.requested.set()
            return run(requests)

        batches._run = cancel_second  # type: ignore[assignment]
    with pytest.raises(CancelledError):
        gone.result(30)
    assert batches.sizes == [1, 2]
    assert len(leaving.result().token_ids) == 1
    assert staying.result().token_ids == alone(QUERIES[2]).token_ids


def test_interrupt_of_a_waiting_call_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = make_generator()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread().name == "interrupted":
                raise KeyboardInterrupt
            return super().wait(timeout)

    caught: list[BaseException] = []

    def ask_and_be_interrupted() -> None:
        try:
            generator.generate(PREFIX, DOCUMENTS, QUERIES[0], **GREEDY)
        except KeyboardInterrupt as error:
            caught.append(error)

    with busy(generator) as (batches, ask):
        with monkeypatch.context() as patch:
            patch.setattr(batching.threading, "Event", Interrupted)
            thread = threading.Thread(target=ask_and_be_interrupted, name="interrupted")
            thread.start()
            thread.join(30)
        other = ask(QUERIES[1])
        wait_for(generator, 1)
    assert caught and other.result().token_ids == alone(QUERIES[1]).token_ids
    assert batches.sizes == [1, 1]


def test_batches_stay_within_their_memory() -> None:
    tokens = max(map(len, QUERIES)) + 10
    generator = make_generator()
    generator = make_generator(batch_bytes=2 * generator.info.spec(tokens).nbytes)
    with busy(generator) as (batches, ask):
        answers = [ask(query) for query in QUERIES]
        wait_for(generator, len(QUERIES))
    assert sum(batches.sizes) == 5 and max(batches.sizes) <= 3 and len(batches.sizes) >= 3
    for query, answer in zip(QUERIES, answers, strict=True):
        assert answer.result().token_ids == alone(query).token_ids


def test_long_query_is_not_padding_for_many_short_ones() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore())
    with busy(generator) as (_, ask):
        short = [ask(query) for query in QUERIES]
        wait_for(generator, 4)
        long = ask("long " * 300)
        wait_for(generator, 5)
    assert [s.result().cache["batch"] for s in short] == [4] * 4
    assert long.result().cache["batch"] == 1


def test_announced_calls_are_one_batch_and_a_missing_one_is_not_waited_for() -> None:
    generator = make_generator()

    def answer(query: str) -> Any:
        if query == QUERIES[3]:
            return "from another cache"  # never comes as far as generating
        return generator.generate(PREFIX, DOCUMENTS, query, **GREEDY)

    began = time.monotonic()
    results = run_together(answer, QUERIES)
    assert time.monotonic() - began < 60
    assert [result.cache["batch"] for result in results[:3]] == [3] * 3


def test_calls_beyond_the_limit_wait_for_a_free_place() -> None:
    generator, running, most = make_generator(), 0, 0
    lock = threading.Lock()

    def answer(query: str) -> list[int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return generator.generate(PREFIX, DOCUMENTS, query, **GREEDY).token_ids
        finally:
            with lock:
                running -= 1

    answers = run_together(answer, [*QUERIES, *QUERIES], 3)
    assert most <= 3
    assert answers == [alone(query).token_ids for query in QUERIES] * 2
