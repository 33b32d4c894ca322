"""Models are loaded from where they are said to be, with all that belongs to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ape_integrations import APELLM, APEGenerator, MemoryKVStore
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
