"""A model that APE would answer wrongly is found when it is attached, not by its users."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.model import ModelInfo, embeddings
from ape_integrations.errors import UnsupportedModelError

_LENGTHS = (3, 5, 4)

_INSTEAD = "Use a decoder-only model such as Llama, Qwen, Mistral, Gemma, Phi or SmolLM."

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
    vocabulary = embeddings(model).shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(sum(_LENGTHS))]
    sequence = torch.tensor([ids], device=info.input_device)
    expected = model(input_ids=sequence, use_cache=False).logits[:, -_LENGTHS[-1] :]
    try:
        logits = _behind_context(model, info, encoder, ids)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does more with its keys and values than attend to them, and "
            f"fails behind cached contexts ({error}). {_INSTEAD}"
        ) from error
    distance = (logits.double() - expected.double()).norm()
    relative = float(distance / expected.double().norm().clamp_min(1e-9))
    tolerance = _TOLERANCE[info.dtype.itemsize]
    if getattr(model, "is_quantized", False):
        # Activations that are rounded to eight bits fall on the other side of an edge now and then.
        tolerance = max(tolerance, _TOLERANCE[2])
    if not relative <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits behind cached contexts than it gives "
            f"sequentially (relative error {relative:.2g}), so answers would be wrong. "
            f"{_INSTEAD}"
        )


def _behind_context(
    model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder, ids: list[int]
) -> Tensor:
    """Return the logits at the last tokens, read behind a prefix and one cached context."""
    head, tail = _LENGTHS[0], _LENGTHS[0] + _LENGTHS[1]
    [(_, prefix_states)] = encoder.encode(encoder.empty_prefix(), [ids[:head]])
    prefix = encoder.on_devices(prefix_states)
    [(_, states)] = encoder.encode(prefix, [ids[head:tail]])
    cache = APECache(ContextLayout(head, (tail - head,)), prefix, encoder.on_devices(states))
    positions = torch.arange(tail, len(ids), device=info.input_device)[None]
    logits: Tensor = model(
        input_ids=torch.tensor([ids[tail:]], device=info.input_device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits
