"""One entry as bytes: a safetensors file whose header follows entirely from what it holds.

Key, shapes, dtypes and format version fix every byte of the header except the checksum. A reader
therefore parses nothing: it computes the header that a good entry must have, compares, and reads
the tensors straight into the memory where they are wanted. The checksum covers header and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from ape_integrations.store.base import Destination, KVSpec, KVStates, LayerSpec
from ape_integrations.store.quantization import (
    dequantize_into,
    is_scaled,
    quantize,
    scale_shape,
    stored_dtype,
)

FORMAT_VERSION = 2
"""Raised whenever the bytes of an entry change their meaning."""

_ALIGNMENT = 64
_NO_CHECKSUM = b"0" * 32
_CHECKSUM_AT = 8 + len(b'{"__metadata__":{"checksum":"')
_CHECKSUM = slice(_CHECKSUM_AT, _CHECKSUM_AT + len(_NO_CHECKSUM))
# Small enough that bytes are hashed while they are still in the processor's cache, large enough
# that system calls do not matter.
_PIECE = 1 << 20

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}


class EntryError(Exception):
    """An entry is not what it must be; the message says in which respect."""


class Source(Protocol):
    """Where the bytes of an entry come from, front to back."""

    nbytes: int

    def readinto(self, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers with the next bytes, or raise EntryError if there are too few."""
        ...


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@lru_cache(maxsize=4096)
def _layout(spec: KVSpec, kv_dtype: str) -> tuple[_Tensor, ...]:
    """Return the tensors of an entry in the order in which they are written."""
    dtype = stored_dtype(kv_dtype, spec.dtype)
    tensors = []
    for index, layer in enumerate(spec.layers):
        for kind, (heads, dim) in (("key", layer.key_shape), ("value", layer.value_shape)):
            name, full = f"layer.{index:03d}.{kind}", (heads, spec.num_tokens, dim)
            tensors.append(_Tensor(name, dtype, full))
            if is_scaled(dtype) and dtype != spec.dtype:
                scales = scale_shape(full, is_key=kind == "key")
                tensors.append(_Tensor(f"{name}.scale", torch.float32, scales))
    return tuple(tensors)


@lru_cache(maxsize=4096)
def _data_nbytes(spec: KVSpec, kv_dtype: str) -> int:
    return sum(tensor.nbytes for tensor in _layout(spec, kv_dtype))


@lru_cache(maxsize=4096)
def _tensor_table(spec: KVSpec, kv_dtype: str) -> str:
    """Return the part of the header that names the tensors."""
    rows, offset = [], 0
    for tensor in _layout(spec, kv_dtype):
        end = offset + tensor.nbytes
        row = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        rows.append(f'"{tensor.name}":{json.dumps(row, separators=(",", ":"))}')
        offset = end
    return ",".join(rows)


def _header(key: str, spec: KVSpec, kv_dtype: str) -> bytearray:
    """Return the header of an entry, its checksum still zeros."""
    metadata = {
        "checksum": _NO_CHECKSUM.decode(),
        "format": str(FORMAT_VERSION),
        "key": key,
        "num_tokens": str(spec.num_tokens),
        "dtype": _DTYPE_NAMES[spec.dtype],
        "kv_dtype": kv_dtype,
    }
    text = (
        f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))},'
        f"{_tensor_table(spec, kv_dtype)}}}"
    )
    padding = -(8 + len(text)) % _ALIGNMENT
    body = text.encode("ascii") + b" " * padding
    return bytearray(len(body).to_bytes(8, "little") + body)


def raw_bytes(tensor: Tensor) -> list[memoryview]:
    """View a CPU tensor's memory as writable bytes, without a copy; a piece per head if need be."""
    if tensor.is_contiguous():
        return [memoryview(tensor.view(-1).view(torch.uint8).numpy().data)]
    heads = tensor.view(torch.uint8).numpy()
    return [memoryview(head.reshape(-1).data) for head in heads]


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Call it by its name where torch says in a RuntimeError that there is no memory left."""
    try:
        yield
    except RuntimeError as error:
        raise MemoryError(str(error)) from error


@_memory_errors()
def serialize(key: str, states: KVStates, kv_dtype: str = "auto") -> list[memoryview]:
    """Turn states into the bytes of an entry, without copying what need not change.

    Parameters
    ----------
    key : str
        The entry's key; a reader that asks for another key refuses the entry.
    states : KVStates
        The states to write.
    kv_dtype : str
        One of `quantization.KV_DTYPES`.

    Returns
    -------
    list of memoryview
        Header and tensors; together a valid safetensors file. Views into the states' memory.

    Raises
    ------
    ValueError
        If the states are not finite and `kv_dtype` needs scales.
    MemoryError
        If there is no memory for it.
    """
    dtype = stored_dtype(kv_dtype, states.spec.dtype)
    parts = [
        piece
        for layer in states.layers
        for tensor, is_key in zip(layer, (True, False), strict=True)
        for part in quantize(tensor, dtype, is_key)
        for piece in raw_bytes(part)
    ]
    header = _header(key, states.spec, kv_dtype)
    digest = xxhash.xxh3_128(header)
    for part in parts:
        digest.update(part)
    header[_CHECKSUM] = digest.hexdigest().encode()
    return [memoryview(header), *parts]


@_memory_errors()
def deserialize(
    source: Source, key: str, spec: KVSpec, destination: Destination, kv_dtype: str = "auto"
) -> int:
    """Read an entry into memory of the caller and verify every byte of it.

    Parameters
    ----------
    source : Source
        The entry's bytes.
    key : str
        The key under which it was written.
    spec : KVSpec
        Shapes and dtype that it must have.
    destination : sequence of tuple of Tensor
        Per layer key and value slices ``(kv_heads, length, head_dim)``, checked by the caller.
        Undefined after an error.
    kv_dtype : str
        The `kv_dtype` with which it was written.

    Returns
    -------
    int
        Bytes read.

    Raises
    ------
    EntryError
        If the entry differs in size, header or checksum.
    OSError
        If the source cannot be read.
    MemoryError
        If there is no memory to undo a quantisation in.
    """
    header = _header(key, spec, kv_dtype)
    nbytes = len(header) + _data_nbytes(spec, kv_dtype)
    if source.nbytes != nbytes:
        raise EntryError(f"has {source.nbytes} bytes instead of {nbytes}")
    checksum = _read_header(source, header)
    digest = xxhash.xxh3_128(header)
    targets = [tensor for layer in destination for tensor in layer]
    if stored_dtype(kv_dtype, spec.dtype) == spec.dtype:
        _read(source, targets, digest)
    else:
        _read_quantized(source, targets, _layout(spec, kv_dtype), digest)
    if digest.hexdigest().encode() != checksum:
        raise EntryError("fails its checksum")
    return nbytes


def verify(source: Source) -> tuple[str, KVSpec, str]:
    """Check an entry of which nothing is known.

    Parameters
    ----------
    source : Source
        The entry's bytes.

    Returns
    -------
    tuple
        Key, spec and `kv_dtype` of the entry.

    Raises
    ------
    EntryError
        If it is not a good entry of this format version.
    OSError
        If the source cannot be read.
    """
    key, spec, kv_dtype, checksum = _read_unknown_header(source)
    header = _header(key, spec, kv_dtype)
    digest = xxhash.xxh3_128(header)
    remaining, scratch = source.nbytes - len(header), memoryview(bytearray(_PIECE))
    while remaining:
        piece = scratch[: min(remaining, len(scratch))]
        source.readinto([piece])
        digest.update(piece)
        remaining -= len(piece)
    if digest.hexdigest().encode() != checksum:
        raise EntryError("fails its checksum")
    return key, spec, kv_dtype


def read_key(source: Source) -> str:
    """Return the key in an entry's header, without reading its tensors.

    Raises
    ------
    EntryError
        If it does not begin like an entry of this format version, or has another size.
    OSError
        If the source cannot be read.
    """
    return _read_unknown_header(source)[0]


def _read_unknown_header(source: Source) -> tuple[str, KVSpec, str, bytes]:
    """Return key, spec, `kv_dtype` and checksum of an entry of which nothing is known."""
    prefix = bytearray(8)
    source.readinto([memoryview(prefix)])
    length = int.from_bytes(prefix, "little")
    if length + 8 > source.nbytes:
        raise EntryError(f"claims a header of {length} bytes in {source.nbytes}")
    body = bytearray(length)
    source.readinto([memoryview(body)])
    key, spec, kv_dtype = _parse(body)
    header = prefix + body
    checksum = bytes(header[_CHECKSUM])
    header[_CHECKSUM] = _NO_CHECKSUM
    if header != _header(key, spec, kv_dtype):
        raise EntryError("has a header that its contents do not call for")
    if source.nbytes != len(header) + _data_nbytes(spec, kv_dtype):
        raise EntryError(f"has {source.nbytes} bytes, not what its header calls for")
    return key, spec, kv_dtype, checksum


def _read_header(source: Source, expected: bytearray) -> bytes:
    """Return the checksum that the source's header holds, once the rest of it is as expected."""
    header = bytearray(len(expected))
    source.readinto([memoryview(header)])
    checksum = bytes(header[_CHECKSUM])
    header[_CHECKSUM] = _NO_CHECKSUM
    if header != expected:
        raise EntryError("has the header of another entry, shape, dtype or format version")
    return checksum


def _read(source: Source, tensors: Sequence[Tensor], digest: xxhash.xxh3_128) -> None:
    """Fill tensors from the source and hash what came."""
    for group in _pieces([piece for tensor in tensors for piece in raw_bytes(tensor)]):
        source.readinto(group)
        for piece in group:
            digest.update(piece)


def _read_quantized(
    source: Source, targets: Sequence[Tensor], layout: Sequence[_Tensor], digest: xxhash.xxh3_128
) -> None:
    """Fill tensors from their quantised form, one at a time so that little extra memory is used."""
    scratch: dict[_Tensor, Tensor] = {}
    width = len(layout) // len(targets)
    for index, target in enumerate(targets):
        stored = []
        for slot in layout[index * width : (index + 1) * width]:
            shared = _Tensor("", slot.dtype, slot.shape)
            if shared not in scratch:
                scratch[shared] = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
            stored.append(scratch[shared])
        _read(source, stored, digest)
        dequantize_into(target, tuple(stored))


def _pieces(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cut and group buffers so that a group has about `_PIECE` bytes."""
    group: list[memoryview] = []
    room = _PIECE
    for buffer in buffers:
        while len(buffer):
            group.append(buffer[:room])
            buffer, room = buffer[room:], room - len(group[-1])
            if room == 0:
                yield group
                group, room = [], _PIECE
    if group:
        yield group


def _parse(body: bytearray) -> tuple[str, KVSpec, str]:
    """Read key, spec and `kv_dtype` out of an untrusted header."""
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    try:
        header = json.loads(body.decode("ascii"))
        metadata = header["__metadata__"]
        layers: list[LayerSpec] = []
        while f"layer.{len(layers):03d}.key" in header:
            key_shape = header[f"layer.{len(layers):03d}.key"]["shape"]
            value_shape = header[f"layer.{len(layers):03d}.value"]["shape"]
            layers.append(LayerSpec(_heads_and_dim(key_shape), _heads_and_dim(value_shape)))
        spec = KVSpec(int(metadata["num_tokens"]), dtypes[metadata["dtype"]], tuple(layers))
        key, kv_dtype = metadata["key"], metadata["kv_dtype"]
        stored_dtype(kv_dtype, spec.dtype)
        if not isinstance(key, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EntryError("has a header that cannot be parsed") from None
    return key, spec, kv_dtype


def _heads_and_dim(shape: list[object]) -> tuple[int, int]:
    heads, _, dim = shape
    if type(heads) is not int or type(dim) is not int or heads < 1 or dim < 1:
        raise ValueError
    return heads, dim
