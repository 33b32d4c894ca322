"""The default store: entries in a directory, shared by threads and processes of one machine."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import diskcache

from ape_integrations.errors import StoreError
from ape_integrations.store.at_exit import call_at_exit
from ape_integrations.store.base import (
    Destination,
    KVSpec,
    KVStates,
    LoadsByGet,
    StoreStats,
    TagStats,
    check_destination,
    from_layers,
)
from ape_integrations.store.directory import permissions_for, prepare_directory
from ape_integrations.store.files import EntryFiles
from ape_integrations.store.index import EntryIndex, EntryRow, StoredFile
from ape_integrations.store.keys import KeySpace
from ape_integrations.store.maintenance import VerifyReport, verify_store
from ape_integrations.store.outage import Outage
from ape_integrations.store.pins import Pins
from ape_integrations.store.recovery import open_index
from ape_integrations.store.serialization import (
    EntryError,
    deserialize,
    serialize,
)
from ape_integrations.store.single_flight import EncodingLocks
from ape_integrations.store.sizes import parse_size
from ape_integrations.store.usage import PendingUsage

logger = logging.getLogger(__name__)

_MEDIUM_FAULTS = (OSError, MemoryError, sqlite3.Error, diskcache.Timeout)


class DiskKVStore(LoadsByGet):
    """KV states in files of a local directory, found through a diskcache database.

    Many threads and processes of one machine may use one directory at the same time. Network file
    systems are not supported: their locks and databases cannot be relied on.

    Parameters
    ----------
    directory : path, optional
        Where entries lie. Default: the user's cache directory. Created with mode 0700.
    size_limit : int or str
        Bytes that all entries of the directory may take together, for example ``"20GB"``.
    kv_dtype : str
        How entries are written: ``"auto"`` (the model's dtype, exact), ``"bfloat16"``,
        ``"float16"``, ``"float8_e4m3"`` or ``"int8"``. Readers only see entries of their own
        setting, so that nobody gets rounded states who did not ask for them.
    namespace : str
        Entries of different namespaces are never shared, whatever their keys. They share the
        directory's limit.
    trust_directory : bool
        Accept a directory that other users own or can write to, and give what is stored the
        directory's own permissions. Otherwise only its owner can read what is stored.
    retry_after : float
        Seconds until storing is tried again after the disk was full or not writable.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    StoreError
        If the directory cannot be created or written to, or is not to be trusted.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        size_limit: int | str = "20GB",
        *,
        kv_dtype: str = "auto",
        namespace: str = "",
        trust_directory: bool = False,
        retry_after: float = 60.0,
    ) -> None:
        self._size_limit = parse_size(size_limit)
        self._keys = KeySpace(namespace, kv_dtype)
        self.directory: Path = prepare_directory(directory, trust_directory)
        self._trust = trust_directory
        self._permissions = permissions_for(self.directory, trust_directory)
        self._files = EntryFiles(self.directory, self._permissions)
        self._pins = Pins(self._files)
        self._usage = PendingUsage()
        self._storing = Outage(f"Storing KV states in {self.directory}", retry_after)
        self._reading = Outage(f"Reading KV states in {self.directory}", retry_after=0.0)
        self._too_large_noted = False
        self._opening = threading.Lock()
        try:
            self._opened = open_index(self.directory, self._files, self._permissions)
        except StoreError:
            raise
        except _MEDIUM_FAULTS as error:
            raise StoreError(
                f"Cannot open the index of the store in {self.directory}: {error}. Give another"
                " directory, for example DiskKVStore(directory=...) or cache_dir=..."
            ) from error
        if not self._opened.writable:
            self._storing.begin("the directory is read-only")
        self._encoding = EncodingLocks(self.directory / "locks")
        call_at_exit(self, DiskKVStore.close)

    def __repr__(self) -> str:
        return f"DiskKVStore({str(self.directory)!r}, size_limit={self._size_limit})"

    @property
    def size_limit(self) -> int:
        """Bytes that all entries may take together."""
        return self._size_limit

    @property
    def mended(self) -> VerifyReport:
        """What opening the store put right: files of killed writers, a damaged index."""
        return self._opened.mended

    def contains(self, key: str) -> bool:
        """Tell whether `key` is stored, without reading it."""
        return self._find(self._keys.full(key)) is not None

    def load(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        """Read an entry into memory that the caller owns; see `KVStore.load`."""
        check_destination(spec, destination)
        full_key = self._keys.full(key)
        row = self._find(full_key)
        nbytes = self._read(row, spec, destination) if row else None
        if nbytes is None:
            self._usage.count("misses")
        else:
            self._usage.hit(full_key)
            if self._usage.is_due:
                self._write_usage()
        return nbytes

    def peek(self, key: str, spec: KVSpec) -> tuple[KVStates, str] | None:
        """Return an entry and its tag without counting a use, for tiers, as for `load`."""
        row = self._find(self._keys.full(key))
        destination = spec.allocate()
        if row is None or self._read(row, spec, destination) is None:
            return None
        return from_layers(destination), row.tag

    def touch(self, key: str) -> None:
        """Note that an entry was used, though a faster tier delivered it."""
        self._usage.hit(self._keys.full(key))

    def put(self, key: str, states: KVStates, *, tag: str = "") -> bool:
        """Store the states of one context; see `KVStore.put`."""
        full_key = self._keys.full(key)
        stored = False
        if not self._storing.active:
            try:
                stored = self._write(full_key, states, tag)
                self._storing.end()
            except ValueError as error:
                logger.warning("Entry %s is not stored: %s.", key, error)
            except _MEDIUM_FAULTS as error:
                self._storing.begin(_describe(error))
                self._opened.index.close()
        if not stored:
            self._usage.count("put_failures")
        return stored

    def pin(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these entries from being evicted, by any process, inside a ``with`` block."""
        return self._pin([self._keys.full(key) for key in keys])

    def encoding_lock(
        self, keys: str | Iterable[str], timeout: float = 0.0
    ) -> AbstractContextManager[frozenset[str]]:
        """Agree with all threads and processes on who encodes; see `KVStore.encoding_lock`."""
        return self._encoding.hold(keys, timeout, self._keys.prefix)

    def delete(self, key: str) -> bool:
        """Remove an entry; False where there was none.

        Raises
        ------
        StoreError
            If the store is read-only, or its index cannot be changed.
        """
        with self._removing():
            return self._index.remove(self._keys.full(key))

    def clear(self, *, all_namespaces: bool = False) -> int:
        """Remove all entries, of this namespace or of all, and return their number.

        Raises
        ------
        StoreError
            If the store is read-only, or its index cannot be changed.
        """
        with self._removing():
            rows = self._rows(all_namespaces)
            return sum(self._index.remove(row.key) for row in rows)

    def rows(self, *, all_namespaces: bool = False) -> list[EntryRow]:
        """Return what the index says of every entry, least recently used first.

        Parameters
        ----------
        all_namespaces : bool
            Include entries of other namespaces.
        """
        with contextlib.suppress(*_MEDIUM_FAULTS):
            return self._rows(all_namespaces)
        return []

    def _rows(self, all_namespaces: bool) -> list[EntryRow]:
        self._write_usage()
        scope = "*" if all_namespaces else f"v*/{self._keys.namespace}/*"
        return list(self._index.rows(scope))

    def stats(self) -> StoreStats:
        """Return the figures of the whole directory, over all processes that ever used it."""
        rows = self.rows(all_namespaces=True)
        counters: dict[str, int] = {}
        with contextlib.suppress(*_MEDIUM_FAULTS):
            counters = self._index.counters()
        return StoreStats(
            entries=len(rows),
            bytes=sum(row.nbytes for row in rows),
            size_limit=self._size_limit,
            hits=counters.get("hits", 0),
            misses=counters.get("misses", 0),
            evictions=counters.get("evictions", 0),
            corrupted=counters.get("corrupted", 0),
            put_failures=counters.get("put_failures", 0),
            oldest=min((row.stored for row in rows), default=None),
            newest=max((row.stored for row in rows), default=None),
            tags=_by_tag(rows),
        )

    def verify(self, *, repair: bool = True) -> VerifyReport:
        """Read every entry of every namespace, find files of killed writers, check the index.

        Others may go on using the store.

        Parameters
        ----------
        repair : bool
            Drop what is bad and put the index right. A read-only store is only looked at.

        Returns
        -------
        VerifyReport
            What was found.

        Raises
        ------
        StoreError
            If the index cannot be read, or not repaired.
        """
        self._write_usage()
        repair = repair and self._opened.writable
        try:
            return verify_store(self._index, self._files, self._keys.version, repair)
        except _MEDIUM_FAULTS as error:
            raise StoreError(f"Cannot verify {self.directory}: {_describe(error)}.") from error

    def prune(
        self,
        *,
        older_than: float | None = None,
        tag: str | None = None,
        to_size: int | str | None = None,
    ) -> int:
        """Remove entries that are no longer wanted, in all namespaces.

        Parameters
        ----------
        older_than : float, optional
            Remove what was last used more than so many seconds ago.
        tag : str, optional
            Remove only entries with this tag; a pattern such as ``"llama*"`` is allowed. Does not
            restrict `to_size`.
        to_size : int or str, optional
            Evict, in the usual order, until all entries together take no more than this.

        Returns
        -------
        int
            Number of entries removed.

        Raises
        ------
        StoreError
            If the store is read-only, or its index cannot be changed.
        """
        removed = 0
        limit = parse_size(to_size, "to_size") if to_size is not None else None
        with self._removing():
            if older_than is not None or tag is not None:
                latest = time.time() - older_than if older_than is not None else math.inf
                for row in self._rows(all_namespaces=True):
                    if row.used <= latest and fnmatchcase(row.tag, tag if tag is not None else "*"):
                        removed += self._index.remove(row.key, row.file)
            if limit is not None:
                self._write_usage()
                removed += self._index.evict_to(limit, self._pins.__contains__)
        return removed

    def flush(self) -> None:
        """Write down which entries were used."""
        self._write_usage()

    def close(self) -> None:
        """Flush and close this thread's connection. Using the store again opens a new one."""
        self._write_usage()
        self._opened.index.close()

    @property
    def _index(self) -> EntryIndex:
        """The index that lies in the directory now; OSError where there is none to be used."""
        if self._opened.index.is_replaced:
            self._reopen()
        return self._opened.index

    def _reopen(self) -> None:
        with self._opening:
            if not self._opened.index.is_replaced:
                return
            if not self.directory.is_dir():
                raise OSError(errno.ESTALE, "the store was removed", str(self.directory))
            try:
                prepare_directory(self.directory, self._trust)
                self._opened = open_index(self.directory, self._files, self._permissions)
            except StoreError as error:
                raise OSError(errno.ESTALE, str(error)) from error

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Turn what stands in the way of removing entries into a StoreError."""
        if not self._opened.writable:
            raise StoreError(
                f"The store in {self.directory} is read-only: nothing can be removed from it."
            )
        try:
            yield
        except _MEDIUM_FAULTS as error:
            self._opened.index.close()
            raise StoreError(
                f"Not all entries could be removed from {self.directory}: {_describe(error)}. "
                "Call it again once that is over."
            ) from error

    def _find(self, full_key: str) -> EntryRow | None:
        try:
            return self._index.find(full_key)
        except _MEDIUM_FAULTS as error:
            self._reading.begin(_describe(error))
            self._opened.index.close()
            return None

    def _read(self, row: EntryRow, spec: KVSpec, destination: Destination) -> int | None:
        try:
            if row.file is None:
                raise EntryError("is not an entry file")
            with self._files.open(row.file) as source:
                nbytes = deserialize(source, row.key, spec, destination, self._keys.kv_dtype)
            self._reading.end()
            return nbytes
        except (EntryError, FileNotFoundError) as error:
            if self._remove(row.key, row.file):
                self._usage.count("corrupted")
                logger.warning("Dropped entry %s: %s.", row.key, _describe(error))
            else:
                # It was replaced or evicted between the two looks.
                current = self._find(row.key)
                if current is not None and current.file != row.file:
                    return self._read(current, spec, destination)
        except (OSError, MemoryError) as error:
            self._reading.begin(_describe(error))
        return None

    def _write(self, full_key: str, states: KVStates, tag: str) -> bool:
        buffers = serialize(full_key, states, self._keys.kv_dtype)
        nbytes = sum(len(buffer) for buffer in buffers)
        if nbytes > self._size_limit:
            level = logging.DEBUG if self._too_large_noted else logging.WARNING
            self._too_large_noted = True
            logger.log(
                level, "An entry of %d bytes exceeds the limit %d.", nbytes, self._size_limit
            )
            return False
        self._write_usage()
        index = self._index
        self._files.require_room(nbytes)
        with self._files.create() as file:
            file.write(buffers)
            stored = index.add(
                full_key,
                StoredFile(file.name, nbytes),
                tag[:200],
                self._size_limit,
                self._pins.__contains__,
            )
            if stored:
                file.keep()
        if stored:
            self._pins.attach(full_key, file.name)
        return stored

    @contextmanager
    def _pin(self, full_keys: list[str]) -> Iterator[None]:
        with self._pins.hold(full_keys):
            for full_key in full_keys:
                row = self._find(full_key)
                if row and row.file:
                    self._pins.attach(full_key, row.file)
            yield

    def _remove(self, full_key: str, file: str | None = None) -> bool:
        try:
            return self._index.remove(full_key, file)
        except _MEDIUM_FAULTS as error:
            self._storing.begin(_describe(error))
            self._opened.index.close()
            return False

    def _write_usage(self) -> None:
        uses, counts = self._usage.take()
        if not uses and not counts:
            return
        try:
            self._index.record_uses(uses, counts)
        except _MEDIUM_FAULTS:
            # Nothing depends on these figures; they are kept for the next attempt.
            self._usage.give_back(uses, counts)
            self._opened.index.close()


def _by_tag(rows: Iterable[EntryRow]) -> dict[str, TagStats]:
    tags: dict[str, TagStats] = {}
    for row in rows:
        old = tags.get(row.tag, TagStats())
        tags[row.tag] = TagStats(old.entries + 1, old.bytes + row.nbytes, old.hits + row.hits)
    return tags


def _describe(error: BaseException) -> str:
    if isinstance(error, diskcache.Timeout):
        return "another process kept its index locked"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
