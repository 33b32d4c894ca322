"""Opening an index that may be damaged, read-only, or somebody else's."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ape_integrations.errors import StoreError
from ape_integrations.store.directory import INDEX_FILE, is_writable
from ape_integrations.store.files import EntryFiles, unlock_and_close
from ape_integrations.store.index import EntryIndex, ReadOnlyIndex
from ape_integrations.store.maintenance import (
    VerifyReport,
    adopt_files,
    find_orphans,
    remove_stale_locks,
)

# Faults of the file system or of timing, which say nothing about the database.
_ENVIRONMENT = (
    "attempt to write a readonly",
    "database is locked",
    "database or disk is full",
    "disk I/O error",
    "unable to open",
)

# Without one of these, entries would be forgotten or never be evicted.
_OWN_TABLES = {"Settings", "Cache", "KVUsage"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedIndex:
    """An index that is ready for use.

    Parameters
    ----------
    index : EntryIndex
        One that cannot be written to has the same queries, and raises OSError from the rest.
    writable : bool
        Whether it can be written to.
    mended : VerifyReport
        What was put right: files of killed writers, and the index itself.
    """

    index: EntryIndex
    writable: bool
    mended: VerifyReport


class _DamagedIndexError(Exception):
    """The index has to be made anew from the entries; the message says why."""


def open_index(directory: Path, files: EntryFiles, permissions: int = 0o700) -> OpenedIndex:
    """Open a store's index, rebuild it where it is damaged, and clean up after killed writers.

    One process at a time does this: to another one, entries that are not in a new index yet would
    be files of killed writers.

    Parameters
    ----------
    directory : Path
        The store's directory.
    files : EntryFiles
        Its files.
    permissions : int
        Mode for the index, without the right to execute.

    Returns
    -------
    OpenedIndex
        The index, whether it can be written to, and what was wrong.

    Raises
    ------
    StoreError
        If the directory holds a database of another application.
    sqlite3.Error, OSError
        If it cannot be opened at all.
    """
    if not is_writable(directory):
        index = cast("EntryIndex", ReadOnlyIndex(directory))
        return OpenedIndex(index, writable=False, mended=VerifyReport(0))
    errors: tuple[str, ...] = ()
    with _one_at_a_time(directory):
        _refuse_other_applications(directory)
        try:
            index = _open_sound(directory, files)
        except _DamagedIndexError as damage:
            errors = (f"database: {damage}",)
            index = _rebuild(directory, files, permissions)
        # SQLite goes by the umask, and gives its other files the mode of this one.
        with contextlib.suppress(OSError):
            (directory / INDEX_FILE).chmod(permissions & 0o666)
        abandoned = tuple(find_orphans(index, files, remove=True))
    if abandoned:
        logger.info("Removed %d files of killed writers from %s.", len(abandoned), directory)
    remove_stale_locks(directory / "locks")
    mended = VerifyReport(0, orphans=abandoned, index_errors=errors, repaired=True)
    return OpenedIndex(index, writable=True, mended=mended)


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait for others who are opening the store; a lock on the directory leaves no file behind."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        unlock_and_close(descriptor)


def _refuse_other_applications(directory: Path) -> None:
    """Raise StoreError where the database is a diskcache that was not made by this package."""
    path = directory / INDEX_FILE
    if not path.exists():
        return
    with contextlib.suppress(sqlite3.Error):
        tables = _tables(path)
        if "Cache" not in tables or "KVCounter" in tables:
            return
        ((foreign,),) = _query(path, "SELECT COUNT(*) FROM Cache")
        if foreign:
            raise StoreError(
                f"{directory} holds the cache of another application. Give the store a"
                " directory of its own."
            )


def _tables(path: Path) -> set[str]:
    return {str(name) for (name,) in _query(path, "SELECT name FROM sqlite_master")}


def _query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    """Ask a database that may be anybody's, without writing to it."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(statement).fetchall()


def _open_sound(directory: Path, files: EntryFiles) -> EntryIndex:
    """Open the index, or make the first one; _DamagedIndexError where entries are not in one."""
    if _has_no_index(directory) and next(files.names(), None) is not None:
        raise _DamagedIndexError("there is no index of the entries")
    try:
        index = EntryIndex(directory, files)
        ((verdict,),) = index.quick_check()
    except sqlite3.OperationalError as error:
        if str(error).startswith(_ENVIRONMENT):
            raise
        raise _DamagedIndexError(error) from error
    except (sqlite3.DatabaseError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _DamagedIndexError(error) from error
    if verdict != "ok":
        index.close()
        raise _DamagedIndexError(verdict)
    return index


def _has_no_index(directory: Path) -> bool:
    """Tell whether tables of an index are missing; one that cannot be read may have them."""
    path = directory / INDEX_FILE
    if not path.exists():
        return True
    with contextlib.suppress(sqlite3.Error):
        return not _tables(path) >= _OWN_TABLES
    return False


def _rebuild(directory: Path, files: EntryFiles, permissions: int) -> EntryIndex:
    """Replace a damaged index by one made from the entry files.

    It is made aside and moved into its place when it is complete, so that whoever finds one there
    after a crash can rely on it.
    """
    aside = directory / "rebuild"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    aside.chmod(permissions)
    with contextlib.closing(EntryIndex(aside, files)) as index:
        adopted = adopt_files(index, files)
    # The database goes first: without it the next opening starts over, with a new one beside an
    # old log, or an old one without its log, it would not.
    for suffix in ("", "-wal", "-shm"):
        (directory / f"{INDEX_FILE}{suffix}").unlink(missing_ok=True)
    (aside / INDEX_FILE).rename(directory / INDEX_FILE)
    shutil.rmtree(aside, ignore_errors=True)
    logger.warning(
        "The index of the store in %s was lost or damaged; a new one has %d entries.",
        directory,
        adopted,
    )
    return EntryIndex(directory, files)
