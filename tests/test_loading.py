"""Models are loaded from where they are said to be, with all that belongs to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ape_integrations import APELLM, APEGenerator, ChatAPE, MemoryKVStore
from tests.models import byte_tokenizer, tiny_model


def test_place_of_the_model_is_that_of_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision or a GGUF file that is named for the model holds for everything else of it."""
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    seen: dict[str, dict[str, Any]] = {}

    def watched(kind: Any) -> None:
        load = kind.from_pretrained

        def from_pretrained(name: str, **kwargs: Any) -> Any:
            seen[kind.__name__] = kwargs
            return load(name, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoTokenizer, AutoConfig):
        watched(kind)
    place = {"revision": "v2", "local_files_only": True}
    store = MemoryKVStore("10MB")
    APEGenerator.from_pretrained(tmp_path, store=store, dtype=torch.float32, **place)
    assert seen.pop("AutoTokenizer") == place
    own = {"tokenizer_kwargs": {"revision": "v3"}}
    APEGenerator.from_pretrained(tmp_path, store=store, **place, **own)  # type: ignore[arg-type]
    assert seen.pop("AutoTokenizer") == {**place, "revision": "v3"}
    seen.clear()
    llm = APELLM(model_name=str(tmp_path), model_kwargs={**place, "dtype": torch.float32})
    assert llm.metadata.is_chat_model
    assert seen["AutoTokenizer"] == place
    assert place.items() <= seen["AutoConfig"].items()


def test_models_load_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads them: transformers changes what all threads share while it does so."""
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    load, loading, together = AutoModelForCausalLM.from_pretrained, [], []

    def from_pretrained(name: str, **kwargs: Any) -> Any:
        loading.append(name)
        together.append(len(loading))
        time.sleep(0.1)
        try:
            return load(name, **kwargs)
        finally:
            loading.pop()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    store = MemoryKVStore("10MB")
    uses: list[Callable[[], Any]] = [
        lambda: APELLM(model_name=str(tmp_path), store=store).generator,
        lambda: APELLM(model_name=str(tmp_path), store=store).generator,
        lambda: ChatAPE(model=str(tmp_path), store=store).generator,
        lambda: APEGenerator.from_pretrained(tmp_path, store=store),
    ]
    with ThreadPoolExecutor(len(uses)) as pool:
        generators = list(pool.map(lambda use: use(), uses))
    assert together == [1] * len(uses)
    asked = ("Read this.", ["Ada lives in Porto.", "Bo is a welder."], "Who?")
    answers = [g.generate(*asked, do_sample=False, max_new_tokens=8) for g in generators]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
