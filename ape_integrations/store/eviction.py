"""Which entry to give up first.

New entries are on probation until they are loaded once; then they are protected. Both segments
are ordered by last use. While entries on probation take more than a tenth of the limit, the oldest
of them goes, otherwise the least recently used protected one. A passing flood of entries that
nobody asks for twice therefore displaces only itself. The keys of entries that left on probation
are remembered for a while: one that comes back was reusable after all and starts out protected.
(This is the 2Q scheme of Johnson and Shasha, VLDB 1994, with a longer memory and promotion on
the first reuse; ``tests/store/test_admission.py`` simulates why.)
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass

Execute = Callable[..., sqlite3.Cursor]

PROBATION_SHARE = 0.1
"""Share of the limit up to which entries on probation may displace protected ones."""

REMEMBERED_PER_ENTRY = 32
"""Evicted keys that are remembered, per stored entry. A key takes about 100 bytes."""

REMEMBERED_RANGE = (1_000, 100_000)
"""Fewest and most keys remembered."""

CREATE_TABLES = (
    "CREATE TABLE IF NOT EXISTS KVUsage ("
    " key TEXT PRIMARY KEY, sequence INTEGER, protected INTEGER, size INTEGER) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS KVUsage_order ON KVUsage (protected, sequence, size)",
    "CREATE TABLE IF NOT EXISTS KVEvicted (id INTEGER PRIMARY KEY, key TEXT UNIQUE)",
    "CREATE TABLE IF NOT EXISTS KVCounter (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID",
)


@dataclass(frozen=True)
class Victim:
    """The entry to evict next.

    Parameters
    ----------
    key : str
        Full key in the index.
    protected : bool
        Whether it had been loaded since it was stored.
    nbytes : int
        Its size.
    """

    key: str
    protected: bool
    nbytes: int


def probation_bytes(execute: Execute) -> int:
    """Return what entries that were not loaded yet take together."""
    select = "SELECT COALESCE(SUM(size), 0) FROM KVUsage WHERE protected = 0"
    ((nbytes,),) = execute(select).fetchall()
    return int(nbytes)


def next_victim(
    execute: Execute, limit: int, on_probation: int, spared: Collection[str]
) -> Victim | None:
    """Choose the entry to evict next.

    Parameters
    ----------
    execute : callable
        Runs a statement on the index's connection.
    limit : int
        Bytes that all entries may take together.
    on_probation : int
        Bytes of the entries on probation, from :func:`probation_bytes`.
    spared : collection of str
        Keys that cannot be evicted now.

    Returns
    -------
    Victim or None
        None where every entry is spared.
    """
    protected_first = on_probation <= PROBATION_SHARE * limit
    for protected in (protected_first, not protected_first):
        rows = execute(
            "SELECT key, size FROM KVUsage WHERE protected = ? ORDER BY sequence LIMIT ?",
            (protected, len(spared) + 1),
        )
        for key, nbytes in rows.fetchall():
            if key not in spared:
                return Victim(key, protected, nbytes)
    return None


def remember_victim(execute: Execute, victim: Victim) -> None:
    """Remember an entry that left on probation, and forget the oldest such memory."""
    if victim.protected:
        return
    execute("INSERT OR REPLACE INTO KVEvicted (key) VALUES (?)", (victim.key,))
    ((entries,),) = execute("SELECT value FROM Settings WHERE key = 'count'").fetchall()
    fewest, most = REMEMBERED_RANGE
    keep = min(max(REMEMBERED_PER_ENTRY * int(entries), fewest), most)
    execute("DELETE FROM KVEvicted WHERE id <= (SELECT MAX(id) FROM KVEvicted) - ?", (keep,))


def is_remembered(execute: Execute, key: str) -> bool:
    """Tell whether an entry left on probation not long ago, and forget that it did."""
    return execute("DELETE FROM KVEvicted WHERE key = ?", (key,)).rowcount > 0
