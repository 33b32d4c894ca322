from __future__ import annotations

import threading

import pytest
import torch
from store_helpers import make_states, same, spec_of

from ape_integrations.errors import ConfigError
from ape_integrations.store import KVStates, MemoryKVStore

ENTRY = make_states().nbytes


def test_budget_holds_and_least_recently_used_goes_first():
    store = MemoryKVStore(3 * ENTRY)
    for key in "abc":
        store.put(key, make_states())
    store.get("a", spec_of())
    store.put("d", make_states())
    assert [key for key in "abcd" if store.contains(key)] == ["a", "c", "d"]
    assert store.stats().bytes == 3 * ENTRY
    assert store.stats().evictions == 1


def test_pinned_entries_stay():
    store = MemoryKVStore(2 * ENTRY)
    store.put("a", make_states(1))
    with store.pin(["a"]), store.pin(["a"]):
        for key in "bcd":
            assert store.put(key, make_states())
        with store.pin(["d"]):
            assert not store.put("e", make_states())
        assert same(store.get("a", spec_of()), make_states(1))
    for key in "xyz":
        store.put(key, make_states())
    assert not store.contains("a")


def test_entry_beyond_the_budget_is_not_stored_and_evicts_nothing():
    store = MemoryKVStore(2 * ENTRY)
    store.put("a", make_states())
    assert not store.put("b", make_states(tokens=60))
    assert store.contains("a")


def test_put_in_vain_beside_pinned_entries_changes_nothing():
    store = MemoryKVStore(6 * ENTRY)
    for key in "abcdef":
        store.put(key, make_states())
    with store.pin("abc"):
        for key in "xf":
            assert not store.put(key, make_states(tokens=24))
        assert all(same(store.get(key, spec_of()), make_states()) for key in "abcdef")
        assert store.stats().evictions == 0
    assert store.put("x", make_states(tokens=24))


def test_bad_budget_is_a_clear_error():
    with pytest.raises(ConfigError, match="max_bytes"):
        MemoryKVStore("lots")


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_evicted_entries_give_their_memory_back_to_the_system():
    size = 16 * 2**20
    store = MemoryKVStore(4 * size)
    template = torch.ones(1, size // 8, 1)
    before = _resident_bytes()
    for number in range(12):
        store.put(str(number), KVStates([template], [template]))
    assert store.stats().bytes == 4 * size
    assert _resident_bytes() - before < 5.5 * size
    store.clear()
    assert _resident_bytes() - before < 1.5 * size


def test_many_threads_agree_on_the_budget():
    store = MemoryKVStore(5 * ENTRY)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(200):
            number = (seed * 7 + step * 3) % 11
            found = store.get(str(number), spec_of())
            if found is not None and not same(found, make_states(number)):
                wrong.append(f"bytes of {number}")
            store.put(str(number), make_states(number))
            if store.stats().bytes > 5 * ENTRY:
                wrong.append("budget")
            if step % 20 == 0:
                store.delete(str(number))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.clear()
    assert store.stats().bytes == 0
