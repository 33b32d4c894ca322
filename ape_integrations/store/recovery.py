"""Opening an index that may be damaged, read-only, or somebody else's."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from pathlib import Path
from typing import cast

from ape_integrations.errors import StoreError
from ape_integrations.store.directory import INDEX_FILE, is_writable
from ape_integrations.store.files import EntryFiles
from ape_integrations.store.index import EntryIndex, ReadOnlyIndex
from ape_integrations.store.maintenance import adopt_files, find_orphans, remove_stale_locks

# Faults of the file system or of timing, which say nothing about the database.
_ENVIRONMENT = (
    "attempt to write a readonly",
    "database is locked",
    "database or disk is full",
    "disk I/O error",
    "unable to open",
)

logger = logging.getLogger(__name__)


def open_index(
    directory: Path, files: EntryFiles, permissions: int = 0o700
) -> tuple[EntryIndex, bool]:
    """Open a store's index, rebuild it where it is damaged, and clean up after killed writers.

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
    tuple
        The index, and whether it can be written to. One that cannot has the same queries, and
        raises OSError from everything else.

    Raises
    ------
    StoreError
        If the directory holds a database of another application.
    sqlite3.Error, OSError
        If it cannot be opened at all.
    """
    if not is_writable(directory):
        return cast("EntryIndex", ReadOnlyIndex(directory)), False
    _refuse_other_applications(directory)
    index = _open_sound(directory, files)
    if index is None:
        index = _rebuild(directory, files)
    # SQLite goes by the umask, and gives its other files the mode of this one.
    with contextlib.suppress(OSError):
        (directory / INDEX_FILE).chmod(permissions & 0o666)
    abandoned = list(find_orphans(index, files, remove=True))
    if abandoned:
        logger.info("Removed %d files of killed writers from %s.", len(abandoned), directory)
    remove_stale_locks(directory / "locks")
    return index, True


def _refuse_other_applications(directory: Path) -> None:
    """Raise StoreError where the database is a diskcache that was not made by this package."""
    path = directory / INDEX_FILE
    if not path.exists():
        return
    with contextlib.suppress(sqlite3.Error):
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if "Cache" not in tables or "KVCounter" in tables:
                return
            # A store that another process is creating now has its own tables a moment later.
            ((foreign,),) = connection.execute("SELECT COUNT(*) FROM Cache").fetchall()
            if foreign:
                raise StoreError(
                    f"{directory} holds the cache of another application. Give the store a"
                    " directory of its own."
                )


def _open_sound(directory: Path, files: EntryFiles) -> EntryIndex | None:
    """Open the index; None where it is damaged. Whatever else is wrong is raised."""
    try:
        index = EntryIndex(directory, files)
        ((verdict,),) = index.quick_check()
        if verdict == "ok":
            return index
        index.close()
        logger.debug("quick_check of %s: %s", directory, verdict)
    except sqlite3.OperationalError as error:
        if str(error).startswith(_ENVIRONMENT):
            raise
        logger.debug("%s cannot be opened: %r", directory, error)
    except (sqlite3.DatabaseError, TypeError, ValueError, KeyError, AttributeError) as error:
        logger.debug("%s cannot be opened: %r", directory, error)
    return None


def _rebuild(directory: Path, files: EntryFiles) -> EntryIndex:
    """Replace a damaged index by one made from the entry files, once for all processes."""
    descriptor = os.open(directory / "rebuild.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        index = _open_sound(directory, files)
        if index is not None:
            return index
        for suffix in ("", "-wal", "-shm"):
            (directory / f"{INDEX_FILE}{suffix}").unlink(missing_ok=True)
        index = EntryIndex(directory, files)
        adopted = adopt_files(index, files)
        logger.warning(
            "The index of the store in %s was damaged; a new one has %d entries.",
            directory,
            adopted,
        )
        return index
    finally:
        os.close(descriptor)
