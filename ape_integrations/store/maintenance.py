"""Keeping a directory consistent with its index: verification, repair, left-over files."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ape_integrations.store.files import EntryFiles, try_lock, unlock_and_close
from ape_integrations.store.index import EntryIndex, EntryRow, ReadOnlyIndex, StoredFile
from ape_integrations.store.keys import KeySpace
from ape_integrations.store.serialization import EntryError, read_key, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyReport:
    """What `DiskKVStore.verify` found.

    Parameters
    ----------
    checked : int
        Entries whose every byte was read and is right.
    corrupted : tuple of str
        Keys of entries that are damaged.
    missing : tuple of str
        Keys of entries without a file.
    orphans : tuple of str
        Files that belong to no entry and that nobody is writing.
    index_errors : tuple of str
        Inconsistencies of the index itself.
    skipped : int
        Entries of other format versions, which this version cannot judge.
    repaired : bool
        Whether all of this was put right.
    """

    checked: int
    corrupted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    index_errors: tuple[str, ...] = ()
    skipped: int = 0
    repaired: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.corrupted or self.missing or self.orphans or self.index_errors)

    def including(self, mended: VerifyReport) -> VerifyReport:
        """Return this report with what `DiskKVStore.mended` says of files and index added."""
        return replace(
            self,
            orphans=mended.orphans + self.orphans,
            index_errors=mended.index_errors + self.index_errors,
        )


def verify_store(index: EntryIndex, files: EntryFiles, version: str, repair: bool) -> VerifyReport:
    """Check every entry, every file and the index; others may use the store meanwhile.

    Parameters
    ----------
    index : EntryIndex
        The store's index.
    files : EntryFiles
        The store's files.
    version : str
        Beginning of the keys of this format version.
    repair : bool
        Drop what is bad and put the index right.

    Returns
    -------
    VerifyReport
        What was found.
    """
    checked = skipped = 0
    corrupted: list[str] = []
    missing: list[str] = []
    for row in index.rows("*"):
        if not row.key.startswith(version):
            skipped += 1
            continue
        problem = _problem(row, index, files)
        if problem is None:
            checked += 1
            continue
        (missing if problem == "missing" else corrupted).append(row.key)
        logger.info("Entry %s %s.", row.key, problem)
        if repair:
            index.remove(row.key, row.file)
    orphans = tuple(find_orphans(index, files, remove=repair))
    errors = tuple(index.repair() if repair else index.check())
    return VerifyReport(
        checked, tuple(corrupted), tuple(missing), orphans, errors, skipped, repaired=repair
    )


def inspect_store(directory: Path) -> VerifyReport:
    """Check a store without opening it for use: nothing on disk changes.

    Others may use the store meanwhile; an entry that they are evicting may count as missing.

    Parameters
    ----------
    directory : Path
        The store's directory.

    Returns
    -------
    VerifyReport
        What was found. An index that cannot be read is an error of the index, and all there is.
    """
    version = KeySpace("", "auto").version
    try:
        with contextlib.closing(ReadOnlyIndex(directory)) as index:
            return verify_store(cast("EntryIndex", index), EntryFiles(directory), version, False)
    except sqlite3.Error as error:
        return VerifyReport(0, index_errors=(f"database: {error}",))


def _problem(row: EntryRow, index: EntryIndex, files: EntryFiles) -> str | None:
    """Say what is wrong with an entry; None where it is good or was removed meanwhile."""
    if row.file is None:
        return "is not an entry file"
    try:
        with files.open(row.file) as source:
            key, _, _ = verify(source)
            if key != row.key:
                return "holds another entry"
            return None if source.nbytes == row.nbytes else "has another size than indexed"
    except FileNotFoundError:
        # Evicting takes the file first and the row a moment later.
        return "missing" if index.is_current(row) else None
    except (EntryError, OSError) as error:
        return str(error)


def find_orphans(index: EntryIndex, files: EntryFiles, remove: bool) -> Iterator[str]:
    """Yield, and remove, files that belong to no entry and that nobody is writing.

    Killed writers leave such files behind. The lock of a live writer tells them apart.
    """
    present = list(files.names())
    known = index.file_names()
    for name in present:
        if name not in known and files.is_abandoned(name, index.has_file, remove=remove):
            yield name


def remove_stale_locks(directory: Path) -> None:
    """Remove lock files whose holder died."""
    with contextlib.suppress(OSError):
        for path in directory.glob("*.lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if try_lock(descriptor):
                path.unlink(missing_ok=True)
                unlock_and_close(descriptor)
            else:
                os.close(descriptor)


def adopt_files(index: EntryIndex, files: EntryFiles) -> int:
    """Enter files into an index that was lost; every load verifies them as always.

    Returns
    -------
    int
        How many were adopted. Their tags are lost.
    """
    adopted = 0
    with index.transact():
        for name in files.names():
            with contextlib.suppress(EntryError, OSError), files.open(name) as source:
                key = read_key(source)
                if index.find(key) is None:
                    index.add(key, StoredFile(name, source.nbytes), "", 2**62, lambda _: True)
                    adopted += 1
    return adopted
