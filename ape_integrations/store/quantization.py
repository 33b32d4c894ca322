"""How states are written in fewer bytes than the model computes with.

Keys have a few channels that are large for every token, values do not: keys are therefore scaled
per channel over the context's tokens and values per token and head (the finding of KIVI,
arXiv 2402.02750). Scales are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ape_integrations.errors import ConfigError

_STORED: dict[str, torch.dtype | None] = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_SCALED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

KV_DTYPES = tuple(_STORED)
"""Accepted values of ``kv_dtype``; ``"auto"`` keeps the model's dtype, bit for bit."""


def check_kv_dtype(kv_dtype: str) -> str:
    """Return `kv_dtype`, or raise ConfigError if it is not one of `KV_DTYPES`."""
    if kv_dtype not in _STORED:
        raise ConfigError(f"kv_dtype={kv_dtype!r} is unknown; choose one of {', '.join(_STORED)}.")
    return kv_dtype


def stored_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype on disk of states that the model holds as `dtype`."""
    return _STORED[kv_dtype] or dtype


def is_scaled(dtype: torch.dtype) -> bool:
    """Tell whether tensors of this stored dtype come with scales."""
    return dtype in _SCALED


def scale_shape(shape: tuple[int, int, int], is_key: bool) -> tuple[int, ...]:
    """Shape of the scales of a ``(kv_heads, length, head_dim)`` tensor.

    Parameters
    ----------
    shape : tuple of int
        ``(kv_heads, length, head_dim)``.
    is_key : bool
        Keys are scaled per channel, values per token and head.

    Returns
    -------
    tuple of int
        ``(kv_heads, 1, head_dim)`` for keys, ``(kv_heads, length, 1)`` for values.
    """
    heads, length, dim = shape
    return (heads, 1, dim) if is_key else (heads, length, 1)


def quantize(states: Tensor, dtype: torch.dtype, is_key: bool) -> tuple[Tensor, ...]:
    """Turn states into what is stored.

    Parameters
    ----------
    states : Tensor
        ``(kv_heads, length, head_dim)``.
    dtype : torch.dtype
        The stored dtype.
    is_key : bool
        Keys are scaled per channel, values per token and head.

    Returns
    -------
    tuple of Tensor
        The stored tensor of the same shape, and its scales where the dtype has them.

    Raises
    ------
    ValueError
        If the states are not finite, so that no scale represents them.
    """
    if dtype == states.dtype:
        return (states,)
    if not is_scaled(dtype):
        return (_saturate(states.to(dtype)),)
    largest = states.float().abs().amax(dim=1 if is_key else 2, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("states that are not finite cannot be quantised")
    scale = (largest / _SCALED[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = states.float() / scale
    if dtype == torch.int8:
        scaled = scaled.round_().clamp_(-127, 127)
    else:
        scaled = scaled.clamp_(-_SCALED[dtype], _SCALED[dtype])
    return scaled.to(dtype), scale


def dequantize_into(destination: Tensor, stored: tuple[Tensor, ...]) -> None:
    """Undo `quantize` into memory of the caller.

    Parameters
    ----------
    destination : Tensor
        ``(kv_heads, length, head_dim)`` of the model's dtype.
    stored : tuple of Tensor
        What `quantize` returned.
    """
    if len(stored) == 1:
        destination.copy_(stored[0])
        if torch.finfo(stored[0].dtype).max > torch.finfo(destination.dtype).max:
            _saturate(destination)
        return
    values, scale = stored
    if values.dtype == torch.int8:
        torch.mul(values, scale, out=destination)
    else:
        torch.mul(values.to(torch.float32), scale, out=destination)


def _saturate(states: Tensor) -> Tensor:
    """Put the largest finite values in the place of what rounding made infinite, in place."""
    limit = torch.finfo(states.dtype)
    return states.clamp_(limit.min, limit.max)
