"""The index of a disk store: diskcache's database, without pickles and with our own eviction.

diskcache keeps, in SQLite, which key lives in which file, under which tag and of what size, and
keeps count with triggers. Two things are replaced. Its `Disk` would unpickle whatever the database
calls a pickle (CVE-2025-69872): ours knows entry files only. Its culling works on an estimate,
ten entries at a time, after the fact: ours makes room first, exactly, and in the same transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import diskcache
from diskcache.core import MODE_BINARY, UNKNOWN

from ape_integrations.store.directory import INDEX_FILE
from ape_integrations.store.eviction import (
    CREATE_TABLES,
    next_victim,
    probation_bytes,
    remember_victim,
)
from ape_integrations.store.eviction import is_remembered as was_evicted_before_reuse
from ape_integrations.store.files import EntryFiles, is_entry_name

BUSY_TIMEOUT = 20.0
"""Seconds that a writer waits for the others before it gives up."""


@dataclass(frozen=True)
class StoredFile:
    """An entry file that is complete on disk.

    Parameters
    ----------
    name : str
        Path relative to the store's directory.
    nbytes : int
        Its size.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class EntryRow:
    """What the index says of an entry.

    Parameters
    ----------
    key, tag : str
        Full key in the index, and the name of the model.
    nbytes, hits : int
        Size, and how often it was loaded.
    stored, used : float
        Seconds since the epoch of storing and of the last use.
    file : str or None
        The entry file; None where the row is not one of ours (tampered with, or foreign).
    """

    key: str
    tag: str
    nbytes: int
    hits: int
    stored: float
    used: float
    file: str | None


class EntryDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are strings and values are entry files; anything else is refused, pickles above all."""

    def put(self, key: object) -> tuple[str, bool]:
        """Return the database form of a key."""
        if type(key) is not str:
            raise TypeError("keys of a KV store are strings")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Return a key from its database form."""
        if not raw or type(key) is not str:
            raise TypeError("the index holds a key that is not a string")
        return key

    def store(self, value: object, read: bool, key: object = UNKNOWN) -> tuple[int, int, str, None]:
        """Return the columns for an entry file that is already written."""
        if not isinstance(value, StoredFile) or not is_entry_name(value.name):
            raise TypeError("values of a KV store are entry files")
        return value.nbytes, MODE_BINARY, value.name, None

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> BinaryIO:
        """Open the entry file of a row; raise OSError, for diskcache a miss, if there is none."""
        if mode != MODE_BINARY or not read or not is_entry_name(filename):
            raise OSError("not an entry file")
        return open(Path(self._directory, str(filename)), "rb")

    def filename(self, key: object = UNKNOWN, value: object = UNKNOWN) -> NoReturn:
        """Refuse: entry files are made by `EntryFiles`."""
        raise TypeError("entry files are written before they are registered")

    def remove(self, file_path: str) -> None:
        """Remove an entry file; other paths are left alone."""
        if is_entry_name(file_path):
            Path(self._directory, file_path).unlink(missing_ok=True)


# Name of an inconsistency, a query that is not zero where it exists, a statement against it.
CHECKS = (
    (
        "total size differs from the sum of the entries",
        "SELECT (SELECT value FROM Settings WHERE key = 'size')"
        " <> (SELECT COALESCE(SUM(size), 0) FROM Cache)",
        "UPDATE Settings SET value = (SELECT COALESCE(SUM(size), 0) FROM Cache) WHERE key = 'size'",
    ),
    (
        "count differs from the number of entries",
        "SELECT (SELECT value FROM Settings WHERE key = 'count') <> (SELECT COUNT(*) FROM Cache)",
        "UPDATE Settings SET value = (SELECT COUNT(*) FROM Cache) WHERE key = 'count'",
    ),
    (
        "entries without a place in the order of eviction",
        "SELECT COUNT(*) FROM Cache WHERE key NOT IN (SELECT key FROM KVUsage)",
        "INSERT INTO KVUsage SELECT key, 0, 0, size FROM Cache"
        " WHERE key NOT IN (SELECT key FROM KVUsage)",
    ),
    (
        "places in the order of eviction without an entry",
        "SELECT COUNT(*) FROM KVUsage WHERE key NOT IN (SELECT key FROM Cache)",
        "DELETE FROM KVUsage WHERE key NOT IN (SELECT key FROM Cache)",
    ),
    (
        "sizes in the order of eviction differ from the entries'",
        "SELECT COUNT(*) FROM KVUsage u JOIN Cache c USING (key) WHERE u.size <> c.size",
        "UPDATE KVUsage SET size = (SELECT size FROM Cache c WHERE c.key = KVUsage.key)",
    ),
)

_ROW = "c.key, tag, c.size, access_count, store_time, access_time, mode, filename"


class IndexQueries:
    """What can be asked of an index without changing it."""

    _sql: Callable[..., sqlite3.Cursor]

    def find(self, key: str) -> EntryRow | None:
        """Return the row of a key."""
        rows = self._sql(f"SELECT {_ROW} FROM Cache c WHERE key = ? AND raw = 1", (key,)).fetchall()
        return _row(rows[0]) if rows else None

    def rows(self, scope: str) -> Iterator[EntryRow]:
        """Yield all rows whose key matches a GLOB pattern, least recently used first."""
        select = (
            f"SELECT {_ROW} FROM Cache c LEFT JOIN KVUsage u ON u.key = c.key"
            " WHERE c.key GLOB ? ORDER BY sequence"
        )
        for row in self._sql(select, (scope,)).fetchall():
            yield _row(row)

    def counters(self) -> dict[str, int]:
        """Return the counters."""
        return {str(name): int(value) for name, value in self._sql("SELECT * FROM KVCounter")}

    def file_names(self) -> set[str]:
        """Return the files of all entries."""
        return {str(name) for (name,) in self._sql("SELECT filename FROM Cache").fetchall()}

    def has_file(self, name: str) -> bool:
        """Tell whether an entry has this file."""
        select = "SELECT 1 FROM Cache WHERE filename = ? LIMIT 1"
        return bool(self._sql(select, (name,)).fetchall())

    def is_current(self, row: EntryRow) -> bool:
        """Tell whether an entry still has the file it had."""
        current = self.find(row.key)
        return current is not None and current.file == row.file

    def check(self) -> list[str]:
        """Return what is inconsistent within the index."""
        found = [
            f"database: {message}"
            for (message,) in self._sql("PRAGMA integrity_check").fetchall()
            if message != "ok"
        ]
        for name, compute, _ in CHECKS:
            ((wrong,),) = self._sql(compute).fetchall()
            if wrong:
                found.append(name)
        return found

    def used_bytes(self) -> int:
        """Return the bytes of all entries together."""
        ((size,),) = self._sql("SELECT value FROM Settings WHERE key = 'size'").fetchall()
        return int(size)


class EntryIndex(IndexQueries, diskcache.Cache):  # type: ignore[misc]
    """Which entries a store has, and which of them to give up first.

    Every method raises `sqlite3.Error` or `diskcache.Timeout` where the database cannot be used;
    the caller turns that into a miss.

    Parameters
    ----------
    directory : Path
        Where the database lies; it exists.
    files : EntryFiles
        Its files.
    """

    def __init__(self, directory: Path, files: EntryFiles) -> None:
        self._files = files
        super().__init__(
            str(directory),
            timeout=BUSY_TIMEOUT,
            disk=EntryDisk,
            eviction_policy="none",
            cull_limit=0,
            statistics=0,
            tag_index=0,
            size_limit=2**62,
            disk_min_file_size=0,
            # A mapped database that is cut short would end the process instead of a query.
            sqlite_mmap_size=0,
        )
        for statement in CREATE_TABLES:
            self._sql_retry(statement)
        self._path = str(directory / INDEX_FILE)
        self._identity = _identity(self._path)

    @property
    def is_replaced(self) -> bool:
        """Whether the database was removed, or another one put in its place, since it was opened.

        Connections would go on with the old one: it exists as long as they are open, and as long
        as it exists no other file gets its number.
        """
        return _identity(self._path) != self._identity

    def add(
        self, key: str, file: StoredFile, tag: str, limit: int, is_pinned: Callable[[str], bool]
    ) -> bool:
        """Register a file as an entry, evicting others so that the limit holds.

        Victims' files go before the transaction ends: a process that is killed in between leaves
        rows without a file, which are misses, and never files that nobody counts.

        Parameters
        ----------
        key : str
            Full key; an entry that has it already is replaced.
        file : StoredFile
            The entry's file, complete.
        tag : str
            Name of the model.
        limit : int
            Bytes that all entries may take together.
        is_pinned : callable
            Tells whether a key must not be evicted.

        Returns
        -------
        bool
            False where pinned entries leave no room; nothing is changed then.
        """
        with self.transact():
            if not self._can_make_room(key, file.nbytes, limit, is_pinned):
                return False
            known = self._sql("SELECT protected FROM KVUsage WHERE key = ?", (key,)).fetchall()
            self._remove_row(key)
            if not self._make_room(file.nbytes, limit, is_pinned):
                return False
            self.set(key, file, tag=tag)
            protected = bool(known and known[0][0]) or was_evicted_before_reuse(self._sql, key)
            self._sql(
                "INSERT OR REPLACE INTO KVUsage (key, sequence, protected, size)"
                " VALUES (?, ?, ?, ?)",
                (key, self._next_sequence(), protected, file.nbytes),
            )
            return True

    def is_current(self, row: EntryRow) -> bool:
        """Tell whether an entry still has the file it had, once all writers are through."""
        with self.transact():
            return super().is_current(row)

    def remove(self, key: str, name: str | None = None) -> bool:
        """Remove an entry with its file.

        Parameters
        ----------
        key : str
            Full key.
        name : str or None
            Remove it only while it still is this file, so that a newer one stays.

        Returns
        -------
        bool
            False where there was no such entry.
        """
        with self.transact():
            return self._remove_row(key, name)

    def evict_to(self, limit: int, is_pinned: Callable[[str], bool]) -> int:
        """Evict until all entries together take at most `limit` bytes; return how many went."""
        with self.transact():
            before = len(self)
            self._make_room(0, limit, is_pinned)
            return before - len(self)

    def record_uses(self, uses: Mapping[str, tuple[int, float]], counts: Mapping[str, int]) -> None:
        """Write down which entries were loaded, oldest use first, and what else happened.

        Parameters
        ----------
        uses : mapping of str to tuple
            Full key to number of loads and time of the last one, in seconds since the epoch.
        counts : mapping of str to int
            What to add to the counters that outlive processes.
        """
        with self.transact():
            for name, value in counts.items():
                self._increment(name, value)
            for key, (count, used) in uses.items():
                # The order is our own count, not the clock's: clocks go backwards.
                self._sql(
                    "UPDATE KVUsage SET sequence = ?, protected = 1 WHERE key = ?",
                    (self._next_sequence(), key),
                )
                self._sql(
                    "UPDATE Cache SET access_time = ?, access_count = access_count + ?"
                    " WHERE key = ? AND raw = 1",
                    (used, count, key),
                )

    def quick_check(self) -> list[tuple[str]]:
        """Return SQLite's verdict on the database: one row ``("ok",)`` where it is sound."""
        return self._sql("PRAGMA quick_check(1)").fetchall()

    def repair(self) -> list[str]:
        """Put right what is inconsistent within the index, and return what it was."""
        found = self.check()
        if found:
            with self.transact():
                self._sql("REINDEX")
                for name, _, fix in CHECKS:
                    if name in found:
                        self._sql(fix)
        return found

    def _can_make_room(
        self, key: str, nbytes: int, limit: int, is_pinned: Callable[[str], bool]
    ) -> bool:
        """Tell whether replacing `key` and evicting what nobody uses makes so much room."""
        excess = self.used_bytes() + nbytes - limit
        select = (
            "SELECT u.key, u.size, filename FROM KVUsage u CROSS JOIN Cache c ON c.key = u.key"
            " AND raw = 1 ORDER BY protected, sequence"
        )
        with contextlib.closing(self._sql(select)) as rows:
            while excess > 0 and (row := rows.fetchone()) is not None:
                other, size, name = row
                ours = is_entry_name(name)
                if other == key or not (is_pinned(other) or (ours and self._files.is_used(name))):
                    excess -= size
        return excess <= 0

    def _make_room(self, nbytes: int, limit: int, is_pinned: Callable[[str], bool]) -> bool:
        spared: set[str] = set()
        evicted = 0
        used, on_probation = self.used_bytes(), probation_bytes(self._sql)
        while used + nbytes > limit:
            victim = next_victim(self._sql, limit, on_probation, spared)
            if victim is None:
                break
            name = self._file_of(victim.key)
            if is_pinned(victim.key) or (name and not self._files.remove_unused(name)):
                spared.add(victim.key)
                continue
            self._remove_row(victim.key)
            remember_victim(self._sql, victim)
            evicted += 1
            used = self.used_bytes()
            on_probation -= 0 if victim.protected else victim.nbytes
        self._increment("evictions", evicted)
        return used + nbytes <= limit

    def _file_of(self, key: str) -> str | None:
        row = self.find(key)
        return row.file if row else None

    def _remove_row(self, key: str, name: str | None = None) -> bool:
        row = self.find(key)
        if row is not None and name is not None and row.file != name:
            return False
        if row is not None and row.file:
            self._files.remove(row.file)
        self._sql("DELETE FROM Cache WHERE key = ? AND raw = 1", (key,))
        self._sql("DELETE FROM KVUsage WHERE key = ?", (key,))
        return row is not None

    def _next_sequence(self) -> int:
        return self._increment("sequence", 1)

    def _increment(self, name: str, value: int) -> int:
        rows = self._sql(
            "INSERT INTO KVCounter (name, value) VALUES (?1, ?2)"
            " ON CONFLICT (name) DO UPDATE SET value = value + ?2 RETURNING value",
            (name, value),
        ).fetchall()
        return int(rows[0][0])


class ReadOnlyIndex(IndexQueries):
    """The index of a store in a directory that this process cannot write to.

    Parameters
    ----------
    directory : Path
        The store's directory.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / INDEX_FILE
        self._path = str(path)
        self._state = _state(self._path)
        # The log holds what writers, live or killed, have not brought into the database yet. Where
        # there is none nobody writes, and SQLite, told so, makes no files beside the database.
        has_log = all(os.path.exists(f"{path}{suffix}") for suffix in ("-wal", "-shm"))
        self._uri = f"{path.as_uri()}?mode=ro&{'readonly_shm=1' if has_log else 'immutable=1'}"
        self._local = threading.local()
        self.used_bytes()

    @property
    def is_replaced(self) -> bool:
        """Whether the database is another one, or has changed so that it must be opened again."""
        return _state(self._path) != self._state

    @property
    def _sql(self) -> Callable[..., sqlite3.Cursor]:  # type: ignore[override]
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = sqlite3.connect(self._uri, uri=True)
        return cast("sqlite3.Connection", connection).execute

    def close(self) -> None:
        """Close this thread's connection."""
        connection = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise OSError(errno.EROFS, "the store is read-only")


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from every other file; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _state(path: str) -> tuple[object, ...] | None:
    """Return what changes when writers begin, go on in the database itself, or end."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, os.path.exists(f"{path}-wal")


def _row(columns: tuple[Any, ...]) -> EntryRow:
    key, tag, size, hits, stored, used, mode, name = columns
    ours = mode == MODE_BINARY and is_entry_name(name)
    return EntryRow(
        str(key), str(tag or ""), int(size), int(hits), stored, used, name if ours else None
    )
