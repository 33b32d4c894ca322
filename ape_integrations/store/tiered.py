"""Fast tiers in front of slow ones: reads go through, writes follow in the background."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Protocol

from ape_integrations.errors import ConfigError, StoreError
from ape_integrations.store.base import (
    Destination,
    KVSpec,
    KVStates,
    KVStore,
    LoadsByGet,
    StoreStats,
    check_destination,
    copy_layers,
)
from ape_integrations.store.disk import DiskKVStore
from ape_integrations.store.memory import MemoryKVStore
from ape_integrations.store.sizes import parse_size
from ape_integrations.store.write_back import WriteBack

_HITS_PER_FLUSH = 256
"""Hits after which slower tiers write down what was used."""


class Tier(KVStore, Protocol):
    """A store that can be a tier."""

    def peek(self, key: str, spec: KVSpec) -> tuple[KVStates, str] | None:
        """Return an entry, for reading only, and its tag, without counting a use."""
        ...

    def touch(self, key: str) -> None:
        """Note that an entry was used, though a faster tier delivered it."""
        ...


class TieredKVStore(LoadsByGet):
    """Several stores as one, fastest first, for example memory, disk, Redis.

    `put` reaches the fastest tier at once and the others from one background thread; the entry can
    be found all the while. `load` asks the tiers in order; what it finds in a slow one is copied
    to the faster ones in the background, when nothing else is going on.

    Parameters
    ----------
    *tiers : stores
        At least two, fastest first. They belong to this store, which closes them.
    write_back_bytes : int or str
        Bytes that may wait to be written; `put` waits for room beyond that.

    Raises
    ------
    ConfigError
        If there are fewer than two tiers.
    """

    def __init__(self, *tiers: Tier, write_back_bytes: int | str = "1GB") -> None:
        if len(tiers) < 2:
            raise ConfigError("A tiered store needs at least two tiers, fastest first.")
        self.tiers = tiers
        self._background = WriteBack(parse_size(write_back_bytes, "write_back_bytes"))
        self._lock = threading.Lock()
        self._pending: dict[str, KVStates] = {}
        self._promoting: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._locking: KVStore = next((t for t in tiers if isinstance(t, DiskKVStore)), tiers[0])

    def __repr__(self) -> str:
        return f"TieredKVStore({', '.join(map(repr, self.tiers))})"

    def contains(self, key: str) -> bool:
        """Tell whether any tier has `key`."""
        return key in self._pending or any(tier.contains(key) for tier in self.tiers)

    def load(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        """Read an entry from the fastest tier that has it; see `KVStore.load`."""
        check_destination(spec, destination)
        self._background.note_activity()
        nbytes = self._load_pending(key, spec, destination)
        if nbytes is None:
            for depth, tier in enumerate(self.tiers):
                nbytes = tier.load(key, spec, destination)
                if nbytes is not None:
                    self._promote(key, spec, depth)
                    self._note_use(key, depth)
                    break
        with self._lock:
            self._counts["misses" if nbytes is None else "hits"] += 1
        return nbytes

    def put(self, key: str, states: KVStates, *, tag: str = "") -> bool:
        """Store in the fastest tier now and in the others soon; see `KVStore.put`."""
        try:
            owned = states.copy()
        except (OSError, MemoryError):  # no memory is left
            return False
        _put(self.tiers[0], key, owned, tag)
        with self._lock:
            self._pending[key] = owned
        self._background.submit(lambda: self._write(key, owned, tag), owned.nbytes)
        return True

    def pin(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these entries from being evicted from any tier inside a ``with`` block."""
        return self._pin(list(keys))

    @contextmanager
    def encoding_lock(
        self, keys: str | Iterable[str], timeout: float = 0.0
    ) -> Iterator[frozenset[str]]:
        """Agree with others on who encodes; see `KVStore.encoding_lock`.

        Keys that were stored inside the block stay held until they have reached the slower tiers,
        where other processes look for them. The caller does not wait for that.
        """
        with ExitStack() as stack:
            held = stack.enter_context(self._locking.encoding_lock(keys, timeout))
            yield held
            if any(key in self._pending for key in held):
                self._background.submit(stack.pop_all().close)

    def delete(self, key: str) -> bool:
        """Remove an entry from all tiers; False where there was none. StoreError as a tier's."""
        with self._lock:
            found = self._pending.pop(key, None) is not None
        for tier in self.tiers:
            found = tier.delete(key) or found
        return found

    def clear(self) -> int:
        """Remove all entries from all tiers; return the number in the slowest.

        Raises
        ------
        StoreError
            A tier cannot remove its entries.
        """
        with self._lock:
            self._pending.clear()
        self._background.flush()
        return [tier.clear() for tier in self.tiers][-1]

    def stats(self) -> StoreStats:
        """Return the figures: what the tiers hold, and how often any of them had what was asked."""
        tiers = tuple(tier.stats() for tier in self.tiers)
        fullest = max(tiers, key=lambda stats: stats.entries)
        with self._lock:
            counts = Counter(self._counts)
        return StoreStats(
            entries=fullest.entries,
            bytes=fullest.bytes,
            size_limit=fullest.size_limit,
            hits=counts["hits"],
            misses=counts["misses"],
            evictions=tiers[-1].evictions,
            corrupted=sum(stats.corrupted for stats in tiers),
            put_failures=sum(stats.put_failures for stats in tiers),
            oldest=fullest.oldest,
            newest=fullest.newest,
            tags=fullest.tags,
            tiers=tiers,
        )

    def flush(self) -> None:
        """Wait until everything put so far has reached every tier."""
        self._background.flush()
        self._flush_tiers()

    def close(self) -> None:
        """Write what is pending and close all tiers."""
        self._background.finish()
        self._promoting.clear()
        for tier in self.tiers:
            tier.close()

    def _flush_tiers(self) -> None:
        for tier in self.tiers:
            tier.flush()

    def _load_pending(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        states = self._pending.get(key)
        if states is None or states.spec != spec:
            return None
        copy_layers(states, destination)
        return states.nbytes

    def _write(self, key: str, states: KVStates, tag: str) -> None:
        """Bring an entry to the slower tiers, unless it was deleted or replaced meanwhile."""
        if self._pending.get(key) is not states:
            return
        stored: list[Tier] = []
        try:
            for tier in self.tiers[1:]:
                if tier.put(key, states, tag=tag):
                    stored.append(tier)
        finally:
            with self._lock:
                current = self._pending.get(key)
                if current is states:
                    del self._pending[key]
            if current is None:
                for tier in stored:
                    with suppress(StoreError):
                        tier.delete(key)

    def _note_use(self, key: str, depth: int) -> None:
        """Tell the slower tiers, or they would give up first what is used most."""
        for tier in self.tiers[depth + 1 :]:
            tier.touch(key)
        if self._counts["hits"] % _HITS_PER_FLUSH == _HITS_PER_FLUSH - 1:
            self._background.submit_patient(self._flush_tiers)

    def _promote(self, key: str, spec: KVSpec, depth: int) -> None:
        """Copy an entry to the tiers above the one that had it, if there is time."""
        with self._lock:
            if depth == 0 or key in self._promoting:
                return
            self._promoting.add(key)

        def promote() -> None:
            try:
                found = self.tiers[depth].peek(key, spec)
                if found is not None:
                    for tier in self.tiers[:depth]:
                        if not tier.contains(key):
                            _put(tier, key, *found)
            finally:
                self._promoting.discard(key)

        # Fresh memory is slow, and somebody waits for an answer now.
        if not self._background.submit_patient(promote, spec.nbytes):
            self._promoting.discard(key)

    @contextmanager
    def _pin(self, keys: list[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for tier in self.tiers:
                stack.enter_context(tier.pin(keys))
            yield


def _put(tier: KVStore, key: str, states: KVStates, tag: str) -> None:
    """Store states that this module owns, without copying them where that is possible."""
    if isinstance(tier, MemoryKVStore):
        tier.adopt(key, states, tag)
    else:
        tier.put(key, states, tag=tag)
