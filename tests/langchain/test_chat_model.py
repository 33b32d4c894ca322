"""ChatAPE: arguments, responses, and what it refuses."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from ape_integrations import (
    APEConfig,
    APEGenerator,
    APELanguageModel,
    ChatAPE,
    MemoryKVStore,
)
from ape_integrations.core import loading
from ape_integrations.errors import ConfigError, ContextWindowError
from tests.langchain.helpers import (
    QUESTIONS,
    TEXTS,
    Calls,
    WordRetriever,
    loaded_model,
    loaded_tokenizer,
    tiny_chat,
)
from tests.langchain.pipelines import lcel

HELLO = [HumanMessage("Hello")]


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    loaded_model().save_pretrained(tmp_path / "model")
    loaded_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# What answers ------------------------------------------------------------------------------------


def test_prompt_without_documents_is_answered_as_by_transformers() -> None:
    model, tokenizer = loaded_model(), loaded_tokenizer()
    chat = tiny_chat()
    prompt = tokenizer(chat.render(HELLO), return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.invoke(HELLO).content == answer


def test_nothing_is_loaded_before_the_first_call() -> None:
    chat = ChatAPE(model="/no/such/model", max_tokens=5)
    chat.bind(stop=["x"])
    with pytest.raises(ConfigError, match="Cannot load '/no/such/model'"):
        chat.invoke("Hello")


def test_name_path_loaded_model_and_generator_give_the_same_answer(saved_model: str) -> None:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    generator = APEGenerator(loaded_model(), loaded_tokenizer(), store=MemoryKVStore())
    answers = {
        str(chat.invoke(HELLO).content)
        for chat in (
            ChatAPE(model=saved_model, store=MemoryKVStore(), **settings),
            ChatAPE(model=Path(saved_model), store=MemoryKVStore(), **settings),
            ChatAPE(model=generator, **settings),
            tiny_chat(**settings),
        )
    }
    assert len(answers) == 1


def test_models_of_one_path_share_one_generator_while_somebody_holds_it(saved_model: str) -> None:
    store = MemoryKVStore()
    first = ChatAPE(model=saved_model, store=store, temperature=0)
    second = ChatAPE(model=saved_model, store=store, temperature=1)
    assert first.generator is second.generator
    other = ChatAPE(model=saved_model, store=store, attention_temperature=0.5)
    assert other.generator is not first.generator
    assert other.generator.config.attention_temperature == 0.5


def test_no_model_is_the_bundled_one_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, saved_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "demo_model_path", lambda: saved_model)
    loading._told.clear()
    # The chatbots say it on their page, and keep the log quiet for the rest of their process.
    caplog.set_level(logging.WARNING, logger=loading.__name__)
    stores = [MemoryKVStore(), MemoryKVStore()]
    chats = [ChatAPE(store=store, max_tokens=2) for store in stores]
    names = [chat.invoke(HELLO).response_metadata["model_name"] for chat in chats]
    assert names == ["tiny-reader", "tiny-reader"]
    assert sum("demo model" in record.getMessage() for record in caplog.records) == 1


def test_a_call_can_name_another_model(saved_model: str) -> None:
    response = tiny_chat().invoke(HELLO, model=saved_model)
    assert response.response_metadata["model_name"] == saved_model


def test_copies_share_the_loaded_model() -> None:
    chat = tiny_chat()
    assert copy.deepcopy(chat).generator is chat.generator
    assert chat.model_copy().generator is chat.generator
    varied = chat.configurable_fields(max_tokens=ConfigurableField(id="length"))
    answer = varied.invoke(HELLO, {"configurable": {"length": 3}})
    assert answer.usage_metadata["output_tokens"] == 3


def test_changed_settings_of_ape_are_heeded_in_copies_and_assignments() -> None:
    chat = tiny_chat()
    changed = chat.model_copy(update={"attention_temperature": 0.5})
    assert changed.generator.config.attention_temperature == 0.5
    chat.scaling_factor = 0.4
    assert chat.generator.config.scaling_factor == 0.4


def test_another_model_named_in_calls_stays_loaded(saved_model: str) -> None:
    chat = tiny_chat()
    bound = chat.bind(model=saved_model)
    bound.invoke(HELLO)
    first = weakref.ref(chat._engine_for(saved_model)[0].generator)
    gc.collect()
    bound.invoke(HELLO)
    assert first() is chat._engine_for(saved_model)[0].generator


def test_a_named_model_can_be_pickled(saved_model: str) -> None:
    chat = ChatAPE(model=saved_model, temperature=0, max_tokens=4)
    assert pickle.loads(pickle.dumps(chat)).invoke(HELLO).content == chat.invoke(HELLO).content


# Arguments ---------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy_whatever_the_generation_config_says() -> None:
    chat = tiny_chat(temperature=0)
    config = chat.generator.model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 2.0, 0.7
    try:
        assert len({chat.invoke(HELLO).content for _ in range(3)}) == 1
        sampled = tiny_chat(temperature=None)
        assert len({sampled.invoke(HELLO).content for _ in range(6)}) > 1
    finally:
        config.do_sample, config.temperature, config.top_p = False, 1.0, 1.0


def test_seed_makes_sampling_reproducible_and_a_call_may_change_it() -> None:
    chat = tiny_chat(temperature=1.5, top_p=0.95, seed=7)
    assert chat.invoke(HELLO).content == chat.invoke(HELLO).content
    answers = {chat.invoke(HELLO, seed=seed).content for seed in range(6)}
    assert len(answers) > 1


def test_arguments_of_a_call_go_before_bound_ones_and_those_before_fields() -> None:
    chat = tiny_chat(max_tokens=6)
    count = [
        call.usage_metadata["output_tokens"]
        for call in (
            chat.invoke(HELLO),
            chat.bind(max_tokens=4).invoke(HELLO),
            chat.bind(max_tokens=4).invoke(HELLO, max_tokens=2),
            chat.invoke(HELLO, max_new_tokens=3),
            chat.invoke(HELLO, model_kwargs={"max_new_tokens": 5}),
        )
    ]
    assert count == [6, 4, 2, 3, 5]
    limited = tiny_chat(max_tokens=None, model_kwargs={"max_new_tokens": 5})
    answers = (limited.invoke(HELLO), limited.invoke(HELLO, max_tokens=2))
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [5, 2]


def test_one_limit_by_two_names_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="two names for one thing"):
        ChatAPE(max_tokens=5, model_kwargs={"max_new_tokens": 5})
    chat = tiny_chat()
    for arguments in ({"max_new_tokens": 3}, {"model_kwargs": {"max_new_tokens": 3}}):
        with pytest.raises(ConfigError, match="two names for one thing"):
            chat.invoke(HELLO, max_tokens=3, **arguments)


def test_stop_of_a_call_takes_the_place_of_bound_and_default_stops() -> None:
    chat = tiny_chat(max_tokens=8)
    whole = str(chat.invoke(HELLO).content)
    early, late = whole[1], whole[3]
    assert len({*whole[:2], late}) == 3 and late not in whole[:3]
    assert tiny_chat(stop=[late]).invoke(HELLO).content == whole[:3]
    assert tiny_chat(stop=[late]).bind(stop=[early]).invoke(HELLO).content == whole[:1]
    assert chat.bind(stop=[early]).invoke(HELLO, stop=[late]).content == whole[:3]
    assert tiny_chat(stop=[late]).invoke(HELLO, stop=[]).content == whole
    assert tiny_chat(stop=late).invoke(HELLO).response_metadata["finish_reason"] == "stop"


def test_model_kwargs_reach_the_generation() -> None:
    chat = tiny_chat(max_tokens=12)
    free = chat.invoke(HELLO).content
    banned = [[token] for token in chat.get_token_ids(str(free)[:1])]
    assert chat.invoke(HELLO, model_kwargs={"bad_words_ids": banned}).content != free
    assert (
        tiny_chat(max_tokens=12, model_kwargs={"bad_words_ids": banned}).invoke(HELLO).content
        != free
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temprature": 0.5}, "Did you mean temperature"),
        ({"generator": object()}, "Pass it as model"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"attention_temperature": 0}, "attention_temperature must lie in"),
        ({"model_kwargs": {"device_map": "cpu"}}, "load_kwargs"),
        ({"model_kwargs": {"stop": ["x"]}}, "pass stop="),
        ({"model_kwargs": {"temperature": 1}}, "pass temperature="),
        ({"model_kwargs": {"top_p": 0.5}}, "pass top_p="),
        ({"model_kwargs": {"seed": 1}}, "pass seed="),
        ({"model_kwargs": {"max_tokens": 1}}, "pass max_tokens="),
        ({"top_k": 20}, "model_kwargs={'top_k'"),
        ({"repetition_penalty": 1.1}, "model_kwargs={'repetition_penalty'"),
        ({"do_sample": False}, "model_kwargs={'do_sample'"),
        ({"logits_processor": []}, "model_kwargs={'logits_processor'"),
        ({"max_new_tokens": 5}, "max_tokens, or in model_kwargs"),
        ({"max_contexts": 3}, r"ape_config=APEConfig\(max_contexts"),
        ({"recompute_ratio": 0.1}, r"ape_config=APEConfig\(recompute_ratio"),
        ({"device_map": "cpu"}, "load_kwargs={'device_map'"),
        ({"dtype": "float32"}, "load_kwargs={'dtype'"),
        ({"namespace": "a"}, r"store=DiskKVStore\(namespace"),
        ({"trust_directory": True}, r"store=DiskKVStore\(trust_directory"),
        ({"store": 5}, "store must be a KVStore.*or a directory, not int"),
        ({"store": {"a": 1}}, "store must be a KVStore.*or a directory, not dict"),
        ({"store": "a", "cache_dir": "b"}, "two names for one thing"),
        ({"model": "name", "tokenizer": object()}, "goes with a loaded model"),
        ({"ape_config": APEConfig(), "scaling_factor": 0.5}, "say the same thing"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ChatAPE(**arguments)


def test_loaded_model_needs_its_tokenizer_and_generator_keeps_its_settings() -> None:
    with pytest.raises((ConfigError, ValueError), match="needs its tokenizer"):
        ChatAPE(model=loaded_model())
    generator = tiny_chat().generator
    with pytest.raises((ConfigError, ValueError), match="its own store and APE settings"):
        ChatAPE(model=generator, scaling_factor=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number of at least 0, not 'hot'"),
        ({"temperature": True}, "temperature must be a number"),
        ({"max_tokens": "5"}, "max_tokens must be at least 1, and a whole number, not '5'"),
        ({"max_tokens": 2.5}, "max_tokens must be at least 1, and a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"stop": 3}, "stop must be a string or a list of strings, not 3"),
        ({"stop": ["x", 3]}, "stop must be a string or a list of strings"),
        ({"top_p": 2}, "top_p must be a number above 0 and at most 1, not 2"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"model_kwargs": {"stop": ["x"]}}, "pass stop="),
        ({"max_contexts": 3}, r"ape_config=APEConfig\(max_contexts"),
    ],
)
def test_wrong_arguments_of_a_call_are_refused_by_name(
    arguments: dict[str, Any], message: str
) -> None:
    chat = tiny_chat()
    with pytest.raises(ConfigError, match=message):
        chat.invoke(HELLO, **arguments)
    with pytest.raises(ConfigError, match=message):
        list(chat.stream(HELLO, **arguments))


def test_arguments_that_mean_nothing_here_are_taken_in_calls_too() -> None:
    chat = tiny_chat()
    expected = chat.invoke(HELLO).text
    other = {"timeout": 3, "stream_usage": True, "parallel_tool_calls": False, "user": "me"}
    assert chat.bind(**other).invoke(HELLO).text == expected
    assert chat.invoke(HELLO, max_completion_tokens=3).usage_metadata["output_tokens"] == 3


def test_unknown_arguments_of_a_call_are_refused() -> None:
    chat = tiny_chat()
    with pytest.raises(ConfigError, match="Did you mean top_p"):
        chat.invoke(HELLO, topp=0.5)
    with pytest.raises(ConfigError, match="cache_dir is set when the model is made"):
        chat.invoke(HELLO, cache_dir="elsewhere")
    for temperature in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="temperature must be a number of at least 0"):
            chat.invoke(HELLO, temperature=temperature)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1"):
        chat.invoke(HELLO, max_tokens=0)


# Responses ---------------------------------------------------------------------------------------


def test_responses_carry_usage_and_what_the_cache_did() -> None:
    chat, calls = tiny_chat(), Calls()
    lcel(chat, WordRetriever()).invoke(QUESTIONS[0], {"callbacks": [calls]})
    report = calls.reports[0]
    assert set(report) >= {"contexts", "hits", "misses", "bytes_loaded", "first_token_seconds"}
    assert (report["contexts"], report["hits"], report["misses"]) == (3, 0, 3)
    response = chat.invoke(HELLO)
    metadata, usage = response.response_metadata, response.usage_metadata
    assert metadata["finish_reason"] == "length" and metadata["model_name"] == "llama"
    assert usage["output_tokens"] == 8
    assert usage["input_tokens"] == chat.get_num_tokens_from_messages(HELLO)
    assert usage["total_tokens"] == usage["input_tokens"] + 8


def test_stream_gives_the_text_of_invoke_and_metadata_in_one_chunk() -> None:
    chat = tiny_chat(max_tokens=12)
    chunks = list(chat.stream(HELLO))
    assert "".join(str(chunk.content) for chunk in chunks) == chat.invoke(HELLO).content
    assert len(chunks) > 3
    assert sum("model_name" in chunk.response_metadata for chunk in chunks) == 1
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.response_metadata["ape"]["contexts"] == 0
    assert whole.response_metadata["finish_reason"] == "length"


def test_streaming_field_shows_tokens_to_callbacks_of_invoke() -> None:
    class Tokens(Calls):
        seen = 0

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.seen += 1

    tokens = Tokens()
    tiny_chat(streaming=True).invoke(HELLO, {"callbacks": [tokens]})
    assert tokens.seen > 3
    quiet = Tokens()
    tiny_chat().invoke(HELLO, {"callbacks": [quiet]})
    assert quiet.seen == 0


def test_tokens_are_counted_by_the_models_own_tokenizer() -> None:
    chat = tiny_chat()
    assert chat.get_num_tokens("Aldor") == 5
    assert (
        chat.get_token_ids("ab") == loaded_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    )


def test_llm_cache_keys_on_everything_that_changes_an_answer() -> None:
    def key(**kwargs: Any) -> str:
        return tiny_chat(store=store, **kwargs)._get_llm_string(stop=None)

    store = MemoryKVStore()
    assert key() == key()
    keys = [
        key(),
        key(temperature=0.5),
        key(max_tokens=9),
        key(top_p=0.5),
        key(stop=["x"]),
        key(seed=1),
        key(model_kwargs={"top_k": 3}),
        key(attention_temperature=0.5),
        key(scaling_factor=0.5),
        key(ape_config=APEConfig(context_separator="\n")),
        key(capture=False),
        key(template_kwargs={"enable_thinking": False}),
        key(tools=True),  # another chat template
        ChatAPE(model="a")._get_llm_string(),
        ChatAPE(model="b")._get_llm_string(),
        ChatAPE(model="b", load_kwargs={"dtype": "bfloat16"})._get_llm_string(),
    ]
    assert len(set(keys)) == len(keys)
    chat = tiny_chat()
    assert chat._get_llm_string(stop=["x"]) != chat._get_llm_string(stop=["y"])
    before = chat._get_llm_string()
    weight = next(chat.generator.model.parameters())
    with torch.no_grad():
        weight.add_(1.0)
        try:
            assert chat._get_llm_string() != before
        finally:
            weight.sub_(1.0)


def test_llm_cache_answers_without_generating() -> None:
    chat = tiny_chat(cache=InMemoryCache())
    calls = Calls()
    first = chat.invoke(HELLO, {"callbacks": [calls]})
    chat.generator.generate_prompt = None  # type: ignore[method-assign,assignment]
    assert chat.invoke(HELLO).content == first.content
    with pytest.raises(TypeError):
        chat.invoke(HELLO, stop=["zzz"])


def test_traces_name_provider_and_model() -> None:
    chat = tiny_chat(stop=["x"])
    params = chat._get_ls_params()
    assert params["ls_provider"] == "ape" and params["ls_model_name"] == "llama"
    assert params["ls_stop"] == ["x"] and params["ls_max_tokens"] == 8
    assert ChatAPE()._get_ls_params()["ls_model_name"] == "tiny-reader"


@pytest.mark.parametrize("name", ["token", "use_auth_token"])
@pytest.mark.parametrize("kind", [ChatAPE, APELanguageModel])
def test_hub_token_is_shown_nowhere_and_reaches_the_loading(
    kind: type[Any], name: str, saved_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starts(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen = ""

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            self.seen += repr((args, kwargs))

        def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
            self.seen += repr((args, kwargs))

    loaded: list[dict[str, Any]] = []

    def load(model: str, **kwargs: Any) -> APEGenerator:
        loaded.append(kwargs)
        return APEGenerator(loaded_model(), loaded_tokenizer(), store=MemoryKVStore())

    monkeypatch.setattr(APEGenerator, "from_pretrained", load)
    made = kind(model=saved_model, load_kwargs={name: "hf_SECRET", "revision": "v1"}, max_tokens=2)
    starts, runs = Starts(), RunCollectorCallbackHandler()
    made.invoke("Hello", {"callbacks": [starts, runs]})
    chain = ChatPromptTemplate([("human", "{question}")]) | made
    traced = repr([(run.serialized, run.extra) for run in runs.traced_runs])
    shown = (repr(made), str(made), dumps(made), dumps(chain), starts.seen, traced)
    assert "v1" in starts.seen and "**********" in repr(made)
    assert not any("hf_SECRET" in text for text in shown)
    assert loaded[0][name] == "hf_SECRET"
    with pytest.raises((ConfigError, ValueError), match="Did you mean temperature") as refused:
        kind(load_kwargs={name: "hf_SECRET"}, temprature=1)
    assert "hf_SECRET" not in str(refused.value)


# Messages ----------------------------------------------------------------------------------------


def test_text_blocks_are_text_and_other_content_is_refused() -> None:
    chat = tiny_chat()
    blocks = HumanMessage([{"type": "text", "text": "Hello"}])
    assert chat.render([blocks]) == chat.render(HELLO)
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:..."}}])
    with pytest.raises(ConfigError, match=r"'image_url'.*text only"):
        chat.invoke([picture])


@pytest.mark.parametrize(
    ("block", "written"),
    [
        ({"type": "text", "text": "Tall."}, "Tall."),
        ({"type": "input_text", "text": "Tall."}, "Tall."),
        ({"type": "document", "text": "Tall."}, "Tall."),
        (
            {"type": "document", "title": "A", "text": "Tall."},
            '{"type": "document", "title": "A", "text": "Tall."}',
        ),
        (
            {"type": "file", "name": "a.txt", "size": 3},
            '{"type": "file", "name": "a.txt", "size": 3}',
        ),
        ({"type": "json", "json": {"a": [1]}}, '{"type": "json", "json": {"a": [1]}}'),
    ],
)
def test_records_that_tools_return_keep_their_fields(block: dict[str, Any], written: str) -> None:
    call = {"name": "search", "args": {}, "id": "1"}
    asked = [HumanMessage("How tall?"), AIMessage("", tool_calls=[call])]
    rendered = [
        tiny_chat(tools=True).render([*asked, ToolMessage(content, tool_call_id="1")])
        for content in ([block], written)
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "...", "mime_type": "image/png"},
        {"type": "file", "file_id": "f1"},
        {"type": "image_url", "image_url": {"url": "data:..."}},
    ],
)
def test_media_of_tools_are_refused(block: dict[str, Any]) -> None:
    call = {"name": "search", "args": {}, "id": "1"}
    asked = [HumanMessage("How tall?"), AIMessage("", tool_calls=[call])]
    with pytest.raises(ConfigError, match="text only"):
        tiny_chat(tools=True).render([*asked, ToolMessage([block], tool_call_id="1")])


def test_calls_that_a_provider_made_itself_are_not_repeated() -> None:
    done = [{"type": "server_tool_call", "name": "search", "id": "1", "args": {}}, "It is tall."]
    said = [HumanMessage("How tall?"), AIMessage(done)]  # type: ignore[arg-type]
    plain = [HumanMessage("How tall?"), AIMessage("It is tall.")]
    assert tiny_chat().render(said) == tiny_chat().render(plain)


def test_prompt_that_does_not_fit_is_the_error_that_langchain_knows() -> None:
    chat, long = tiny_chat(), [HumanMessage("long " * 9000)]

    async def streamed() -> None:
        async for _ in chat.astream(long):
            pass

    for ask in (
        lambda: chat.invoke(long),
        lambda: list(chat.stream(long)),
        lambda: asyncio.run(chat.ainvoke(long)),
        lambda: asyncio.run(streamed()),
    ):
        with pytest.raises(ContextOverflowError, match="lower max_tokens") as raised:
            ask()
        assert isinstance(raised.value, ContextWindowError)


def test_history_that_does_not_fit_is_summarised_in_part() -> None:
    """LangChain's middleware leaves out its middle where the model says that it does not fit."""
    chat = tiny_chat()
    middleware = SummarizationMiddleware(
        chat, trigger=("messages", 5), keep=("messages", 1), trim_tokens_to_summarize=None
    )
    agent = create_agent(chat, [], middleware=[middleware])
    history = [kind("long " * 100) for _ in range(10) for kind in (HumanMessage, AIMessage)]
    state = agent.invoke({"messages": [*history, HumanMessage("How tall?")]})
    assert "summary" in state["messages"][0].text


def test_answers_with_content_blocks_can_be_part_of_the_next_prompt() -> None:
    chat = tiny_chat(output_version="v1")
    answer = chat.invoke(HELLO)
    plain = AIMessage(str(answer.text))
    assert chat.render([*HELLO, answer]) == chat.render([*HELLO, plain])


def test_tool_messages_are_rendered_though_the_template_knows_no_tools() -> None:
    call = {"name": "search", "args": {"query": "Aldor"}, "id": "1"}
    rendered = tiny_chat().render(
        [
            HumanMessage("How tall?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage(TEXTS[0], tool_call_id="1", name="search"),
        ]
    )
    assert TEXTS[0] in rendered and "search" in rendered


def test_documents_of_a_tool_artifact_are_contexts_in_a_new_process() -> None:
    documents = WordRetriever().invoke(QUESTIONS[0])
    content = "\n\n".join(document.page_content for document in documents)
    call = {"name": "search", "args": {"query": "Aldor"}, "id": "1"}
    chat = tiny_chat(tools=True)  # made after the retrieval
    conversation = [
        SystemMessage("Answer."),
        HumanMessage("How tall?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage(content, tool_call_id="1", name="search", artifact=documents),
    ]
    assert chat.invoke(conversation).response_metadata["ape"]["contexts"] == 3
    off = tiny_chat(tools=True, capture=False)
    assert off.invoke(conversation).response_metadata["ape"]["contexts"] == 0


def test_other_chat_models_do_not_mind_the_capture() -> None:
    other = GenericFakeChatModel(messages=iter([AIMessage("fine")]))
    inputs = lcel(other, WordRetriever())  # type: ignore[arg-type]
    assert inputs.invoke(QUESTIONS[0]) == "fine"
