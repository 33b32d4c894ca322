"""States behind the contexts, kept so that a chat's next turn reads only what is new."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ape_integrations.core.cache import APECache

#: Fewer common tokens than this are not worth copying.
_WORTHWHILE = 4


@dataclass(frozen=True)
class Tail:
    """Tokens behind one set of contexts and their states.

    Parameters
    ----------
    ids : tuple of int
        Query and generated tokens whose states are kept.
    layers : list of (Tensor, Tensor)
        Per layer, keys and values ``(1, kv_heads, length, head_dim)``; never written again.
    """

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Memory of the states in bytes."""
        return sum(tensor.untyped_storage().nbytes() for pair in self.layers for tensor in pair)

    def common(self, ids: Sequence[int]) -> int:
        """Return how many leading tokens ``ids`` shares with this tail."""
        count = 0
        for mine, other in zip(self.ids, ids, strict=False):
            if mine != other:
                break
            count += 1
        return count


class TailMemory:
    """The latest tail of each context set, within a byte budget.

    Parameters
    ----------
    max_bytes : int
        Memory for tails; the least recently used are dropped first. 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tails: OrderedDict[tuple[str, ...], Tail] = OrderedDict()

    def restore(self, name: tuple[str, ...], query: Sequence[int], cache: APECache) -> int:
        """Copy the states of known leading query tokens into ``cache``.

        At least one query token is left to read, because its logits are needed.

        Returns
        -------
        int
            Tokens restored.
        """
        with self._lock:
            tail = self._tails.get(name)
            if tail is None:
                return 0
            self._tails.move_to_end(name)
        count = min(tail.common(query), len(query) - 1)
        if count < _WORTHWHILE:
            return 0
        cache.restore_tail(tail.layers, count)
        return count

    def keep(self, name: tuple[str, ...], ids: Sequence[int], cache: APECache) -> None:
        """Keep the tail of a cache that nobody will write to again.

        Parameters
        ----------
        ids : sequence of int
            Query and generated tokens, as far as known; the tail may be shorter by the last one.
        """
        layers, length = cache.tail_states()
        if not self._max_bytes or length == 0 or layers[0][0].shape[0] != 1:
            return
        tail = Tail(tuple(ids[:length]), layers)
        with self._lock:
            self._tails[name] = tail
            self._tails.move_to_end(name)
            total = sum(kept.nbytes for kept in self._tails.values())
            while self._tails and total > self._max_bytes:
                total -= self._tails.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all tails."""
        with self._lock:
            self._tails.clear()
