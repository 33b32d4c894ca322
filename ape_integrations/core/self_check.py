"""A model that APE would answer wrongly is found when it is attached, not by its users."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.errors import UnsupportedModelError
from ape_integrations.core.model import ModelInfo

_LENGTHS = (3, 5, 4)

#: Relative L2 error that rounding explains, by the bytes of an element.
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 0.1}


@torch.no_grad()
def self_check(model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder) -> None:
    """Compare one context behind a prefix with the model's own sequential forward pass.

    One context with T = S = 1 is sequential encoding, so the logits must agree up to rounding.

    Raises
    ------
    UnsupportedModelError
        They do not.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary: int = embeddings.weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(sum(_LENGTHS))]
    head, tail = _LENGTHS[0], _LENGTHS[0] + _LENGTHS[1]
    [(_, prefix_states)] = encoder.encode(encoder.empty_prefix(), [ids[:head]])
    prefix = encoder.on_devices(prefix_states)
    [(_, states)] = encoder.encode(prefix, [ids[head:tail]])
    cache = APECache(ContextLayout(head, (tail - head,)), prefix, encoder.on_devices(states))
    device = info.input_device
    query = torch.tensor([ids[tail:]], device=device)
    positions = torch.arange(tail, len(ids), device=device)[None]
    logits = model(
        input_ids=query, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    sequence = torch.tensor([ids], device=device)
    expected = model(input_ids=sequence, use_cache=False).logits[:, tail:]
    error = (logits.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)
    if not error <= _TOLERANCE[info.dtype.itemsize]:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits behind cached contexts than it gives "
            f"sequentially (relative error {float(error):.2g}), so answers would be wrong. Use a "
            "decoder-only model such as Llama, Qwen, Mistral, Gemma, Phi or SmolLM."
        )
