"""A model that APE would answer wrongly is found when it is attached, not by its users."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.model import ModelInfo, embeddings
from ape_integrations.core.recompute import SequenceArranger
from ape_integrations.errors import ConfigError, UnsupportedModelError

#: Tokens of prefix, context and query; and of several contexts.
_LENGTHS, _CONTEXTS = (3, 5, 4), (5, 2, 4)

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
    ids = _ids(model, sum(_LENGTHS))
    expected = _sequential(model, info, ids)
    try:
        logits = _behind_context(model, info, encoder, ids)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does more with its keys and values than attend to them, and "
            f"fails behind cached contexts ({error}). {_INSTEAD}"
        ) from error
    relative, tolerance = _difference(model, info, logits, expected)
    if not relative <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits behind cached contexts than it gives "
            f"sequentially (relative error {relative:.2g}), so answers would be wrong. "
            f"{_INSTEAD}"
        )


@torch.no_grad()
def sequence_check(
    model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder, arranger: SequenceArranger
) -> None:
    """Compare contexts whose tokens are all computed again with the model's own sequence.

    Raises
    ------
    ConfigError
        They differ by more than rounding.
    """
    head, tail = _LENGTHS[0], _LENGTHS[-1]
    ids = _ids(model, head + sum(_CONTEXTS) + tail)
    contexts, start = [], head
    for length in _CONTEXTS:
        contexts.append(ids[start : start + length])
        start += length
    layout = ContextLayout(head, _CONTEXTS, sequential=True)
    [(_, prefix_states)] = encoder.encode(encoder.empty_prefix(), [ids[:head]])
    prefix = encoder.on_devices(prefix_states)
    alone = {index: states for index, states in encoder.encode(prefix, contexts)}
    layers = [
        (
            torch.cat([alone[i].keys[layer] for i in range(len(contexts))], dim=1).to(device),
            torch.cat([alone[i].values[layer] for i in range(len(contexts))], dim=1).to(device),
        )
        for layer, device in enumerate(info.devices)
    ]
    arranger.arrange(prefix, contexts, layers, 1.0)
    logits = _logits(model, info, APECache(layout, prefix, layers), ids[start:], start)
    relative, tolerance = _difference(model, info, logits, _sequential(model, info, ids))
    if not relative <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} gives other logits behind recomputed contexts than it gives "
            f"sequentially (relative error {relative:.2g}), so recompute_ratio and "
            'context_positions="sequential" cannot be used with it. Use recompute_ratio=0 and '
            'context_positions="shared".'
        )


def _ids(model: PreTrainedModel, length: int) -> list[int]:
    vocabulary = embeddings(model).shape[0]
    return [(7 * i + 3) % vocabulary for i in range(length)]


def _sequential(model: PreTrainedModel, info: ModelInfo, ids: list[int]) -> Tensor:
    """Return the model's own logits at the last tokens."""
    sequence = torch.tensor([ids], device=info.input_device)
    logits: Tensor = model(input_ids=sequence, use_cache=False).logits
    return logits[:, -_LENGTHS[-1] :]


def _difference(
    model: PreTrainedModel, info: ModelInfo, logits: Tensor, expected: Tensor
) -> tuple[float, float]:
    """Return the relative error of logits, and how much of it rounding explains."""
    distance = (logits.double() - expected.double()).norm()
    relative = float(distance / expected.double().norm().clamp_min(1e-9))
    tolerance = _TOLERANCE[info.dtype.itemsize]
    if getattr(model, "is_quantized", False):
        # Activations that are rounded to eight bits fall on the other side of an edge now and then.
        tolerance = max(tolerance, _TOLERANCE[2])
    return relative, tolerance


def _logits(
    model: PreTrainedModel, info: ModelInfo, cache: APECache, ids: list[int], start: int
) -> Tensor:
    """Return the logits at tokens that stand behind a cache's contexts."""
    logits: Tensor = model(
        input_ids=torch.tensor([ids], device=info.input_device),
        position_ids=torch.arange(start, start + len(ids), device=info.input_device)[None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits


def _behind_context(
    model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder, ids: list[int]
) -> Tensor:
    """Return the logits at the last tokens, read behind a prefix and one cached context."""
    head, tail = _LENGTHS[0], _LENGTHS[0] + _LENGTHS[1]
    [(_, prefix_states)] = encoder.encode(encoder.empty_prefix(), [ids[:head]])
    prefix = encoder.on_devices(prefix_states)
    [(_, states)] = encoder.encode(prefix, [ids[head:tail]])
    cache = APECache(ContextLayout(head, (tail - head,)), prefix, encoder.on_devices(states))
    return _logits(model, info, cache, ids[tail:], tail)
