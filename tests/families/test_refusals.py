"""Every refused family: the package's own error, with reason and alternative, model untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import UnsupportedModelError
from ape_integrations.store import MemoryKVStore
from tests.families.registry import REFUSED
from tests.models import byte_tokenizer


def state(model: Any) -> list[Any]:
    """Return what attaching could change."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return [
        [getattr(config, "_attn_implementation", None) for config in configs],
        [module.training for module in model.modules()],
        [(name, type(module).forward) for name, module in model.named_modules()],
        [(id(weight), weight._version) for weight in model.parameters()],
    ]


@pytest.mark.parametrize("title", REFUSED)
def test_family_is_refused_with_reason_and_alternative(
    title: str, record_property: Callable[[str, object], None]
) -> None:
    family = REFUSED[title]
    record_property("refused", title)
    model = family.build().train()
    before = state(model)
    with pytest.raises(UnsupportedModelError) as refusal:
        APEGenerator(model, byte_tokenizer(), MemoryKVStore())
    message = str(refusal.value)
    record_property("reason", message.split(". ")[0])
    assert family.refused in message
    assert type(model).__name__ in message
    assert "Use a decoder-only model" in message
    assert state(model) == before


def test_model_that_gives_other_logits_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal by the numerical self-check undoes what attaching has done."""
    from tests.families.registry import model_of

    model = model_of("Llama 2, 3.x")
    implementation = model.config._attn_implementation
    monkeypatch.setattr(
        "ape_integrations.core.self_check._behind_context",
        lambda *_: torch.zeros(1, 4, model.config.vocab_size),
    )
    model.train()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig())
    assert state(model) == before
    assert model.config._attn_implementation == implementation
    model.eval()
