from __future__ import annotations

import threading
import time
from pathlib import Path

from store_helpers import SPAWN, encode_once, hold_encoding_lock, kill, make_states, same, spec_of

from ape_integrations.store import DiskKVStore, MemoryKVStore, TieredKVStore, single_flight
from ape_integrations.store.single_flight import EncodingLocks


def test_ten_threads_that_miss_one_context_encode_it_once(tmp_path):
    for store in (MemoryKVStore("1MB"), DiskKVStore(tmp_path / "kv")):
        encoded: list[int] = []
        start = threading.Barrier(10)

        def ask(store=store, encoded=encoded, start=start) -> None:
            start.wait()
            with store.encoding_lock("k", timeout=30):
                if store.get("k", spec_of()) is None:
                    encoded.append(1)
                    time.sleep(0.02)
                    store.put("k", make_states(1))

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(encoded) == 1
        assert same(store.get("k", spec_of()), make_states(1))


def test_processes_that_miss_one_context_encode_it_once(tmp_path):
    start, encoded = SPAWN.Event(), SPAWN.Value("i", 0)
    arguments = (str(tmp_path / "kv"), "k", start, encoded)
    processes = [SPAWN.Process(daemon=True, target=encode_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert encoded.value == 1


def test_dead_holder_blocks_nobody(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    ready = SPAWN.Event()
    process = SPAWN.Process(
        daemon=True, target=hold_encoding_lock, args=(str(tmp_path / "kv"), "k", ready)
    )
    process.start()
    assert ready.wait(60)
    with store.encoding_lock(["k", "other"]) as held:
        assert held == {"other"}, "a living holder is respected"
    kill(process)
    with store.encoding_lock("k", timeout=30) as held:
        assert held == {"k"}


def test_patience_ends(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    second = DiskKVStore(tmp_path / "kv")
    with store.encoding_lock("k") as held:
        assert held == {"k"}
        for other in (store, second):
            with other.encoding_lock("k", timeout=0.05) as nothing:
                assert not nothing
    with second.encoding_lock("k") as held:
        assert held == {"k"}


def test_callers_that_want_the_same_keys_do_not_block_each_other(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    finished = []

    def work(keys: list[str]) -> None:
        for _ in range(20):
            with store.encoding_lock(keys, timeout=30) as held:
                assert held == set(keys)
        finished.append(keys)

    orders = (["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"])
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(finished) == 3


def test_error_inside_the_block_frees_the_keys(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    for _ in range(2):
        try:
            with store.encoding_lock("k") as held:
                assert held == {"k"}
                raise RuntimeError("encoding failed")
        except RuntimeError:
            pass


def test_lock_files_do_not_accumulate(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    for number in range(20):
        with store.encoding_lock(str(number)):
            pass
    locks = tmp_path / "kv" / "locks"
    assert list(locks.iterdir()) == []
    (locks / "dead.lock").touch()
    DiskKVStore(tmp_path / "kv")
    assert list(locks.iterdir()) == []


def test_namespaces_do_not_wait_for_each_other(tmp_path):
    a = DiskKVStore(tmp_path / "kv", namespace="a")
    b = DiskKVStore(tmp_path / "kv", namespace="b")
    with a.encoding_lock("k") as first, b.encoding_lock("k") as second:
        assert first == second == {"k"}


def test_tiered_store_holds_keys_until_other_processes_can_find_them(tmp_path, monkeypatch):
    disk = DiskKVStore(tmp_path / "kv")
    other = DiskKVStore(tmp_path / "kv")
    store = TieredKVStore(MemoryKVStore("1MB"), disk)
    write, go_on = disk.put, threading.Event()

    def slow_put(*args, **kwargs):
        go_on.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(disk, "put", slow_put)
    with store.encoding_lock("k"):
        store.put("k", make_states(1))
    with other.encoding_lock("k") as held:
        assert not held
    assert same(store.get("k", spec_of()), make_states(1)), "this process has it already"
    go_on.set()
    with other.encoding_lock("k", timeout=30) as held:
        assert held == {"k"} and other.contains("k")


def test_lock_file_that_its_holder_just_removed_gives_nobody_the_lock(tmp_path, monkeypatch):
    first, second, third = (EncodingLocks(tmp_path / "locks") for _ in range(3))
    holding = first.hold("k")
    holding.__enter__()
    try_lock = single_flight.try_lock

    def release_in_between(descriptor: int) -> bool:
        monkeypatch.setattr(single_flight, "try_lock", try_lock)
        holding.__exit__(None, None, None)
        return try_lock(descriptor)

    monkeypatch.setattr(single_flight, "try_lock", release_in_between)
    with second.hold("k") as held, third.hold("k") as nothing:
        assert held == {"k"} and not nothing


def test_many_keys_at_once(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    keys = {str(number) for number in range(500)}
    with store.encoding_lock(keys) as held:
        assert held == keys
        assert len(list(Path(tmp_path / "kv" / "locks").iterdir())) <= 128
