"""Bad input: a clear error, and nothing stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from transformers import T5Config, T5ForConditionalGeneration

from ape_integrations.core.config import APEConfig
from ape_integrations.errors import (
    APEError,
    ConfigError,
    ContextWindowError,
    StoreError,
    UnsupportedModelError,
)
from ape_integrations.llama_index import APELLM
from ape_integrations.llama_index.arguments import generation_arguments
from ape_integrations.store import MemoryKVStore
from tests.llama_index.conftest import TEXTS, FixedRetriever, entries, make_nodes
from tests.models import tiny_model

TINY_T5 = T5Config(
    vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
    decoder_start_token_id=0,
)  # fmt: skip


@pytest.fixture
def model_dir(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    """Return a directory with the tiny model and its tokenizer."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_unknown_directory_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    for use in (lambda llm: llm.metadata, lambda llm: llm.complete("?")):
        with pytest.raises(ConfigError, match="no-such-model"):
            use(APELLM(model_name=str(missing), cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_directory_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        APELLM(model_name=str(tmp_path / "empty")).complete("?")


def test_encoder_decoder_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    T5ForConditionalGeneration(TINY_T5).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    llm = APELLM(model_name=str(tmp_path / "t5"), cache_dir=tmp_path / "cache")
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        llm.complete("?")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_unwritable_cache_directory_is_named(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        APELLM(model_name=str(model_dir), cache_dir=tmp_path / "file").complete("?")


def test_too_long_query_is_refused(make_llm: Callable[..., APELLM]) -> None:
    llm = make_llm(model=tiny_model())  # 512 positions
    llm.register_contexts(TEXTS)
    question = "why " * 200
    prompt = f"Context:\n{TEXTS[0]}\n\nQuestion: {question}"
    for ask in (llm.complete, lambda text: list(llm.stream_complete(text))):
        with pytest.raises(ContextWindowError, match="512"):
            ask(prompt)
    assert entries(llm) == 0


@pytest.mark.parametrize("name", ["attention_temperature", "scaling_factor"])
@pytest.mark.parametrize("value", [0, -1, 3, float("nan"), "high"])
def test_settings_out_of_range_are_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        APELLM(**{name: value})


def test_contradicting_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_dir"):
        APELLM(store=tmp_path, cache_dir=tmp_path)


def test_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        APELLM(model=tiny_model()).complete("?")


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("inf")},
        {"stop": [3]},
        {"stop": 3},
        {"no_such_argument": 1},
        {"num_return_sequences": 2},
        {"past_key_values": object()},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_bad_arguments_of_a_call_are_refused(llm: APELLM, arguments: dict[str, Any]) -> None:
    llm.register_contexts(TEXTS)
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        llm.complete(f"Context:\n{TEXTS[0]}\n\nQuestion?", **arguments)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"generate_kwargs": {"temperature": -1}}, ConfigError),
        ({"generate_kwargs": {"num_return_sequences": 2}}, ConfigError),
        ({"generate_kwargs": {"past_key_values": object()}}, ConfigError),
        ({"model": tiny_model(), "context_window": 4000}, ContextWindowError),
        ({"model": T5ForConditionalGeneration(TINY_T5)}, UnsupportedModelError),
    ],
    ids=["temperature", "sequences", "owned", "length", "T5"],
)
def test_errors_reach_whoever_asks_an_engine(
    changes: dict[str, Any],
    error: type[Exception],
    mode: str,
    streaming: bool,
    make_llm: Callable[..., APELLM],
) -> None:
    """A ``ValueError`` would become the answer "Empty Response" in refine.py of LlamaIndex."""
    streaming = streaming and mode != "accumulate"
    nodes = [TextNode(text=f"{TEXTS[0]} {'And so on. ' * 60}")]
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(nodes, [0]), llm=make_llm(**changes), response_mode=mode, streaming=streaming
    )
    with pytest.raises(error):
        str(engine.query("Where is the lamp?"))


async def test_misspelt_argument_of_an_asynchronous_stream_is_a_config_error(
    make_llm: Callable[..., APELLM],
) -> None:
    pieces = await make_llm(generate_kwargs={"max_token": 3}).astream_complete("Where?")
    with pytest.raises(ConfigError, match="max_token"):
        _ = [piece async for piece in pieces]


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize"])
def test_misspelt_argument_reaches_whoever_asks_an_engine(
    mode: str, make_llm: Callable[..., APELLM]
) -> None:
    llm = make_llm(generate_kwargs={"max_token": 3})
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(make_nodes()), llm=llm, response_mode=mode
    )
    with pytest.raises(ConfigError, match="max_token"):
        engine.query("Where is the lamp?")
    with pytest.raises(ConfigError, match="max_token"):
        list(llm.stream_complete("Where is the lamp?"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_temperature": 0.5},
        {"scaling_factor": 0.5},
        {"model_kwargs": {"dtype": "bfloat16"}},
        {"tokenizer_kwargs": {"use_fast": False}},
        {"device_map": "cpu"},
        {"ape_config": APEConfig()},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_a_generator_has_already_is_refused(arguments: dict[str, Any], llm: APELLM) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        APELLM(generator=llm.generator, **arguments)


@pytest.mark.parametrize("name", ["attention_temperature", "scaling_factor"])
def test_settings_cannot_change_where_that_would_change_nothing(name: str, llm: APELLM) -> None:
    with pytest.raises(ConfigError, match=name):
        setattr(llm, name, 0.5)
    with pytest.raises(ConfigError, match=name):
        llm.model_copy(update={name: 0.5})
    copied = llm.model_copy(update={name: 0.9, "max_new_tokens": 2})
    assert (copied.max_new_tokens, copied.generator) == (2, llm.generator)


def test_name_is_taken_for_a_name(model_dir: Path) -> None:
    llm = APELLM(model=str(model_dir), tokenizer=model_dir, store=MemoryKVStore())
    assert llm.metadata.model_name == llm.tokenizer_name == str(model_dir)
    assert llm.complete("?", max_new_tokens=1).text is not None
    for name in ("model", "tokenizer"):
        with pytest.raises(ConfigError, match=f"{name}_name alone"):
            APELLM(**{name: "one", f"{name}_name": "another"})


def test_what_is_no_store_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="must be a KVStore"):
        APELLM(store=5)


def test_empty_conversation_is_refused(llm: APELLM) -> None:
    with pytest.raises(APEError):
        llm.chat([])


def test_empty_prompt_is_refused(make_llm: Callable[..., APELLM]) -> None:
    with pytest.raises(APEError, match="empty"):
        make_llm(is_chat_model=False).complete("")


def test_missing_llamaindex_names_the_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['llama_index'] = sys.modules['llama_index.core'] = None\n"
        "import ape_integrations\n"
        "try:\n"
        "    ape_integrations.APELLM\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingDependencyError" in done.stdout
    assert "ape-integrations[llama-index]" in done.stdout


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"temperature": 0.7}], {"temperature": 0.7, "do_sample": True}),
        ([{"temperature": 0.7}, {"temperature": 0}], {"do_sample": False}),
        ([{"top_p": 0.5}], {"top_p": 0.5, "do_sample": True}),
        ([{"do_sample": False}, {"top_p": 0.5}], {"do_sample": True}),
        ([{"temperature": 0.7}, {"do_sample": False}], {"do_sample": False}),
        ([{"max_tokens": 3}], {"max_new_tokens": 3}),
        ([{"max_new_tokens": 9}, {"max_tokens": 3}], {"max_new_tokens": 3}),
        ([{"max_new_tokens": 9}, {"max_new_tokens": None}], {"max_new_tokens": 9}),
        ([{"stop": ["a"]}, {"stop_sequences": ["b"]}], {"stop": ["b"]}),
        ([{}], {}),
    ],
)
def test_arguments_are_merged(layers: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    merged = generation_arguments(*layers)
    assert {name: merged[name] for name in expected} == expected
    assert ("do_sample" in merged) == any(
        name in layer for layer in layers for name in ("temperature", "top_p", "do_sample")
    )
