"""One-off entries must not flood out reusable ones.

The workload: requests for 2,000 chunks follow Zipf's law, between them come entries that nobody
asks for again, the store holds a fifth of the chunks. The yardstick is a least-recently-used
cache of that size which never sees the one-off entries.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from store_helpers import entry_nbytes, make_states, spec_of

from ape_integrations.store import DiskKVStore
from ape_integrations.store.eviction import (
    CREATE_TABLES,
    is_remembered,
    next_victim,
    probation_bytes,
    remember_victim,
)

CHUNKS, REQUESTS, CAPACITY = 2_000, 10_000, 400


def workload(
    one_off: float, exponent: float, shift: bool, chunks: int = CHUNKS, requests: int = REQUESTS
) -> Iterator[str]:
    """Yield keys of which a share, starting with ``x``, never come again."""
    rng = random.Random(1)
    weights = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(chunks)))
    popular = list(range(chunks))
    serial = itertools.count()
    for request in range(requests):
        if shift and request == requests // 2:
            rng.shuffle(popular)
        while rng.random() < one_off:
            yield f"x{next(serial):06d}"
        (rank,) = rng.choices(range(chunks), cum_weights=weights)
        yield f"c{popular[rank]:06d}"


class LeastRecentlyUsed:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.keys = capacity, OrderedDict()

    def ask(self, key: str) -> bool:
        if key in self.keys:
            self.keys.move_to_end(key)
            return True
        if len(self.keys) >= self.capacity:
            self.keys.popitem(last=False)
        self.keys[key] = None
        return False


class OurEviction:
    """The store's own statements, on entries of one byte."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        for statement in (*CREATE_TABLES, "CREATE TABLE Settings (key TEXT, value INTEGER)"):
            self.database.execute(statement)
        self.database.execute("INSERT INTO Settings VALUES ('count', 0)")
        self.stored: set[str] = set()
        self.sequence = itertools.count()

    def ask(self, key: str) -> bool:
        execute = self.database.execute
        if key in self.stored:
            execute(
                "UPDATE KVUsage SET sequence = ?, protected = 1 WHERE key = ?",
                (next(self.sequence), key),
            )
            return True
        if len(self.stored) >= self.capacity:
            victim = next_victim(execute, self.capacity, probation_bytes(execute), ())
            execute("DELETE FROM KVUsage WHERE key = ?", (victim.key,))
            self.stored.remove(victim.key)
            remember_victim(execute, victim)
        protected = is_remembered(execute, key)
        row = (key, next(self.sequence), protected, 1)
        execute("INSERT INTO KVUsage (key, sequence, protected, size) VALUES (?, ?, ?, ?)", row)
        self.stored.add(key)
        execute("UPDATE Settings SET value = ?", (len(self.stored),))
        return False


def hit_rate(cache: LeastRecentlyUsed | OurEviction, keys: Iterator[str]) -> float:
    """Return the hit rate in percent over the keys that can be hits at all."""
    answers = [cache.ask(key) for key in keys if key.startswith("c") or cache.ask(key)]
    return 100 * sum(answers) / len(answers)


STRESS = pytest.mark.stress


@pytest.mark.parametrize(
    ("one_off", "exponent", "shift"),
    [
        (0.0, 1.0, False),
        (0.5, 0.7, True),
        (0.8, 1.0, False),
        pytest.param(0.8, 1.0, True, marks=STRESS),
        pytest.param(0.8, 1.2, True, marks=STRESS),
        pytest.param(0.9, 1.0, False, marks=STRESS),
        pytest.param(0.9, 1.2, True, marks=STRESS),
    ],
)
def test_one_off_entries_do_not_flood_out_reusable_ones(one_off, exponent, shift):
    ours = hit_rate(OurEviction(CAPACITY), workload(one_off, exponent, shift))
    yardstick = hit_rate(LeastRecentlyUsed(CAPACITY), workload(0.0, exponent, shift))
    assert ours > yardstick - 5.0


def test_plain_least_recently_used_would_be_flooded():
    flooded = hit_rate(LeastRecentlyUsed(CAPACITY), workload(0.8, 1.0, False))
    yardstick = hit_rate(LeastRecentlyUsed(CAPACITY), workload(0.0, 1.0, False))
    assert flooded < yardstick - 20.0


def test_a_real_store_resists_a_flood(tmp_path):
    spec, states = spec_of(), make_states()
    store = DiskKVStore(tmp_path / "kv", 20 * entry_nbytes("v1//auto/c000000", spec))
    for number in range(10):
        store.put(f"c{number:06d}", states)
    for number in range(10):
        assert store.get(f"c{number:06d}", spec)
    for number in range(100):
        store.put(f"x{number:06d}", states)
    assert all(store.contains(f"c{number:06d}") for number in range(10))


def test_new_entries_get_a_chance_against_old_favourites(tmp_path):
    spec, states = spec_of(), make_states()
    store = DiskKVStore(tmp_path / "kv", 20 * entry_nbytes("v1//auto/c000000", spec))
    for number in range(20):
        store.put(f"c{number:06d}", states)
        assert store.get(f"c{number:06d}", spec)
    for number in range(3):
        store.put(f"n{number:06d}", states)
    assert all(store.contains(f"n{number:06d}") for number in range(3))
    assert [n for n in range(20) if not store.contains(f"c{n:06d}")] == [0, 1, 2]


def test_entry_that_comes_back_after_eviction_is_protected(tmp_path):
    spec, states = spec_of(), make_states()
    store = DiskKVStore(tmp_path / "kv", 10 * entry_nbytes("v1//auto/c000000", spec))
    store.put("c000000", states)
    for number in range(10):
        store.put(f"x{number:06d}", states)
    assert not store.contains("c000000")
    store.put("c000000", states)
    for number in range(10, 30):
        store.put(f"x{number:06d}", states)
    assert store.contains("c000000")


def test_memory_of_evicted_keys_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("ape_integrations.store.eviction.REMEMBERED_RANGE", (5, 5))
    eviction = OurEviction(3)
    for number in range(50):
        eviction.ask(f"x{number}")
    ((count,),) = eviction.database.execute("SELECT COUNT(*) FROM KVEvicted")
    assert count <= 5
