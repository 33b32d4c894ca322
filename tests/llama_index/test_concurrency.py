"""Threads, coroutines, and streams that are closed early."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.query_engine import RetrieverQueryEngine

from ape_integrations.errors import ContextWindowError
from ape_integrations.llama_index import APELLM
from tests.llama_index.conftest import TEXTS, Calls, FixedRetriever, make_nodes, user

LONG = 400
SOME = 30  # tokens, of which at least one completes a character


def prompt(*texts: int) -> str:
    """Return a prompt with some of the texts."""
    contexts = "\n\n".join(TEXTS[i] for i in texts)
    return f"Context:\n{contexts}\n\nQuestion: where is it?\nAnswer:"


class Gate:
    """A stopping criterion that lets generation go on token by token, and counts the tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.allowed = threading.Semaphore(0)
        self.seen = threading.Semaphore(0)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.tokens += 1
        self.seen.release()
        assert self.allowed.acquire(timeout=30)
        return input_ids.new_zeros(input_ids.shape[0]).bool()


def ape_threads() -> set[threading.Thread]:
    """Return threads in which a model generates or a stream is read."""
    return {
        thread
        for thread in threading.enumerate()
        if "_run_stream" in thread.name or thread.name == "ape-astream"
    }


def wait_for_end_of(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_threads_with_different_contexts_answer_as_if_alone(
    make_llm: Callable[..., APELLM],
) -> None:
    sets = [(0, 1), (2, 3), (1, 2, 3), (3,), (0, 1, 2, 3), ()]
    alone = make_llm()
    alone.register_contexts(TEXTS)
    expected = [alone.complete(prompt(*chosen), max_new_tokens=10).text for chosen in sets]
    llm = make_llm()
    llm.register_contexts(TEXTS)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            answers = pool.map(
                lambda chosen: llm.complete(prompt(*chosen), max_new_tokens=10).text, sets
            )
            assert list(answers) == expected


def test_interleaved_streams_do_not_disturb_each_other(llm: APELLM) -> None:
    llm.register_contexts(TEXTS)
    prompts = [prompt(0, 1), prompt(2, 3)]
    expected = [llm.complete(text, max_new_tokens=10).text for text in prompts]
    streams = [llm.stream_complete(text, max_new_tokens=10) for text in prompts]
    last = ["", ""]
    while streams_left := [i for i, stream in enumerate(streams) if stream is not None]:
        for i in streams_left:
            try:
                last[i] = next(streams[i]).text
            except StopIteration:
                streams[i] = None  # type: ignore[call-overload]
    assert last == expected


def test_closed_stream_stops_the_model(llm: APELLM) -> None:
    gate = Gate()
    before = set(threading.enumerate())
    stream = llm.stream_complete(prompt(0), max_new_tokens=LONG, stopping_criteria=[gate])
    gate.allowed.release(SOME)
    next(stream)
    running = set(threading.enumerate()) - before
    assert running
    closer = threading.Thread(target=stream.close)
    closer.start()
    gate.allowed.release(LONG)
    closer.join(timeout=30)
    wait_for_end_of(running)
    assert gate.tokens < LONG


def test_dropped_stream_stops_the_model(llm: APELLM) -> None:
    gate = Gate()
    before = set(threading.enumerate())
    stream = llm.stream_chat([user(prompt(0))], max_new_tokens=LONG, stopping_criteria=[gate])
    gate.allowed.release(SOME)
    next(stream)
    running = set(threading.enumerate()) - before
    gate.allowed.release(LONG)
    del stream
    gc.collect()
    wait_for_end_of(running)


def test_closed_stream_leaves_the_llm_usable(llm: APELLM) -> None:
    llm.register_contexts(TEXTS)
    expected = llm.complete(prompt(0, 1)).text
    for _ in range(3):
        stream = llm.stream_complete(prompt(0, 1), max_new_tokens=LONG)
        next(stream)
        stream.close()
    assert llm.complete(prompt(0, 1)).text == expected


def test_stream_reports_an_error_to_its_reader(make_llm: Callable[..., APELLM]) -> None:
    llm = make_llm(max_new_tokens=9000)
    with pytest.raises(ContextWindowError):
        list(llm.stream_complete(prompt(0)))


async def test_event_loop_runs_during_a_completion(llm: APELLM) -> None:
    gate = Gate()
    task = asyncio.create_task(llm.acomplete(prompt(0), max_new_tokens=5, stopping_criteria=[gate]))
    # The model waits for this coroutine, token by token: it could not if the loop were blocked.
    for _ in range(5):
        while not gate.seen.acquire(blocking=False):
            await asyncio.sleep(0.001)
            assert not task.done() or task.exception() is None
        gate.allowed.release()
    assert (await task).raw["usage"]["completion_tokens"] == 5


async def test_event_loop_runs_during_a_stream(llm: APELLM) -> None:
    gate = Gate()
    stream = await llm.astream_chat([user(prompt(0))], max_new_tokens=5, stopping_criteria=[gate])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while ticks < 5:
            while not gate.seen.acquire(blocking=False):
                await asyncio.sleep(0.001)
            ticks += 1
            gate.allowed.release()

    ticking = asyncio.create_task(tick())
    responses = [response async for response in stream]
    await ticking
    assert responses[-1].raw["usage"]["completion_tokens"] == 5


async def test_cancelled_completion_stops_the_model(
    llm: APELLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ended = Gate(), threading.Event()
    generate = llm.generator.generate

    def generate_and_tell(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(llm.generator, "generate", generate_and_tell)
    task = asyncio.create_task(
        llm.achat([user(prompt(0))], max_new_tokens=LONG, stopping_criteria=[gate])
    )
    gate.allowed.release(2)
    while not gate.seen.acquire(blocking=False):
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.allowed.release(LONG)
    assert await asyncio.to_thread(ended.wait, 30)
    assert gate.tokens < LONG / 2


async def test_closed_async_stream_stops_the_model(llm: APELLM) -> None:
    gate = Gate()
    before = set(threading.enumerate())
    stream = await llm.astream_complete(prompt(0), max_new_tokens=LONG, stopping_criteria=[gate])
    gate.allowed.release(SOME)
    await stream.__anext__()
    running = {
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.name.startswith("asyncio")  # the loop's own workers stay
    }
    await stream.aclose()
    del stream
    gc.collect()
    deadline = time.monotonic() + 60
    while alive := [thread.name for thread in running if thread.is_alive()]:
        await asyncio.sleep(0.01)  # the loop finalises the inner generator
        gate.allowed.release()
        assert gate.tokens < LONG / 2
        assert time.monotonic() < deadline, f"still running: {alive}"


@pytest.mark.parametrize("chat", [True, False])
def test_stream_that_is_left_early_leaves_no_error_at_the_end_of_the_loop(
    chat: bool, llm: APELLM
) -> None:
    errors: list[Any] = []

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: errors.append(context))
        asked = [user(prompt(0))] if chat else prompt(0)
        stream = await (llm.astream_chat if chat else llm.astream_complete)(
            asked,  # type: ignore[arg-type]
            max_new_tokens=LONG,
        )
        async for _ in stream:
            break

    for _ in range(3):
        before = set(threading.enumerate())
        asyncio.run(leave())
        wait_for_end_of(set(threading.enumerate()) - before)
    assert errors == []


async def test_many_coroutines_get_their_own_answers(llm: APELLM) -> None:
    llm.register_contexts(TEXTS)
    prompts = [prompt(i) for i in range(len(TEXTS))]
    expected = [llm.complete(text).text for text in prompts]
    answers = await asyncio.gather(*(llm.acomplete(text) for text in prompts))
    assert [answer.text for answer in answers] == expected


@pytest.mark.parametrize("chat", [False, True])
async def test_coroutines_over_the_same_texts_are_answered_together(
    make_llm: Callable[..., APELLM], calls: Calls, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    questions = [f"{prompt(0, 1, 2)}{number}?" for number in range(5)]
    alone = make_llm()
    alone.register_contexts(TEXTS)
    expected = [
        alone.chat([user(text)]).message.content if chat else alone.complete(text).text
        for text in questions
    ]
    llm = make_llm()
    llm.register_contexts(TEXTS)
    batches = llm.generator._batches
    run, sizes = batches._run, []

    def held_back(requests: Any) -> Any:
        """Let the first generation wait until all others wait for it."""
        sizes.append(len(requests))
        while len(sizes) == 1 and batches.waiting() < 4:
            time.sleep(0.001)
        return run(requests)

    monkeypatch.setattr(batches, "_run", held_back)
    calls.clear()
    if chat:
        answers = await asyncio.gather(*(llm.achat([user(text)]) for text in questions))
        texts = [answer.message.content for answer in answers]
    else:
        answers = await asyncio.gather(*(llm.acomplete(text) for text in questions))
        texts = [answer.text for answer in answers]
    assert sizes == [1, 4]
    assert texts == expected
    assert len(calls.starts) == len(calls.responses) == 5
    assert sorted(answer.raw["ape"]["batch"] for answer in answers) == [1, 4, 4, 4, 4]
    assert {answer.raw["usage"]["completion_tokens"] for answer in answers} == {6}
    assert sum(answer.raw["ape"]["misses"] for answer in answers) == 3


async def test_cancelled_task_leaves_the_others_of_its_batch(
    make_llm: Callable[..., APELLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [f"{prompt(0, 1, 2)}{number}?" for number in range(4)]
    llm = make_llm()
    llm.register_contexts(TEXTS)
    expected = [llm.complete(text).text for text in questions]
    batches = llm.generator._batches
    run, sizes, go = batches._run, [], threading.Event()

    def held_back(requests: Any) -> Any:
        sizes.append(len(requests))
        assert go.wait(30)
        return run(requests)

    monkeypatch.setattr(batches, "_run", held_back)
    tasks = [asyncio.create_task(llm.acomplete(text)) for text in questions]
    while batches.waiting() < 3:
        await asyncio.sleep(0.001)
    tasks[3].cancel()
    await asyncio.sleep(0)
    go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers.pop(), asyncio.CancelledError)
    assert [answer.text for answer in answers] == expected[:3]
    assert sum(sizes) in (3, 4)  # the cancelled call may have been the first


def test_engine_in_many_threads_finds_its_nodes(llm: APELLM, calls: Calls) -> None:
    engine = RetrieverQueryEngine.from_args(FixedRetriever(make_nodes()), llm=llm)
    expected = str(engine.query("Where is the lamp?"))
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: str(engine.query("Where is the lamp?")), range(8)))
    assert answers == [expected] * 8
    assert [report["misses"] for report in calls.reports] == [0] * 8


def test_model_is_loaded_once_by_many_threads(
    make_llm: Callable[..., APELLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    with ThreadPoolExecutor(4) as pool:
        generators = list(pool.map(lambda _: llm.generator, range(8)))
    assert len(set(map(id, generators))) == 1
