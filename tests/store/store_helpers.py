"""States whose every byte follows from a number, and processes that work on a store."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import string
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ape_integrations.store import DiskKVStore, KVSpec, KVStates, KVStore, LayerSpec, open_store
from ape_integrations.store.base import from_layers
from ape_integrations.store.serialization import serialize

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["ape_integrations.store"])

KEYS = string.digits + string.ascii_letters
"""Keys of one length, so that their entries have one size."""

SHAPES = ((2, 8), (2, 4))


def make_states(
    number: int = 0, tokens: int = 6, layers: int = 2, dtype: torch.dtype = torch.float32
) -> KVStates:
    """Return states that differ from those of every other number in every tensor."""
    generator = torch.Generator().manual_seed(number)

    def tensor(shape: tuple[int, int]) -> torch.Tensor:
        heads, dim = shape
        return torch.randn(heads, tokens, dim, generator=generator).to(dtype)

    return KVStates(
        [tensor(SHAPES[0]) for _ in range(layers)], [tensor(SHAPES[1]) for _ in range(layers)]
    )


def same(found: KVStates | None, expected: KVStates) -> bool:
    """Tell whether states are equal bit for bit."""
    return found is not None and all(
        torch.equal(a, b)
        for left, right in zip(found.layers, expected.layers, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def spec_of(tokens: int = 6, layers: int = 2, dtype: torch.dtype = torch.float32) -> KVSpec:
    return KVSpec(tokens, dtype, (LayerSpec(*SHAPES),) * layers)


def entry_files(directory: Path) -> list[Path]:
    return sorted((directory / "entries").glob("??/*.kv"))


def bytes_of_entries(directory: Path) -> int:
    """Return the bytes of all entry files, of which some may vanish meanwhile."""
    total = 0
    for path in entry_files(directory):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of a directory with its bytes."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def entry_nbytes(key: str, spec: KVSpec, kv_dtype: str = "auto") -> int:
    """Return the size of an entry in bytes."""
    states = from_layers(spec.allocate())
    for layer in states.layers:
        for tensor in layer:
            tensor.zero_()
    return sum(map(len, serialize(key, states, kv_dtype)))


def execute(directory: Path, statement: str, *args: Any) -> list[tuple[Any, ...]]:
    """Run SQL on a store's index as an intruder would."""
    connection = sqlite3.connect(directory / "cache.db")
    try:
        rows = connection.execute(statement, args).fetchall()
        connection.commit()
        return rows
    finally:
        connection.close()


def put_forever(directory: str, size_limit: int, first: int, tokens: int) -> None:
    """Store entries until killed."""
    torch.set_num_threads(1)
    store = DiskKVStore(directory, size_limit)
    for number in range(first, 10**9):
        store.put(f"{number % 50}", make_states(number % 50, tokens))


def put_and_wait(directory: str, count: int, ready: Any) -> None:
    """Store entries and keep the store open until killed."""
    store = DiskKVStore(directory)
    for number in range(count):
        store.put(str(number), make_states(number))
    ready.set()
    time.sleep(600)


def hold_pin(directory: str, size_limit: int, key: str, ready: Any, done: Any) -> None:
    """Pin an entry until told to stop."""
    store = DiskKVStore(directory, size_limit)
    with store.pin([key]):
        ready.set()
        done.wait(60)


def hold_encoding_lock(directory: str, key: str, ready: Any) -> None:
    """Hold an encoding lock until killed."""
    store = DiskKVStore(directory)
    with store.encoding_lock(key):
        ready.set()
        time.sleep(600)


def encode_once(directory: str, key: str, start: Any, encoded: Any) -> None:
    """Ask for one context as four threads at once, counting who really encodes it."""
    store = DiskKVStore(directory)
    spec = spec_of()

    def ask() -> None:
        start.wait(60)
        with store.encoding_lock(key, timeout=60):
            if store.get(key, spec) is None:
                with encoded.get_lock():
                    encoded.value += 1
                time.sleep(0.05)
                store.put(key, make_states(1))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fill_store(store: KVStore, count: int) -> None:
    """Store entries, check that they can be read, and leave the rest to the store."""
    for number in range(count):
        store.put(str(number), make_states(number))
    assert same(store.get("0", spec_of()), make_states(0))


def put_and_return(directory: str, count: int) -> None:
    """Store entries through tiers and end without a word."""
    fill_store(open_store(directory), count)


def read_all(directory: str, numbers: list[int], results: Any) -> None:
    """Report which entries a fresh process finds unchanged."""
    store = DiskKVStore(directory)
    results.put([same(store.get(str(n), spec_of()), make_states(n)) for n in numbers])


def mixed_load(
    directory: str, size_limit: int, seconds: float, seed: int, keys: int, wrong: Any
) -> None:
    """Do everything that a store can do from four threads, and count what goes wrong."""
    torch.set_num_threads(1)
    store = DiskKVStore(directory, size_limit)
    end = time.monotonic() + seconds

    def work(thread_seed: int) -> None:
        rng = random.Random(thread_seed)
        while time.monotonic() < end:
            number = int(keys * rng.random() ** 2)
            key, states = str(number), make_states(number)
            try:
                action = rng.random()
                if action < 0.55:
                    found = store.get(key, states.spec)
                    if found is not None and not same(found, states):
                        raise AssertionError(f"wrong bytes for {key}")
                elif action < 0.9:
                    store.put(key, states, tag=f"model-{number % 3}")
                elif action < 0.94:
                    with store.pin([key]):
                        if store.put(key, states) and not same(store.get(key, states.spec), states):
                            # Another process may replace or delete a pinned entry; never change it.
                            continue
                elif action < 0.97:
                    store.delete(key)
                elif action < 0.99:
                    store.stats()
                else:
                    store.prune(to_size=size_limit // 2)
            except BaseException as error:
                wrong.put(repr(error))
                raise

    threads = [threading.Thread(target=work, args=(seed * 100 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


def kill(process: Any) -> None:
    """End a process the hard way."""
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def run_as(user: int, scenario: Callable[[Path], object], directory: Path, errors: Any) -> None:
    """Give up all rights but those of `user`, run something, and report how it went."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        scenario(directory)
        errors.put(None)
    except BaseException:
        errors.put(traceback.format_exc())
