from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_helpers import (
    SPAWN,
    entry_nbytes,
    fill_store,
    make_states,
    put_and_return,
    same,
    spec_of,
)

from ape_integrations.errors import ConfigError
from ape_integrations.store import DiskKVStore, MemoryKVStore, TieredKVStore
from ape_integrations.store.write_back import WriteBack

SPEC = spec_of()
ENTRY = make_states().nbytes


@pytest.fixture
def disk(tmp_path: Path) -> DiskKVStore:
    return DiskKVStore(tmp_path / "kv")


class Gate:
    """Holds up the background writes of a tier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tier: DiskKVStore) -> None:
        self.open, self.arrived, write = threading.Event(), threading.Event(), tier.put

        def put(*args, **kwargs):
            self.arrived.set()
            self.open.wait(30)
            return write(*args, **kwargs)

        monkeypatch.setattr(tier, "put", put)


def test_entry_is_found_before_it_is_written(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore(2 * ENTRY), disk)
    for number in range(6):
        assert store.put(str(number), make_states(number))
    assert not disk.contains("0")
    assert not store.tiers[0].contains("0"), "memory had to give it up already"
    assert all(same(store.get(str(n), SPEC), make_states(n)) for n in range(6))
    gate.open.set()
    store.flush()
    assert all(same(disk.get(str(n), SPEC), make_states(n)) for n in range(6))
    assert store.stats().hits == 6


def test_pending_bytes_are_bounded(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore(2 * ENTRY), disk, write_back_bytes=3 * ENTRY)
    done = threading.Event()

    def fill() -> None:
        for number in range(10):
            store.put(str(number), make_states(number))
        done.set()

    thread = threading.Thread(target=fill)
    thread.start()
    assert not done.wait(0.3), "the writer waits for room"
    assert len(store._pending) <= 4
    gate.open.set()
    assert done.wait(30)
    thread.join()
    store.flush()
    assert disk.stats().entries == 10


def test_what_the_disk_had_reaches_memory(disk):
    disk.put("k", make_states(1), tag="llama")
    memory = MemoryKVStore("1MB")
    store = TieredKVStore(memory, disk)
    assert same(store.get("k", SPEC), make_states(1))
    store.flush()
    assert same(memory.get("k", SPEC), make_states(1))
    assert memory.stats().tags["llama"].entries == 1
    assert disk.stats().hits == 1, "copying between tiers is no use of an entry"


def test_copying_to_memory_waits_until_nothing_else_goes_on(disk):
    disk.put("k", make_states(1))
    memory = MemoryKVStore("1MB")
    store = TieredKVStore(memory, disk)
    store.get("k", SPEC)
    assert not memory.contains("k")
    end = time.monotonic() + 30
    while not memory.contains("k") and time.monotonic() < end:
        time.sleep(0.05)
    assert same(memory.get("k", SPEC), make_states(1)), "it happens without a flush"


def test_use_from_memory_keeps_an_entry_on_disk(tmp_path):
    size = entry_nbytes("v1//auto/0", SPEC)
    disk = DiskKVStore(tmp_path / "kv", 3 * size)
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    for number in range(3):
        store.put(str(number), make_states(number))
    store.flush()
    assert store.get("0", SPEC) is not None
    for number in range(3, 9):
        store.put(str(number), make_states(number))
    store.flush()
    assert disk.contains("0") and not disk.contains("1")
    assert disk.stats().hits == 1


def test_deleted_while_being_written_stays_deleted(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    store.put("k", make_states(1))
    assert gate.arrived.wait(30)
    assert store.delete("k")
    assert store.get("k", SPEC) is None
    gate.open.set()
    store.flush()
    assert not store.contains("k") and not disk.contains("k")


def test_replaced_while_being_written_becomes_the_new_one(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    store.put("k", make_states(1))
    assert gate.arrived.wait(30)
    store.put("k", make_states(2))
    gate.open.set()
    store.flush()
    assert same(disk.get("k", SPEC), make_states(2))
    assert same(store.get("k", SPEC), make_states(2))


def test_cleared_while_being_written_stays_empty(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    for number in range(3):
        store.put(str(number), make_states(number))
    assert gate.arrived.wait(30)
    threading.Timer(0.1, gate.open.set).start()
    store.clear()
    store.flush()
    assert disk.stats().entries == 0 and not store.contains("0")


def test_states_that_change_after_put_do_not_reach_the_disk(disk, monkeypatch):
    gate = Gate(monkeypatch, disk)
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    states = make_states(1)
    store.put("k", states)
    states.keys[0].fill_(0)
    gate.open.set()
    store.flush()
    assert same(disk.get("k", SPEC), make_states(1))


def test_pending_entries_are_written_when_the_interpreter_ends(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from store_helpers import make_states
from ape_integrations.store import open_store
store = open_store({str(tmp_path / "kv")!r})
for number in range(20):
    store.put(str(number), make_states(number, tokens=200))
store.get("3", make_states(3, tokens=200).spec)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path.cwd())
    disk = DiskKVStore(tmp_path / "kv")
    assert all(disk.contains(str(number)) for number in range(20))


def test_pending_entries_are_written_when_a_worker_process_ends(tmp_path):
    process = SPAWN.Process(daemon=True, target=put_and_return, args=(str(tmp_path / "kv"), 20))
    process.start()
    process.join(60)
    disk = DiskKVStore(tmp_path / "kv")
    assert all(disk.contains(str(number)) for number in range(20))


def test_forked_process_goes_on_with_its_parents_store(tmp_path):
    store = TieredKVStore(MemoryKVStore("1MB"), DiskKVStore(tmp_path / "kv"))
    store.put("0", make_states(0))
    store.flush()
    process = multiprocessing.get_context("fork").Process(target=fill_store, args=(store, 20))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    disk = DiskKVStore(tmp_path / "kv")
    assert all(disk.contains(str(number)) for number in range(20))


def test_one_tier_is_a_clear_error(disk):
    with pytest.raises(ConfigError, match="two tiers"):
        TieredKVStore(disk)


def test_many_threads_on_a_tiered_store(tmp_path):
    disk = DiskKVStore(tmp_path / "kv", 30 * ENTRY)
    store = TieredKVStore(MemoryKVStore(5 * ENTRY), disk, write_back_bytes=4 * ENTRY)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(40):
            number = (seed * 7 + step * 3) % 11
            found = store.get(str(number), SPEC)
            if found is None:
                store.put(str(number), make_states(number))
            elif not same(found, make_states(number)):
                wrong.append(f"bytes of {number}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert not wrong
    assert disk.verify().clean


def test_failing_background_work_does_not_stop_the_rest():
    background, done = WriteBack(100), threading.Event()
    background.submit(lambda: 1 / 0)
    background.submit(done.set)
    background.flush()
    assert done.is_set()


def test_idle_background_thread_ends(monkeypatch):
    monkeypatch.setattr("ape_integrations.store.write_back._IDLE_SECONDS", 0.01)
    background = WriteBack(100)
    for _ in range(3):
        background.submit(lambda: None)
        background.flush()
        thread = background._thread
        if thread is not None:
            thread.join(10)
            assert not thread.is_alive()


def test_work_is_done_in_order():
    background, order = WriteBack(10), []
    for number in range(50):
        background.submit(lambda number=number: (time.sleep(0.0005), order.append(number)), 4)
    background.flush()
    assert order == list(range(50))


def test_waiting_writer_makes_patient_work_run_at_once(monkeypatch):
    monkeypatch.setattr("ape_integrations.store.write_back._QUIET_SECONDS", 3600.0)
    background, done = WriteBack(100), []
    background.note_activity()
    assert background.submit_patient(lambda: done.append("patient"), 60)
    writer = threading.Thread(target=background.submit, args=(lambda: None, 60), daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive() and done == ["patient"]


class FullMemory(MemoryKVStore):
    """A tier that raises instead of storing."""

    def put(self, *args: object, **kwargs: object) -> bool:
        raise MemoryError

    adopt = put


def test_tier_that_raises_keeps_nothing_pending():
    store = TieredKVStore(MemoryKVStore("1MB"), FullMemory("1MB"))
    for number in range(3):
        store.put(str(number), make_states(number))
    store.flush()
    assert not store._pending
    assert same(store.get("0", SPEC), make_states(0))
    store = TieredKVStore(FullMemory("1MB"), MemoryKVStore("1MB"))
    with pytest.raises(MemoryError):
        store.put("0", make_states())
    assert not store._pending


def test_copying_into_memory_is_tried_again_after_a_failure(tmp_path, monkeypatch):
    slow = DiskKVStore(tmp_path)
    slow.put("0", make_states(0))
    store = TieredKVStore(MemoryKVStore("1MB"), slow)
    with monkeypatch.context() as patch:
        patch.setattr(slow, "peek", FullMemory("1MB").put)
        assert same(store.get("0", SPEC), make_states(0))
        store.flush()
    assert not store.tiers[0].contains("0")
    assert same(store.get("0", SPEC), make_states(0))
    store.flush()
    assert store.tiers[0].contains("0")
