"""States behind the contexts, kept so that a chat's next turn reads only what is new."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ape_integrations.core.cache import APECache

#: Fewer common tokens than this are not worth copying.
_WORTHWHILE = 4

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Memory:
    """Memory that the tails of one generation share."""

    nbytes: int


@dataclass(frozen=True, eq=False)
class Tail:
    """Tokens behind one set of contexts and their states.

    Parameters
    ----------
    name : tuple of str
        The set of contexts, and what else the states depend on.
    ids : tuple of int
        Query and generated tokens whose states are kept.
    layers : list of (Tensor, Tensor)
        Per layer, keys and values ``(1, kv_heads, length, head_dim)``; never written again.
    memory : _Memory
        Where they lie.
    """

    name: tuple[str, ...]
    ids: tuple[int, ...]
    layers: Layers
    memory: _Memory

    def common(self, ids: Sequence[int]) -> int:
        """Return how many leading tokens ``ids`` shares with this tail."""
        count = 0
        for mine, other in zip(self.ids, ids, strict=False):
            if mine != other:
                break
            count += 1
        return count


class TailMemory:
    """The latest tails within a byte budget.

    A set of contexts may have several: many people ask about the same documents, each in a
    conversation of their own.

    Parameters
    ----------
    max_bytes : int
        Memory for tails; the least recently used are dropped first. 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tails: list[Tail] = []  # least recently used first

    def restore(
        self, name: tuple[str, ...], queries: Sequence[Sequence[int]], cache: APECache
    ) -> int:
        """Copy the states of known leading query tokens into ``cache``.

        At least one token of each query is left to read, because its logits are needed. Queries
        of a batch are padded to the left; as many tokens are left to read of all of them.

        Returns
        -------
        int
            Tokens restored, the padding of shorter queries included.
        """
        longest = max(map(len, queries))
        found = [self._best(name, query) for query in queries]
        left = max(
            max(len(query) - common, 1) for (_, common), query in zip(found, queries, strict=True)
        )
        count = longest - left
        if count < _WORTHWHILE:
            return 0
        padding = [longest - len(query) for query in queries]
        cache.restore_tail(_side_by_side([tail for tail, _ in found], padding, count), count)
        return count

    def _best(self, name: tuple[str, ...], query: Sequence[int]) -> tuple[Tail | None, int]:
        """Return the tail with the most of a query's leading tokens, and how many these are."""
        with self._lock:
            known = [(tail, tail.common(query)) for tail in self._tails if tail.name == name]
            best, common = max(known, key=lambda item: item[1], default=(None, 0))
            if best is not None:
                self._tails.remove(best)
                self._tails.append(best)
            return best, common

    def keep(
        self, name: tuple[str, ...], sequences: Sequence[Sequence[int]], cache: APECache
    ) -> None:
        """Keep the tails of a cache that nobody will write to again.

        Parameters
        ----------
        sequences : sequence of sequence of int
            Query and generated tokens of each batch item, as far as known and without padding; the
            states may lack the last one.
        """
        layers, length = cache.tail_states()
        if length == 0 or layers[0][0].shape[0] != len(sequences):
            return
        memory = _Memory(sum(t.untyped_storage().nbytes() for layer in layers for t in layer))
        if memory.nbytes > self._max_bytes:
            return
        longest = max(map(len, sequences))
        made = []
        for row, ids in enumerate(sequences):
            padding = longest - len(ids)
            own = [
                (keys[row : row + 1, :, padding:], values[row : row + 1, :, padding:])
                for keys, values in layers
            ]
            made.append(Tail(name, tuple(ids[: length - padding]), own, memory))
        with self._lock:
            # What a new tail begins with is the same conversation, a turn ago.
            old = [tail for tail in self._tails if not any(_is_start(tail, new) for new in made)]
            self._tails = [*old, *made]
            while self._nbytes() > self._max_bytes:
                del self._tails[0]

    def _nbytes(self) -> int:
        return sum(memory.nbytes for memory in {tail.memory for tail in self._tails})

    def clear(self) -> None:
        """Drop all tails."""
        with self._lock:
            self._tails.clear()


def _side_by_side(tails: Sequence[Tail | None], padding: Sequence[int], count: int) -> Layers:
    """Return the first ``count`` tokens of a batch, ``(batch, kv_heads, count, head_dim)``."""
    if len(tails) == 1 and tails[0] is not None:
        return tails[0].layers
    some = next(tail for tail in tails if tail is not None)

    def joined(layer: int, part: int) -> Tensor:
        one = some.layers[layer][part]
        states = one.new_zeros(len(tails), one.shape[1], count, one.shape[3])
        for row, (tail, before) in enumerate(zip(tails, padding, strict=True)):
            if tail is not None and count > before:
                states[row, :, before:] = tail.layers[layer][part][0, :, : count - before]
        return states

    return [(joined(layer, 0), joined(layer, 1)) for layer in range(len(some.layers))]


def _is_start(tail: Tail, other: Tail) -> bool:
    return tail.name == other.name and tail.ids == other.ids[: len(tail.ids)]
