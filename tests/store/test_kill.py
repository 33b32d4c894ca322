"""Writers that are killed, and everybody at once."""

from __future__ import annotations

import queue
import random
import time
from pathlib import Path

import pytest
from store_helpers import (
    SPAWN,
    bytes_of_entries,
    entry_nbytes,
    kill,
    make_states,
    mixed_load,
    put_forever,
    same,
    spec_of,
)

from ape_integrations.store import DiskKVStore

TOKENS = 400
ENTRY = entry_nbytes("v1//auto/00", spec_of(TOKENS))


def _kill_writers(directory: Path, times: int) -> None:
    rng = random.Random(0)
    limit = 20 * ENTRY
    DiskKVStore(directory, limit).close()
    for attempt in range(times):
        writers = [
            SPAWN.Process(
                daemon=True,
                target=put_forever,
                args=(str(directory), limit, attempt * 7 + i, TOKENS),
            )
            for i in range(2)
        ]
        for writer in writers:
            writer.start()
        end = time.monotonic() + 0.3 + 0.5 * rng.random()
        while time.monotonic() < end:
            # A killed writer's file counts until the next one opens the store.
            assert bytes_of_entries(directory) <= limit + 2 * len(writers) * ENTRY
            time.sleep(0.02)
        for writer in writers:
            kill(writer)
        store = DiskKVStore(directory, limit)
        report = store.verify()
        assert not report.corrupted and not report.orphans and not report.index_errors
        assert store.verify().clean
        assert bytes_of_entries(directory) == store.stats().bytes <= limit
        for number in range(50):
            found = store.get(str(number), spec_of(TOKENS))
            assert found is None or same(found, make_states(number, TOKENS))
        assert store.put("new", make_states(1))
        assert same(store.get("new", spec_of()), make_states(1))
        store.delete("new")
        store.close()


def test_killed_writers_leave_a_store_that_verifies_and_serves(tmp_path):
    _kill_writers(tmp_path / "kv", 3)


@pytest.mark.stress
def test_writers_killed_at_two_hundred_points(tmp_path):
    _kill_writers(tmp_path / "kv", 200)


def _storm(directory: Path, seconds: float, processes: int, kills: bool) -> None:
    """Let many processes do everything at once, kill some, and check what they must keep to."""
    entry = entry_nbytes("v1//auto/000", spec_of())
    keys, limit = 60, 25 * entry
    rng, wrong = random.Random(0), SPAWN.Queue()
    DiskKVStore(directory, limit).close()
    seeds = iter(range(10**6))
    end = time.monotonic() + seconds

    def start():
        arguments = (str(directory), limit, end - time.monotonic(), next(seeds), keys, wrong)
        process = SPAWN.Process(daemon=True, target=mixed_load, args=arguments)
        process.start()
        return process

    running = [start() for _ in range(processes)]
    killed = 0
    while time.monotonic() < end:
        time.sleep(0.1)
        # Every thread may have one entry more, and so may every killed one until the next opening.
        assert bytes_of_entries(directory) <= limit + 4 * (processes + killed) * entry
        if kills and rng.random() < 0.15:
            victim = rng.randrange(processes)
            kill(running[victim])
            killed += 1
            running[victim] = start()
            killed = min(killed, processes)
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    with pytest.raises(queue.Empty):
        raise AssertionError(wrong.get_nowait())
    store = DiskKVStore(directory, limit)
    report = store.verify()
    assert not report.corrupted and not report.index_errors and not report.orphans
    assert store.verify().clean
    assert bytes_of_entries(directory) == store.stats().bytes <= limit
    for number in range(keys):
        found = store.get(str(number), spec_of())
        assert found is None or same(found, make_states(number))


def test_processes_and_threads_at_once(tmp_path):
    _storm(tmp_path / "kv", seconds=3.0, processes=3, kills=True)


@pytest.mark.stress
def test_eight_processes_of_four_threads_for_a_minute(tmp_path):
    _storm(tmp_path / "kv", seconds=60.0, processes=8, kills=True)
