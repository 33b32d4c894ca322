"""Bad input: a clear error, and nothing stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from ape_integrations.errors import (
    APEError,
    ConfigError,
    ContextWindowError,
    StoreError,
    UnsupportedModelError,
)
from ape_integrations.llama_index import APELLM
from ape_integrations.llama_index.arguments import generation_arguments
from tests.llama_index.conftest import TEXTS, entries
from tests.models import tiny_model


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
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
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
        {"stop": [3]},
        {"no_such_argument": 1},
        {"num_return_sequences": 2},
        {"past_key_values": object()},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_bad_arguments_of_a_call_are_refused(llm: APELLM, arguments: dict[str, Any]) -> None:
    llm.register_contexts(TEXTS)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        llm.complete(f"Context:\n{TEXTS[0]}\n\nQuestion?", **arguments)


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
        ([{"temperature": 0.7}, {"temperature": 0}], {"do_sample": False, "temperature": None}),
        ([{"top_p": 0.5}], {"top_p": 0.5, "do_sample": True}),
        ([{"do_sample": False}, {"top_p": 0.5}], {"do_sample": True}),
        ([{"temperature": 0.7}, {"do_sample": False}], {"do_sample": False, "temperature": None}),
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
