"""A tier in main memory with a budget of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from ape_integrations.store.base import (
    Destination,
    KVSpec,
    KVStates,
    LoadsByGet,
    StoreStats,
    TagStats,
    check_destination,
    copy_layers,
)
from ape_integrations.store.single_flight import EncodingLocks
from ape_integrations.store.sizes import parse_size


@dataclass
class _Entry:
    states: KVStates
    tag: str
    stored: float = field(default_factory=time.time)
    hits: int = 0


class MemoryKVStore(LoadsByGet):
    """KV states in main memory, least recently used first to go.

    Entries are copies that nobody outside ever gets to see: `load` copies them out. Their memory
    is mapped entry by entry, so that it goes back to the system when an entry is evicted.

    Parameters
    ----------
    max_bytes : int or str
        Bytes that all entries may take together.

    Raises
    ------
    ConfigError
        If `max_bytes` is not a positive size.
    """

    def __init__(self, max_bytes: int | str = "2GB") -> None:
        self._max_bytes = parse_size(max_bytes, "max_bytes")
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._pins: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._encoding = EncodingLocks()

    def __repr__(self) -> str:
        return f"MemoryKVStore(max_bytes={self._max_bytes})"

    def contains(self, key: str) -> bool:
        """Tell whether `key` is stored."""
        return key in self._entries

    def load(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        """Copy an entry into memory that the caller owns; see `KVStore.load`."""
        check_destination(spec, destination)
        found = self.peek(key, spec)
        with self._lock:
            self._counts["hits" if found else "misses"] += 1
            entry = self._entries.get(key)
            if found and entry:
                entry.hits += 1
                self._entries.move_to_end(key)
        if found is None:
            return None
        copy_layers(found[0], destination)
        return spec.nbytes

    def peek(self, key: str, spec: KVSpec) -> tuple[KVStates, str] | None:
        """Return the stored states themselves and their tag, without counting a use.

        Arguments as for `load`.

        For tiers, which do not write to them; everybody else calls `load` or `get`, which copy.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if entry.states.spec != spec:
                self._drop(key)
                self._counts["corrupted"] += 1
                return None
            return entry.states, entry.tag

    def touch(self, key: str) -> None:
        """Note that an entry was used, though a faster tier delivered it."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)

    def put(self, key: str, states: KVStates, *, tag: str = "") -> bool:
        """Store a copy of the states; see `KVStore.put`."""
        if states.nbytes > self._max_bytes:
            return self.adopt(key, states, tag)
        try:
            owned = states.copy()
        except (OSError, MemoryError):
            with self._lock:
                self._counts["put_failures"] += 1
            return False
        return self.adopt(key, owned, tag)

    def adopt(self, key: str, states: KVStates, tag: str = "") -> bool:
        """Store states as for `put`, but without a copy: nobody else holds them, or ever will."""
        with self._lock:
            if not self._make_room(key, states.nbytes):
                self._counts["put_failures"] += 1
                return False
            self._entries[key] = _Entry(states, tag)
            self._bytes += states.nbytes
        return True

    def pin(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these entries from being evicted inside a ``with`` block."""
        return self._pin(list(keys))

    def encoding_lock(
        self, keys: str | Iterable[str], timeout: float = 0.0
    ) -> AbstractContextManager[frozenset[str]]:
        """Agree with the other threads on who encodes; see `KVStore.encoding_lock`."""
        return self._encoding.hold(keys, timeout)

    def delete(self, key: str) -> bool:
        """Remove an entry; False where there was none."""
        with self._lock:
            return self._drop(key)

    def clear(self) -> int:
        """Remove all entries and return their number."""
        with self._lock:
            count = len(self._entries)
            self._entries.clear()
            self._bytes = 0
            return count

    def stats(self) -> StoreStats:
        """Return the store's figures."""
        with self._lock:
            entries = list(self._entries.values())
            counts = Counter(self._counts)
            nbytes = self._bytes
        tags: dict[str, TagStats] = {}
        for entry in entries:
            old = tags.get(entry.tag, TagStats())
            tags[entry.tag] = TagStats(
                old.entries + 1, old.bytes + entry.states.nbytes, old.hits + entry.hits
            )
        return StoreStats(
            entries=len(entries),
            bytes=nbytes,
            size_limit=self._max_bytes,
            oldest=min((entry.stored for entry in entries), default=None),
            newest=max((entry.stored for entry in entries), default=None),
            tags=tags,
            hits=counts["hits"],
            misses=counts["misses"],
            evictions=counts["evictions"],
            corrupted=counts["corrupted"],
            put_failures=counts["put_failures"],
        )

    def flush(self) -> None:
        """Do nothing: there is no slower tier."""

    def close(self) -> None:
        """Free all entries."""
        self.clear()

    @contextmanager
    def _pin(self, keys: list[str]) -> Iterator[None]:
        with self._lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(keys)
                self._pins = +self._pins

    def _make_room(self, key: str, nbytes: int) -> bool:
        """Drop `key` and what else has to go for its new states; False, and nothing, if in vain."""
        pinned = sum(
            self._entries[other].states.nbytes
            for other in self._pins
            if other != key and other in self._entries
        )
        if pinned + nbytes > self._max_bytes:
            return False
        self._drop(key)
        while self._bytes + nbytes > self._max_bytes:
            self._drop(next(other for other in self._entries if other not in self._pins))
            self._counts["evictions"] += 1
        return True

    def _drop(self, key: str) -> bool:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.states.nbytes
        return entry is not None
