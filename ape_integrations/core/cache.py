"""APECache: a transformers cache whose contexts stay fixed while the rest grows.

Layout: states are kept head-major, ``(kv_heads, length, head_dim)``, as kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ape_integrations.core.attention import Partition, PartitionedStates
from ape_integrations.core.compiled import CompilableCache
from ape_integrations.core.transfer import Arrival

#: Tokens that a tail has room for when it is first written, beyond what is written.
TAIL_ROOM = 256


@dataclass(frozen=True)
class ContextLayout:
    """Where the contexts of one prompt stand.

    Parameters
    ----------
    prefix_length : int
        Tokens of the shared prefix; every context starts at this position.
    lengths : tuple of int
        Tokens of each context, in the order of the buffer.
    sequential : bool
        Each context starts behind the one before it instead.
    """

    prefix_length: int
    lengths: tuple[int, ...]
    sequential: bool = False

    @property
    def total(self) -> int:
        """Context tokens in the buffer."""
        return sum(self.lengths)

    @property
    def query_position(self) -> int:
        """Position of the first query token: right after the longest or the last context."""
        length = self.total if self.sequential else max(self.lengths, default=0)
        return self.prefix_length + length

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of every context token, ``(total,)``."""
        if self.sequential:
            return torch.arange(self.total, device=device) + self.prefix_length
        pieces = [torch.arange(length, device=device) for length in self.lengths]
        return torch.cat(pieces) + self.prefix_length


class APECacheLayer(CacheLayerMixin):
    """Key and value states of one layer: shared prefix, contexts, and a tail that grows.

    Parameters
    ----------
    layout : ContextLayout
        Prefix length and context lengths.
    prefix : tuple of Tensor
        Keys and values of the prefix, each ``(kv_heads, prefix_length, head_dim)``; shared by
        the batch, never written.
    contexts : tuple of Tensor, optional
        Keys and values of all contexts, each ``(kv_heads, total, head_dim)``; shared by the
        batch, never written.
    temperature, scale : float
        T and S.
    tail_capacity : int, optional
        Tokens to allocate the tail for, where the caller knows.
    padding : sequence of int
        Per batch item, tokens at the start of the tail that are padding; empty for none.
    arrival : Arrival, optional
        What the layer waits for before its contexts are first read.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        layout: ContextLayout,
        prefix: tuple[Tensor, Tensor],
        contexts: tuple[Tensor, Tensor] | None = None,
        temperature: float = 1.0,
        scale: float = 1.0,
        tail_capacity: int | None = None,
        padding: Sequence[int] = (),
        arrival: Arrival | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self._arrival = arrival
        self._tail_capacity = tail_capacity
        self._padding = torch.tensor(padding, device="cpu") if any(padding) else None
        self.temperature = temperature
        self.scale = scale
        self.length = 0
        self._start = layout.query_position
        self._prefix = self._fixed(prefix, self._prefix_positions, 0, layout.prefix_length - 1)
        self._lead = 0  # tokens of the prefix that stand before the tail
        self._contexts = contexts and self._fixed(
            contexts, self._context_positions, layout.prefix_length, layout.query_position - 1
        )

    @staticmethod
    def _fixed(
        states: tuple[Tensor, Tensor], positions: Callable[[], Tensor], first: int, last: int
    ) -> Partition:
        keys, values = (tensor.unsqueeze(0) for tensor in states)
        return Partition(keys, values, positions, first, last)

    def _prefix_positions(self) -> Tensor:
        return torch.arange(self.layout.prefix_length, device=self._prefix.keys.device)

    def _context_positions(self) -> Tensor:
        assert self._contexts is not None
        return self.layout.positions(self._contexts.keys.device)

    def _tail(self, start: int, end: int, *, causal: bool) -> Partition:
        """Return tokens ``start`` to ``end`` of the tail as a partition."""
        offset = self.layout.query_position
        first, last = offset + start, offset + end - 1
        device = self.keys.device
        return Partition(
            self.keys[:, :, self._lead + start : self._lead + end],
            self.values[:, :, self._lead + start : self._lead + end],
            lambda: torch.arange(first, last + 1, device=device),
            first,
            last,
            causal,
            None if self._padding is None else self._visible(start, end, self._padding),
        )

    def _before(self, end: int) -> list[Partition]:
        """Return the prefix and the first ``end`` tokens of the tail."""
        tail = self._tail(0, end, causal=False)
        if not self._lead:
            return [self._prefix, tail]
        if not end:
            return [self._prefix]
        return [
            Partition(
                self.keys[:, :, : self._lead + end],
                self.values[:, :, : self._lead + end],
                lambda: torch.cat([self._prefix_positions(), tail.positions()]),
                0,
                tail.last_position,
            )
        ]

    @staticmethod
    def _visible(start: int, end: int, padding: Tensor) -> Tensor:
        """Return which tail tokens are no padding, ``(batch, end - start)``."""
        return torch.arange(start, end, device=padding.device)[None] >= padding[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the tail for states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self._tail_capacity or key_states.shape[2] + TAIL_ROOM
        if key_states.shape[0] == 1 and self._padding is None:
            # A copy of the prefix before the tail lets both be read at once. A batch shares the
            # prefix instead: a copy for each of its items could take more than all contexts do.
            self._lead = self.layout.prefix_length
        self.keys = self._empty(key_states, self._lead + capacity)
        self.values = self._empty(value_states, self._lead + capacity)
        if self._lead:
            self.keys[:, :, : self._lead] = self._prefix.keys
            self.values[:, :, : self._lead] = self._prefix.values
        if self._padding is not None:
            self._padding = self._padding.to(self.device)
        self.is_initialized = True

    @staticmethod
    def _empty(states: Tensor, capacity: int) -> Tensor:
        batch, heads, _, head_dim = states.shape
        return states.new_empty(batch, heads, capacity, head_dim)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[PartitionedStates, PartitionedStates]:
        """Append new tokens and return everything that they may read.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``(batch, kv_heads, length, head_dim)``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._arrival is not None:
            self._arrival.wait()
            self._arrival = None
        start, end = self.length, self.length + key_states.shape[2]
        self._reserve(end)
        self.keys[:, :, self._lead + start : self._lead + end] = key_states
        self.values[:, :, self._lead + start : self._lead + end] = value_states
        self.length = end
        if end - start == 1:
            # A single token sees the whole tail, itself included.
            rest = self._before(end)
        else:
            rest = [*self._before(start), self._tail(start, end, causal=True)]
        states = PartitionedStates(
            rest,
            self._contexts,
            self.layout.query_position + start,
            self.temperature,
            self.scale,
            self._padding,
        )
        return states, states

    def _reserve(self, length: int) -> None:
        """Make room for ``length`` tail tokens, doubling so that appending stays cheap."""
        room, used = self.keys.shape[2], self._lead + self.length
        if self._lead + length <= room:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old, max(self._lead + length, 2 * room))
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def tail(self) -> tuple[Tensor, Tensor]:
        """Return the tail's keys and values, ``(batch, kv_heads, length, head_dim)``."""
        end = self._lead + self.length
        return self.keys[:, :, self._lead : end], self.values[:, :, self._lead : end]

    def get_seq_length(self) -> int:
        """Return the logical length: prefix, longest context and tail."""
        return self._start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Ask for the smallest mask: partitions, not masks, say what is visible."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        """Return -1: the tail grows without limit."""
        return -1

    def offload(self) -> None:
        """Keep the states where they are."""

    def prefetch(self) -> None:
        """Keep the states where they are."""

    def reset(self) -> None:
        """Forget the tail; prefix and contexts stay."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of the tail."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"crop() takes minus the number of tokens to remove, at most {self.length} here; "
                f"got {tokens_to_remove}."
            )
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the tail for beam search; prefix and contexts are shared by all beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the tail ``repeats`` times along the batch."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch items of the tail."""
        if self.is_initialized:
            self.keys = self.keys[indices.to(self.keys.device)]
            self.values = self.values[indices.to(self.values.device)]


class APECache(CompilableCache):
    """Cache of one prompt for ``model.generate()`` or ``model.forward()``.

    It already holds prefix and contexts, so pass ids and a mask of the full logical length
    (``layout.query_position`` tokens that stand for prefix and contexts, then the query).

    Parameters
    ----------
    layout : ContextLayout
        Prefix length and context lengths.
    prefix : sequence of (Tensor, Tensor)
        Per layer, keys and values ``(kv_heads, prefix_length, head_dim)``.
    contexts : sequence of (Tensor, Tensor), optional
        Per layer, keys and values ``(kv_heads, total, head_dim)``.
    temperature, scale : float
        T and S.
    tail_capacity : int, optional
        Tokens to allocate the tail for, where the caller knows.
    padding : sequence of int
        Per batch item, tokens at the start of the tail that are padding; empty for none.
    name : tuple of str
        Store keys of the contexts, which name prefix and contexts together.
    arrivals : sequence of Arrival or None
        Per layer, what it waits for before its contexts are first read; empty for none.
    """

    def __init__(
        self,
        layout: ContextLayout,
        prefix: Sequence[tuple[Tensor, Tensor]],
        contexts: Sequence[tuple[Tensor, Tensor]] | None = None,
        temperature: float = 1.0,
        scale: float = 1.0,
        tail_capacity: int | None = None,
        padding: Sequence[int] = (),
        name: tuple[str, ...] = (),
        arrivals: Sequence[Arrival | None] = (),
    ) -> None:
        layers: list[Any] = [
            APECacheLayer(
                layout,
                states,
                None if contexts is None else contexts[index],
                temperature,
                scale,
                tail_capacity,
                padding,
                arrivals[index] if arrivals else None,
            )
            for index, states in enumerate(prefix)
        ]
        super().__init__(layers)
        self.layout = layout
        self.name = name

    def tail_states(self) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Return per layer the tail's ``(batch, heads, length, dim)`` states, and its length."""
        layers: list[Any] = self.layers
        return [layer.tail() for layer in layers], layers[0].length

    def restore_tail(self, states: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Start the tail with a copy of the first ``length`` tokens of another one's states."""
        layers: list[Any] = self.layers
        for layer, (keys, values) in zip(layers, states, strict=True):
            layer.update(keys[:, :, :length], values[:, :, :length])

    def tail(self, layer_idx: int, item: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the first ``length`` tail tokens of one batch item, ``(heads, length, dim)``."""
        layer: Any = self.layers[layer_idx]
        keys, values = layer.tail()
        return keys[item, :, :length], values[item, :, :length]
