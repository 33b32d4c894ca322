"""What every store of key/value states offers, and the types it speaks in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ape_integrations.errors import ConfigError
from ape_integrations.pages import fresh_memory

Destination = Sequence[tuple[Tensor, Tensor]]
"""Per layer key and value slices on the CPU, ``(kv_heads, length, head_dim)``, heads contiguous."""


@dataclass(frozen=True)
class LayerSpec:
    """Shapes of one layer's states, without the length.

    Parameters
    ----------
    key_shape : tuple of int
        ``(kv_heads, head_dim)`` of the key states.
    value_shape : tuple of int
        ``(kv_heads, head_dim)`` of the value states.
    """

    key_shape: tuple[int, int]
    value_shape: tuple[int, int]


@dataclass(frozen=True)
class KVSpec:
    """What a reader expects of an entry; an entry that differs in anything is a miss.

    Parameters
    ----------
    num_tokens : int
        Length of the context in tokens.
    dtype : torch.dtype
        The dtype in which the model computes with the states.
    layers : tuple of LayerSpec
        Shapes of every layer, first to last.
    """

    num_tokens: int
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]

    @property
    def nbytes(self) -> int:
        """Size of the unquantised states in bytes."""
        per_token = sum(
            layer.key_shape[0] * layer.key_shape[1] + layer.value_shape[0] * layer.value_shape[1]
            for layer in self.layers
        )
        return self.num_tokens * per_token * self.dtype.itemsize

    def allocate(self) -> list[tuple[Tensor, Tensor]]:
        """Return fresh CPU memory that `KVStore.load` can fill.

        Returns
        -------
        list of tuple of Tensor
            Per layer key and value tensors ``(kv_heads, length, head_dim)``, views into one
            memory mapping, which goes back to the system when the last of them is freed.
        """
        # The allocator would keep blocks of this size for itself after they are freed.
        return split_flat(fresh_memory(self.nbytes).view(self.dtype), self)


def split_flat(flat: Tensor, spec: KVSpec) -> list[tuple[Tensor, Tensor]]:
    """View one flat buffer as the layers of an entry.

    Parameters
    ----------
    flat : Tensor
        One-dimensional, of `spec.dtype`, at least ``spec.nbytes`` bytes long.
    spec : KVSpec
        The shapes to cut it into.

    Returns
    -------
    list of tuple of Tensor
        Per layer key and value views ``(kv_heads, length, head_dim)``.
    """
    offset = 0
    tensors: list[Tensor] = []
    for layer in spec.layers:
        for heads, dim in (layer.key_shape, layer.value_shape):
            size = spec.num_tokens * heads * dim
            tensors.append(flat[offset : offset + size].view(heads, spec.num_tokens, dim))
            offset += size
    return list(zip(tensors[::2], tensors[1::2], strict=True))


class KVStates:
    """Immutable key/value states of one context.

    The tensors belong to this object from now on: whoever made them must not write to them again.

    Parameters
    ----------
    keys : sequence of Tensor
        Per layer the key states ``(kv_heads, length, head_dim)`` on the CPU.
    values : sequence of Tensor
        Per layer the value states ``(kv_heads, length, head_dim)`` on the CPU. Heads and
        dimensions may differ between layers and between keys and values.

    Raises
    ------
    ConfigError
        If layers, lengths, dtypes or devices do not fit together.
    """

    __slots__ = ("keys", "spec", "values")

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    spec: KVSpec

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        if not keys or len(keys) != len(values):
            raise ConfigError(
                f"KV states need one key and one value tensor per layer, got {len(keys)} keys"
                f" and {len(values)} values."
            )
        first = keys[0]
        for tensor in (*keys, *values):
            if tensor.dim() != 3 or tensor.device.type != "cpu":
                raise ConfigError(
                    "KV states are CPU tensors of shape (kv_heads, length, head_dim), got"
                    f" {tuple(tensor.shape)} on {tensor.device}."
                )
            if tensor.shape[1] != first.shape[1] or tensor.dtype != first.dtype:
                raise ConfigError("All layers of KV states share one length and one dtype.")
        if first.shape[1] == 0 or not first.dtype.is_floating_point:
            raise ConfigError("KV states hold at least one token and are floating point.")
        object.__setattr__(self, "keys", tuple(map(_heads_contiguous, keys)))
        object.__setattr__(self, "values", tuple(map(_heads_contiguous, values)))
        layers = tuple(
            LayerSpec((k.shape[0], k.shape[2]), (v.shape[0], v.shape[2]))
            for k, v in zip(keys, values, strict=True)
        )
        object.__setattr__(self, "spec", KVSpec(first.shape[1], first.dtype, layers))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("KVStates is immutable")

    def __repr__(self) -> str:
        return (
            f"KVStates(num_tokens={self.num_tokens}, layers={len(self.keys)},"
            f" dtype={self.spec.dtype}, nbytes={self.nbytes})"
        )

    @property
    def num_tokens(self) -> int:
        """Length of the context in tokens."""
        return self.spec.num_tokens

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.spec.nbytes

    def copy(self) -> KVStates:
        """Return equal states in one memory mapping of their own.

        Views into a larger batch keep the whole batch alive; the copy does not.
        """
        destination = self.spec.allocate()
        copy_layers(self, destination)
        return from_layers(destination)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer key and value tensors, for reading."""
        return list(zip(self.keys, self.values, strict=True))


def heads_are_contiguous(states: Tensor) -> bool:
    """Tell whether each head's rows of ``(kv_heads, length, head_dim)`` follow each other."""
    return states[0].is_contiguous()


def _heads_contiguous(states: Tensor) -> Tensor:
    states = states.detach()
    return states if heads_are_contiguous(states) else states.contiguous()


def from_layers(layers: Destination) -> KVStates:
    """Take filled memory, which nobody writes to from now on, as states."""
    return KVStates([key for key, _ in layers], [value for _, value in layers])


def copy_layers(states: KVStates, destination: Destination) -> None:
    """Copy states into memory of the same shapes and dtype."""
    for source, target in zip(states.layers, destination, strict=True):
        target[0].copy_(source[0])
        target[1].copy_(source[1])


@dataclass(frozen=True)
class TagStats:
    """What a store holds for one tag (one model).

    Parameters
    ----------
    entries, bytes, hits : int
        Number of entries, their size, and how often they were loaded since they were stored.
    """

    entries: int = 0
    bytes: int = 0
    hits: int = 0


@dataclass(frozen=True)
class StoreStats:
    """Figures of a store.

    Parameters
    ----------
    entries, bytes : int
        What is stored now.
    size_limit : int or None
        Bytes that the entries may take together; None where there is no limit.
    hits, misses : int
        Loads that succeeded and loads that did not. A disk store keeps both across processes.
    evictions, corrupted, put_failures : int
        Entries given up for room, entries dropped because they were bad, states not stored.
    oldest, newest : float or None
        Seconds since the epoch at which the oldest and newest entry were stored.
    tags : mapping of str to TagStats
        The same by tag.
    tiers : tuple of StoreStats
        The figures of each tier of a tiered store, fastest first.
    """

    entries: int = 0
    bytes: int = 0
    size_limit: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    corrupted: int = 0
    put_failures: int = 0
    oldest: float | None = None
    newest: float | None = None
    tags: Mapping[str, TagStats] = field(default_factory=dict)
    tiers: tuple[StoreStats, ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of loads that were hits, 0 where nothing was asked."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


@runtime_checkable
class KVStore(Protocol):
    """Key/value states by content hash.

    Every method is safe to call from many threads. A store never raises for a bad entry or a
    fault of its medium: such an entry is a miss, and states that cannot be stored are not stored.
    """

    def contains(self, key: str) -> bool:
        """Tell whether `key` is stored, without reading it."""
        ...

    def load(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        """Read an entry into memory that the caller owns.

        Parameters
        ----------
        key : str
            Content hash of the context under its prefix and model.
        spec : KVSpec
            What the entry must be.
        destination : sequence of tuple of Tensor
            Per layer key and value slices ``(kv_heads, length, head_dim)`` on the CPU, each head
            contiguous, of `spec`'s shapes and dtype.

        Returns
        -------
        int or None
            Bytes read; None is a miss (absent, damaged, of another shape, unreadable), after
            which the content of `destination` is undefined.

        Raises
        ------
        ConfigError
            If `destination` does not fit `spec`.
        """
        ...

    def get(self, key: str, spec: KVSpec) -> KVStates | None:
        """Load an entry into fresh memory, arguments as for `load`; None is a miss."""
        ...

    def put(self, key: str, states: KVStates, *, tag: str = "") -> bool:
        """Store the states of one context.

        Parameters
        ----------
        key : str
            Content hash; see `load`.
        states : KVStates
            The states. The store keeps no reference that could change later.
        tag : str
            Name of the model, for `stats` and pruning.

        Returns
        -------
        bool
            False where they were not stored (full disk, too large, no room beside pinned entries).
        """
        ...

    def pin(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these entries from being evicted inside a ``with`` block."""
        ...

    def encoding_lock(
        self, keys: str | Iterable[str], timeout: float = 0.0
    ) -> AbstractContextManager[frozenset[str]]:
        """Agree with others on who encodes missing contexts.

        Parameters
        ----------
        keys : str or iterable of str
            Contexts that the caller misses.
        timeout : float
            Seconds to wait, in total, for keys that somebody else is encoding now.

        Returns
        -------
        context manager of frozenset of str
            The keys that the caller holds inside the block. Look a held key up once more before
            encoding it: its former holder may have stored it. A key that is not held is being
            encoded elsewhere; after the caller's patience has run out it encodes it as well.
        """
        ...

    def delete(self, key: str) -> bool:
        """Remove an entry; False where there was none. StoreError where that cannot be done."""
        ...

    def clear(self) -> int:
        """Remove all entries and return their number. StoreError where that cannot be done."""
        ...

    def stats(self) -> StoreStats:
        """Return the store's figures."""
        ...

    def flush(self) -> None:
        """Wait until everything put so far has reached the slowest tier."""
        ...

    def close(self) -> None:
        """Flush and release files and connections. Calling it again does nothing."""
        ...


def check_destination(spec: KVSpec, destination: Destination) -> None:
    """Raise ConfigError unless `destination` can take an entry of `spec`.

    Parameters
    ----------
    spec : KVSpec
        The entry's shapes and dtype.
    destination : sequence of tuple of Tensor
        Per layer key and value slices.
    """
    if len(destination) != len(spec.layers):
        raise ConfigError(f"{len(destination)} layers of memory for {len(spec.layers)} layers.")
    for layer, (key, value) in zip(spec.layers, destination, strict=True):
        for tensor, (heads, dim) in ((key, layer.key_shape), (value, layer.value_shape)):
            if (
                tensor.shape != (heads, spec.num_tokens, dim)
                or tensor.dtype != spec.dtype
                or tensor.device.type != "cpu"
                or not heads_are_contiguous(tensor)
            ):
                raise ConfigError(
                    f"Memory to load into must be {spec.dtype} of shape"
                    f" {(heads, spec.num_tokens, dim)}, each head contiguous, on the CPU, got"
                    f" {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}."
                )


_Store = TypeVar("_Store", bound=KVStore)


class LoadsByGet:
    """What every store shares: `get`, ``in`` and the ``with`` statement."""

    def get(self: KVStore, key: str, spec: KVSpec) -> KVStates | None:
        """Load an entry into fresh memory, arguments as for `load`; None is a miss."""
        try:
            destination = spec.allocate()
        except (OSError, MemoryError):  # no memory is left
            return None
        if self.load(key, spec, destination) is None:
            return None
        return from_layers(destination)

    def __contains__(self: KVStore, key: str) -> bool:
        return self.contains(key)

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self: KVStore, *exc_info: object) -> None:
        self.close()
