"""Cached keys at other positions: their rotary embedding undone there and done again here.

How a family rotates its keys (which layers, which dimensions, which pairs, which angles) is found
out by watching: the model's own rotary embedding gives the angles, and keys of the same tokens at
two positions show which reading of them is right. Both rotations come from the model's own
embedding, so that a moved key is the key that the model would have rotated there itself, up to
rounding, at any length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.model import ModelInfo, embeddings, last_logits_only
from ape_integrations.errors import ConfigError

#: Single tokens that show how keys turn, and how far they are moved for it.
_TOKENS, _DISTANCE = 4, 2048

#: Relative L2 error that rounding explains, by the bytes of an element.
_TOLERANCE = {8: 1e-4, 4: 1e-4, 2: 3e-2}

#: Tokens that are moved at a time; bounds the memory of doing it in fp32.
_BLOCK = 4096

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Call:
    """A call of a rotary embedding module during a forward pass, to be made for other positions."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def angles(self, positions: Tensor) -> Angles | None:
        """Return cosines and sines ``(length, width)`` at ``positions``, ``(length,)``."""

        def at(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if argument.is_floating_point():
                # Only its device and dtype count; in fp32 the angles are not rounded.
                return argument.new_zeros((1, 1, 1), dtype=torch.float32)
            shape = (*argument.shape[:-2], 1, len(positions))
            return positions.to(argument.device).expand(shape)

        kwargs = {name: at(argument) for name, argument in self.kwargs.items()}
        return _angles(self.module(*map(at, self.args), **kwargs))


def _angles(output: Any) -> Angles | None:
    """Read a rotary embedding's output; None for anything that is none."""
    if isinstance(output, Tensor) and output.is_complex():
        output = (output.real, output.imag)
    if not isinstance(output, tuple) or len(output) != 2:
        return None
    cosines, sines = output
    if not isinstance(cosines, Tensor) or cosines.dim() < 3 or cosines.shape != sines.shape:
        return None
    # Leading dimensions are batch items, or axes of positions that text does not have.
    return cosines.flatten(0, -3)[0], sines.flatten(0, -3)[0]


#: How one angle per pair of dimensions is read from an embedding's output.
_READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda table: table[..., : table.shape[-1] // 2],
    "neighbours": lambda table: table[..., ::2],
    "single": lambda table: table,
}


@dataclass(frozen=True)
class LayerRotation:
    """How one layer turns its keys.

    Parameters
    ----------
    call : int
        Which call of a rotary embedding gives the angles.
    reading : str
        Name of the reading of its output.
    interleaved : bool
        Pairs are neighbours (2i, 2i + 1), otherwise (i, i + half).
    at_end : bool
        The last dimensions of a head are turned, otherwise the first.
    """

    call: int
    reading: str
    interleaved: bool
    at_end: bool

    def turn(self, keys: Tensor, old: Angles, new: Angles) -> Tensor | None:
        """Return keys ``(kv_heads, length, head_dim)`` moved from old to new angles, in fp32.

        None where the angles do not fit the keys.
        """
        read = _READINGS[self.reading]
        (old_cos, old_sin), (new_cos, new_sin) = (
            (read(cosines).to(keys.device), read(sines).to(keys.device))
            for cosines, sines in (old, new)
        )
        width = 2 * old_cos.shape[-1]
        if width > keys.shape[-1]:
            return None
        # Scaled embeddings (yarn) carry their factor in both tables.
        norm = old_cos.square() + old_sin.square()
        cosines = (new_cos * old_cos + new_sin * old_sin) / norm
        sines = (new_sin * old_cos - new_cos * old_sin) / norm
        turned = keys.to(torch.promote_types(keys.dtype, torch.float32), copy=True)
        part = turned[..., -width:] if self.at_end else turned[..., :width]
        if self.interleaved:
            one, other = part[..., ::2], part[..., 1::2]
        else:
            one, other = part[..., : width // 2], part[..., width // 2 :]
        first = one * cosines - other * sines
        other.copy_(other * cosines + one * sines)
        one.copy_(first)
        return turned


class KeyRotation:
    """Moves cached keys of a model to other positions.

    Parameters
    ----------
    model : PreTrainedModel
        A model that APE attention is attached to.
    info : ModelInfo
        What :func:`~ape_integrations.core.model.attach` returned.
    encoder : ContextEncoder
        The model's encoder.

    Raises
    ------
    ConfigError
        The model's keys do not follow their positions by a rotation that could be found.
    """

    def __init__(self, model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder) -> None:
        limit = min(info.max_positions or _DISTANCE, _DISTANCE)
        near, far = 1, max(limit - 1, 2)
        before, self._calls = _observe(model, info, encoder, near)
        after, _ = _observe(model, info, encoder, far)
        self.layers = self._find(before, after, near, far)
        if None in self.layers:
            raise ConfigError(
                f"The keys of {type(model).__name__} cannot be moved to other positions (layer "
                f"{self.layers.index(None)} does not rotate them in a known way), which "
                'recompute_ratio and context_positions="sequential" need. '
                'Use recompute_ratio=0 and context_positions="shared".'
            )

    def _find(
        self, before: list[Tensor], after: list[Tensor], near: int, far: int
    ) -> list[LayerRotation | str | None]:
        """Return per layer its rotation, "none" for no rotation at all, None where nothing fits."""
        angles = [
            [
                call.angles(torch.full((_TOKENS,), position, device="cpu"))
                for position in (near, far)
            ]
            for call in self._calls
        ]
        candidates = [
            LayerRotation(*choice)
            for choice in itertools.product(
                range(len(angles)), _READINGS, (False, True), (False, True)
            )
        ]
        found: list[LayerRotation | str | None] = []
        for old, new in zip(before, after, strict=True):
            errors: dict[LayerRotation | str, float] = {"none": _error(old.float(), new)}
            for candidate in candidates:
                tables = angles[candidate.call]
                if tables[0] is None or tables[1] is None:
                    continue
                turned = candidate.turn(old, tables[0], tables[1])
                if turned is not None:
                    errors[candidate] = _error(turned, new)
            best = min(errors, key=lambda name: errors[name])
            found.append(best if errors[best] <= _TOLERANCE[new.element_size()] else None)
        return found

    def move(self, keys: Sequence[Tensor], old: Tensor, new: Tensor) -> None:
        """Move keys in place.

        Parameters
        ----------
        keys : sequence of Tensor
            Per layer ``(kv_heads, length, head_dim)``, rotated for the old positions.
        old, new : Tensor
            Positions, ``(length,)``.
        """
        for start in range(0, len(old), _BLOCK):
            block = slice(start, start + _BLOCK)
            tables: dict[int, tuple[Angles, Angles]] = {}
            for states, rotation in zip(keys, self.layers, strict=True):
                if not isinstance(rotation, LayerRotation):
                    continue
                if rotation.call not in tables:
                    call = self._calls[rotation.call]
                    before, after = call.angles(old[block]), call.angles(new[block])
                    assert before is not None and after is not None
                    tables[rotation.call] = before, after
                turned = rotation.turn(states[:, block], *tables[rotation.call])
                assert turned is not None
                states[:, block] = turned.to(states.dtype)


def _error(keys: Tensor, expected: Tensor) -> float:
    distance = (keys.double() - expected.double()).norm()
    return float(distance / expected.double().norm().clamp_min(1e-9))


@torch.no_grad()
def _observe(
    model: PreTrainedModel, info: ModelInfo, encoder: ContextEncoder, position: int
) -> tuple[list[Tensor], list[_Call]]:
    """Return keys ``(kv_heads, tokens, head_dim)`` of lone tokens at a position, and the calls.

    A lone token attends to nothing but itself, so that its position shows in its keys' rotation
    alone, in every layer.
    """
    calls: list[_Call] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _angles(output) is not None:
            calls.append(_Call(module, args, kwargs))

    hooks = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if _is_rotary(module)
    ]
    cache = APECache(ContextLayout(0, ()), encoder.empty_prefix(), tail_capacity=1)
    ids = (torch.arange(_TOKENS, device=info.input_device)[:, None] * 7 + 3) % (
        embeddings(model).shape[0]
    )
    try:
        model(
            input_ids=ids,
            position_ids=torch.full_like(ids, position),
            past_key_values=cache,
            use_cache=True,
            **last_logits_only(model),
        )
    finally:
        for hook in hooks:
            hook.remove()
    keys = [
        torch.cat([cache.tail(layer, token, 1)[0] for token in range(_TOKENS)], dim=1)
        for layer in range(len(cache.layers))
    ]
    return keys, calls


def _is_rotary(module: nn.Module) -> bool:
    return "rotary" in type(module).__name__.lower() or any(
        "inv_freq" in name for name, _ in module.named_buffers(recurse=False)
    )
