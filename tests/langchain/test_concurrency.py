"""Many questions at once, abandoned streams, cancelled tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.runnables import Runnable

from ape_integrations import APELanguageModel, ChatAPE
from ape_integrations.core import batching
from ape_integrations.errors import ContextWindowError
from tests.langchain.helpers import QUESTIONS, TEXTS, Calls, WordRetriever, tiny_chat
from tests.langchain.pipelines import ANSWER_PROMPT, lcel


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a slow machine from splitting a batch."""
    monkeypatch.setattr(batching, "_PATIENCE", 60.0)


SIXTEEN = [*QUESTIONS, *(f"Tell me shortly: {question}" for question in QUESTIONS)]


def in_threads(chain: Runnable[str, str], calls: Calls) -> list[str]:
    return chain.batch(SIXTEEN, {"callbacks": [calls], "max_concurrency": 16})


def in_tasks(chain: Runnable[str, str], calls: Calls) -> list[str]:
    return asyncio.run(chain.abatch(SIXTEEN, {"callbacks": [calls]}))


@pytest.mark.parametrize("ask_all", [in_threads, in_tasks])
def test_sixteen_questions_at_once_are_right_and_encode_each_document_once(
    ask_all: Callable[[Runnable[str, str], Calls], list[str]],
) -> None:
    one_by_one = lcel(tiny_chat(), WordRetriever())
    expected = [one_by_one.invoke(question) for question in SIXTEEN]
    assert len(set(expected)) > 8
    calls = Calls()
    assert ask_all(lcel(tiny_chat(), WordRetriever()), calls) == expected
    assert calls.total("contexts") == 3 * 16
    assert calls.total("misses") == len(TEXTS)
    assert calls.total("hits") == 3 * 16 - len(TEXTS)


def forward_passes(chat: ChatAPE, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows with each forward pass of the model."""
    passes: list[float] = []
    model = chat.generator.model
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(time.monotonic())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return passes


def settle(passes: list[float]) -> None:
    """Wait until no forward pass has begun for a while."""
    while time.monotonic() - passes[-1] < 0.5 and len(passes) < 4000:
        time.sleep(0.1)


def generating() -> set[threading.Thread]:
    """Return the threads that generate right now."""
    return {t for t in threading.enumerate() if "_run_stream" in t.name or "ape-stream" in t.name}


def test_abandoned_stream_stops_generating_and_frees_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = tiny_chat(max_tokens=2000)
    passes = forward_passes(chat, monkeypatch)
    stream = chat.stream("Hello")
    first = next(stream)
    stream.close()
    done = len(passes)
    assert first.content and done < 1000
    assert not generating()
    assert chat.invoke("Hello", max_tokens=4).usage_metadata["output_tokens"] == 4
    assert len(passes) == done + 4


def test_dropped_stream_stops_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny_chat(max_tokens=2000)
    passes = forward_passes(chat, monkeypatch)
    for _ in chat.stream("Hello"):
        break
    assert not generating()
    assert len(passes) < 1000


def test_interleaved_streams_both_finish() -> None:
    chat = tiny_chat(max_tokens=20)
    questions = QUESTIONS[:2]
    chain = lcel(chat, WordRetriever())
    expected = tuple(chain.invoke(question) for question in questions)
    pairs = list(zip(*(chain.stream(question) for question in questions), strict=True))
    assert len(pairs) >= 20
    assert tuple("".join(pieces) for pieces in zip(*pairs, strict=True)) == expected


def test_interleaved_async_streams_both_finish() -> None:
    chain = lcel(tiny_chat(max_tokens=20), WordRetriever())

    async def read(question: str) -> str:
        return "".join([piece async for piece in chain.astream(question)])

    async def both() -> list[str]:
        return await asyncio.gather(read(QUESTIONS[0]), read(QUESTIONS[1]))

    assert asyncio.run(both()) == [chain.invoke(question) for question in QUESTIONS[:2]]


@pytest.mark.parametrize("streaming", [False, True])
def test_generation_does_not_block_the_event_loop(streaming: bool) -> None:
    chat = tiny_chat(max_tokens=40)

    async def ticks_while_answering() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        async def answer() -> None:
            if streaming:
                async for _ in chat.astream("Hello"):
                    pass
            else:
                await chat.ainvoke("Hello")

        ticker = asyncio.create_task(tick())
        await answer()
        ticker.cancel()
        return ticks

    assert asyncio.run(ticks_while_answering()) > 20


@pytest.mark.parametrize("streaming", [False, True])
def test_cancelled_task_stops_generating(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny_chat(max_tokens=4000)
    passes = forward_passes(chat, monkeypatch)

    async def answer() -> None:
        if streaming:
            async for _ in chat.astream("Hello"):
                pass
        else:
            await chat.ainvoke("Hello")

    async def cancel_half_way() -> None:
        task = asyncio.create_task(answer())
        while len(passes) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_half_way())
    settle(passes)
    assert len(passes) < 2000


def test_left_async_stream_stops_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny_chat(max_tokens=4000)
    passes = forward_passes(chat, monkeypatch)

    async def read_one() -> None:
        stream = chat.astream("Hello")
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(read_one())
    for thread in generating():
        thread.join(timeout=20)
    assert len(passes) < 2000 and not generating()


def test_error_while_streaming_reaches_the_reader_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = tiny_chat()
    with monkeypatch.context() as patch:

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(chat.generator.model, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.stream("Hello"))

        async def read() -> None:
            async for _ in chat.astream("Hello"):
                pass

        with pytest.raises(RuntimeError, match="out of memory"):
            asyncio.run(read())
    assert chat.invoke("Hello").content


def test_many_threads_load_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    chat = tiny_chat()
    settings = type(chat._engine.settings)
    load = settings.load

    def counting(self: Any) -> Any:
        loads.append(1)
        return load(self)

    monkeypatch.setattr(settings, "load", counting)
    prompts = [ANSWER_PROMPT.invoke({"context": "", "input": q}) for q in QUESTIONS]
    assert len(chat.batch(prompts)) == len(QUESTIONS)
    assert len(loads) == 1


# Batches over the same documents -----------------------------------------------------------------

EVERYTHING = WordRetriever(k=len(TEXTS))  # the same set for every question, in another order


@pytest.mark.parametrize("asynchronous", [False, True])
def test_batch_over_the_same_documents_is_one_generation(asynchronous: bool) -> None:
    one_by_one = lcel(tiny_chat(), EVERYTHING)
    expected = [one_by_one.invoke(question) for question in QUESTIONS]
    assert len(set(expected)) > 4
    chain, calls = lcel(tiny_chat(), EVERYTHING), Calls()
    if asynchronous:
        answers = asyncio.run(chain.abatch(list(QUESTIONS), {"callbacks": [calls]}))
    else:
        answers = chain.batch(list(QUESTIONS), {"callbacks": [calls]})
    assert answers == expected
    assert [report["batch"] for report in calls.reports] == [len(QUESTIONS)] * len(QUESTIONS)
    assert calls.total("misses") == len(TEXTS)
    assert calls.total("hits") == (len(QUESTIONS) - 1) * len(TEXTS)
    assert sorted(calls.texts) == sorted(expected)


def together(question: str) -> Any:
    documents = "\n\n".join(TEXTS)
    return ANSWER_PROMPT.invoke({"context": documents, "input": question})


def known(chat: Any) -> Any:
    chat.generator.registry.register(TEXTS)
    return chat


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_call_of_a_batch_has_its_own_callbacks_and_config(asynchronous: bool) -> None:
    chat, handlers = known(tiny_chat()), [Calls() for _ in QUESTIONS]
    configs: list[Any] = [
        {"callbacks": [handler], "run_name": f"call {i}"} for i, handler in enumerate(handlers)
    ]
    prompts = [together(question) for question in QUESTIONS]
    if asynchronous:
        answers = asyncio.run(chat.abatch(prompts, configs))
    else:
        answers = chat.batch(prompts, configs)
    assert [handler.texts for handler in handlers] == [[a.content] for a in answers]
    for answer, prompt in zip(answers, prompts, strict=True):
        ape = answer.response_metadata["ape"]
        assert ape["batch"] == len(QUESTIONS)
        assert answer.usage_metadata["output_tokens"] == 8
        alone = chat.invoke(prompt).usage_metadata
        counts = ("input_tokens", "output_tokens", "total_tokens")
        assert [answer.usage_metadata[name] for name in counts] == [alone[name] for name in counts]
        assert 0 < ape["first_token_seconds"] <= ape["total_seconds"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_error_of_one_call_leaves_the_others_of_its_batch(asynchronous: bool) -> None:
    chat = known(tiny_chat())
    prompts = [together(QUESTIONS[0]), together("long " * 9000), together(QUESTIONS[1])]

    def ask(**kwargs: Any) -> list[Any]:
        if asynchronous:
            return asyncio.run(chat.abatch(prompts, **kwargs))
        return chat.batch(prompts, **kwargs)

    first, error, last = ask(return_exceptions=True)
    assert isinstance(error, ContextWindowError)
    assert [first.content, last.content] == [
        chat.invoke(prompt).content for prompt in (prompts[0], prompts[2])
    ]
    assert first.response_metadata["ape"]["batch"] == 2
    with pytest.raises(ContextWindowError):
        ask()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_max_concurrency_bounds_a_batch(asynchronous: bool) -> None:
    chat = known(tiny_chat())
    prompts, config = [together(question) for question in QUESTIONS], {"max_concurrency": 2}
    if asynchronous:
        answers = asyncio.run(chat.abatch(prompts, config))
    else:
        answers = chat.batch(prompts, config)
    sizes = [answer.response_metadata["ape"]["batch"] for answer in answers]
    assert sizes[:2] == [2, 2] and max(sizes) == 2
    assert [a.content for a in answers] == [chat.invoke(prompt).content for prompt in prompts]


def test_calls_of_a_batch_that_stream_are_streamed() -> None:
    chat = known(tiny_chat(streaming=True))
    prompts = [together(question) for question in QUESTIONS[:3]]
    expected = [known(tiny_chat()).invoke(prompt).content for prompt in prompts]
    answers = chat.batch(prompts)
    assert [answer.content for answer in answers] == expected
    assert [answer.response_metadata["ape"]["batch"] for answer in answers] == [1, 1, 1]


def test_arguments_of_a_batch_reach_every_call() -> None:
    chat = known(tiny_chat())
    prompts = [together(question) for question in QUESTIONS[:4]]
    whole = [answer.content for answer in chat.batch(prompts)]
    stop = [whole[0][3]]
    answers = chat.bind(stop=stop).batch(prompts)
    assert [answer.content for answer in answers] == [text.split(stop[0])[0] for text in whole]
    seeded = tiny_chat(temperature=1.3, seed=5, model_kwargs={"top_k": 0})
    sampled = known(seeded).batch([prompts[0]] * 3)
    assert {answer.content for answer in sampled} == {seeded.invoke(prompts[0]).content}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_completion_model_answers_a_batch_together(asynchronous: bool) -> None:
    model = known(APELanguageModel(model=tiny_chat().generator, temperature=0, max_tokens=8))
    prompts = ["\n\n".join((*TEXTS, question)) for question in QUESTIONS]
    handlers = [Calls() for _ in prompts]
    configs: list[Any] = [{"callbacks": [handler]} for handler in handlers]
    expected = [model.invoke(prompt) for prompt in prompts]
    if asynchronous:
        answers = asyncio.run(model.abatch(prompts, configs))
    else:
        answers = model.batch(prompts, configs)
    assert answers == expected
    assert [handler.texts for handler in handlers] == [[text] for text in expected]
    assert [handler.reports[0]["batch"] for handler in handlers] == [len(prompts)] * len(prompts)
    result = model.generate(prompts)
    assert [row[0].text for row in result.generations] == expected
    assert [row[0].generation_info["ape"]["batch"] for row in result.generations] == [
        len(prompts)
    ] * len(prompts)


def test_completion_model_shares_the_engine_of_a_chat_model() -> None:
    chat = tiny_chat()
    completion = APELanguageModel(model=chat.generator, temperature=0, max_tokens=4)
    assert completion.generator is chat.generator
