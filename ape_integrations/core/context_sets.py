"""Assembled contexts: the states of a prompt's contexts side by side, one buffer per layer.

Fresh memory is the slow part of assembling, so buffers are reused; and a set of contexts that was
just assembled is kept, because a chat asks about the same documents again.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ape_integrations.core.model import ModelInfo
from ape_integrations.core.transfer import Arrival, OpenLane, Transfer, cuda_lane
from ape_integrations.forks import forget_in_children
from ape_integrations.pages import fresh_memory

_ALIGNMENT = 64

Layers = list[tuple[Tensor, Tensor]]


@dataclass
class ContextSet:
    """States of several contexts, one after the other.

    Parameters
    ----------
    staging : list of (Tensor, Tensor)
        Per layer, keys and values ``(kv_heads, total, head_dim)`` in CPU memory.
    transfer : Transfer
        Brings them to the model's devices.
    layers : list of (Tensor, Tensor)
        The same on the model's devices; ``staging`` itself where that is the CPU.
    arrivals : list of Arrival or None
        Per layer, what to wait for before reading it; empty where all are there.
    """

    memory: Tensor
    staging: Layers
    transfer: Transfer
    layers: Layers = field(default_factory=list)
    arrivals: list[Arrival | None] = field(default_factory=list)
    users: int = 1
    ready: threading.Event = field(default_factory=threading.Event)

    def destination(self, start: int, length: int) -> Layers:
        """Return where one context's states go."""
        end = start + length
        return [(keys[:, start:end], values[:, start:end]) for keys, values in self.staging]

    def settle(self) -> None:
        """Wait until ``staging`` is read by no copy any more and may be written again."""
        for arrival in self.arrivals:
            if arrival is not None:
                arrival.settle()


class ContextSetPool:
    """Shares assembled sets between generations and keeps the latest within a byte budget.

    Parameters
    ----------
    info : ModelInfo
        Shapes, dtype and devices of the model's states.
    max_idle_bytes : int
        Memory of sets that nobody uses; the least recently used are given back first.
    open_lane : callable
        How states are copied to a device beside its compute.
    """

    def __init__(
        self, info: ModelInfo, max_idle_bytes: int, open_lane: OpenLane = cuda_lane
    ) -> None:
        self._info = info
        self._max_idle_bytes = max_idle_bytes
        self._sets: OrderedDict[tuple[str, ...], ContextSet] = OrderedDict()
        self.forget_other_threads()
        forget_in_children(self)
        self._spare: list[Tensor] = []
        self._open_lane = open_lane
        self._pinned = any(device.type == "cuda" for device in info.devices)

    def forget_other_threads(self) -> None:
        """Forget sets that other threads use or fill, which a forked process does not have."""
        self._lock = threading.Lock()
        idle = {name: kept for name, kept in self._sets.items() if not kept.users}
        self._sets = OrderedDict(idle)

    @property
    def max_idle_tokens(self) -> int:
        """Context tokens of the largest set that is kept for the next question."""
        return self._max_idle_bytes // self._info.spec(1).nbytes

    @contextmanager
    def borrow(
        self,
        keys: Sequence[str],
        total: int,
        fill: Callable[[ContextSet], None],
        finish: Callable[[Layers], None] | None = None,
    ) -> Iterator[tuple[ContextSet, bool]]:
        """Yield the set of these entries, and whether it stood ready.

        Parameters
        ----------
        keys : sequence of str
            Entry keys in the order of the buffer, and what else makes the set what it is.
        total : int
            Context tokens.
        fill : callable
            Writes the states into ``staging`` of a new set, and may tell its ``transfer`` how far
            it is. Whoever asks for the same set meanwhile waits for it.
        finish : callable, optional
            Changes the layers of a new set where they compute, in place: they are its own copy.
        """
        name = tuple(keys)
        context_set, owner = self._acquire(name, total)
        try:
            found = not owner
            if owner:
                self._fill(context_set, fill, finish)
            else:
                context_set.ready.wait()
                if not context_set.layers:
                    # Its owner failed; do the work alone, unshared.
                    with self._lock:
                        own = self._new(total)
                    self._release(name, context_set)
                    name, context_set, found = (), own, False
                    self._fill(context_set, fill, finish)
            yield context_set, found
        finally:
            self._release(name, context_set)

    def holds(self, keys: Sequence[str]) -> bool:
        """Whether the set of these entries, in the order of the buffer, stands assembled."""
        with self._lock:
            known = self._sets.get(tuple(keys))
            return known is not None and known.ready.is_set() and bool(known.layers)

    def _acquire(self, name: tuple[str, ...], total: int) -> tuple[ContextSet, bool]:
        with self._lock:
            known = self._sets.get(name)
            if known is not None:
                self._sets.move_to_end(name)
                known.users += 1
                return known, False
            made = self._sets[name] = self._new(total)
            return made, True

    def _fill(
        self,
        context_set: ContextSet,
        fill: Callable[[ContextSet], None],
        finish: Callable[[Layers], None] | None,
    ) -> None:
        try:
            fill(context_set)
            layers, context_set.arrivals = context_set.transfer.finish()
            if finish is not None:
                for arrival in context_set.arrivals:
                    if arrival is not None:
                        arrival.wait()
                finish(layers)
            context_set.layers = layers
        finally:
            context_set.ready.set()

    def _release(self, name: tuple[str, ...], context_set: ContextSet) -> None:
        with self._lock:
            context_set.users -= 1
            if not context_set.layers and self._sets.get(name) is context_set:
                del self._sets[name]
            self._trim()

    def _trim(self) -> None:
        idle = [name for name, kept in self._sets.items() if kept.users == 0]
        excess = sum(self._sets[name].memory.nbytes for name in idle) - self._max_idle_bytes
        for name in idle:
            if excess <= 0:
                break
            excess -= self._sets.pop(name).memory.nbytes

    def _new(self, total: int) -> ContextSet:
        """Carve the layers out of one piece of memory, taken from an idle set where one fits."""
        size = self._info.dtype.itemsize
        sizes = [
            _aligned(total * math.prod(shape) * size)
            for layer in self._info.layers
            for shape in (layer.key_shape, layer.value_shape)
        ]
        memory = self._reusable(sum(sizes))
        if memory is None:
            memory = self._fresh(sum(sizes))
        offset, views = 0, []
        for layer, spec in enumerate(self._info.layers):
            for shape, span in zip(
                (spec.key_shape, spec.value_shape), sizes[2 * layer :], strict=False
            ):
                length = total * math.prod(shape) * size
                view = memory[offset : offset + length].view(self._info.dtype)
                views.append(view.view(shape[0], total, shape[1]))
                offset += span
        staging = list(zip(views[::2], views[1::2], strict=True))
        return ContextSet(memory, staging, Transfer(staging, self._info.devices, self._open_lane))

    def _fresh(self, nbytes: int) -> Tensor:
        if self._pinned:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        return fresh_memory(nbytes)

    def _reusable(self, nbytes: int) -> Tensor | None:
        """Take memory that is large enough but not far too large, from spare or idle sets."""

        def fits(memory: Tensor) -> bool:
            return nbytes <= memory.nbytes <= 2 * nbytes

        for index, memory in enumerate(self._spare):
            if fits(memory):
                return self._spare.pop(index)
        if self._idle_bytes() + nbytes > self._max_idle_bytes:
            for name, kept in self._sets.items():
                if kept.users == 0 and fits(kept.memory):
                    kept.settle()
                    return self._sets.pop(name).memory
        return None

    def _idle_bytes(self) -> int:
        return sum(kept.memory.nbytes for kept in self._sets.values() if kept.users == 0)

    def clear(self, *, keep_memory: bool = False) -> None:
        """Forget all sets that nobody uses; keep their memory for the next sets, or give it back.

        Parameters
        ----------
        keep_memory : bool
            Keep the buffers.
        """
        with self._lock:
            idle = [name for name, kept in self._sets.items() if kept.users == 0]
            dropped = [self._sets.pop(name) for name in idle]
            if keep_memory:
                for context_set in dropped:
                    context_set.settle()
            self._spare = [kept.memory for kept in dropped] if keep_memory else []


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
