"""What a faulty store does to answers: nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.store import (
    DiskKVStore,
    KVStore,
    MemoryKVStore,
    RedisKVStore,
    TieredKVStore,
)
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY
from tests.models import byte_tokenizer, tiny_model
from tests.redis_server import Server


def _generator(store: KVStore) -> APEGenerator:
    return APEGenerator(tiny_model("llama"), byte_tokenizer(), store, APEConfig(max_new_tokens=12))


def _expected() -> list[int]:
    return _generator(MemoryKVStore()).generate(PREFIX, DOCUMENTS, QUERY).token_ids


def _forget(generator: APEGenerator) -> None:
    """Leave the store as the only place to find states."""
    generator.clear_assembled()
    generator._source._prefixes.clear()


@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "empty", "remove", "foreign"])
def test_damaged_entries_give_the_same_answer(damage: str, tmp_path: Path) -> None:
    generator = _generator(DiskKVStore(tmp_path / "store"))
    first = generator.generate(PREFIX, DOCUMENTS, QUERY)
    generator.store.flush()
    entries = sorted((tmp_path / "store").rglob("*.kv"))
    assert len(entries) == len(DOCUMENTS) + 1  # and the prefix
    states = entries[0].read_bytes()
    for path in entries:
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        if damage == "truncate":
            data = data[:middle]
        elif damage == "flip":
            data[middle] ^= 1
        elif damage == "zero":
            data[middle : middle + 512] = bytes(512)
        elif damage == "empty":
            data.clear()
        elif damage == "foreign":
            data[:] = states
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(data)
    _forget(generator)
    again = generator.generate(PREFIX, DOCUMENTS, QUERY)
    assert again.token_ids == first.token_ids == _expected()
    # One entry may have got its own states back.
    assert again.cache["misses"] >= len(DOCUMENTS) - (damage == "foreign")
    _forget(generator)
    assert generator.generate(PREFIX, DOCUMENTS, QUERY).cache["hits"] == 3


def test_index_that_is_cut_short_in_use_gives_the_same_answer(tmp_path: Path) -> None:
    generator = _generator(DiskKVStore(tmp_path / "store"))
    generator.generate(PREFIX, DOCUMENTS, QUERY)
    index = tmp_path / "store" / "cache.db"
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 3])
    _forget(generator)
    assert generator.generate(PREFIX, DOCUMENTS, QUERY).token_ids == _expected()


def test_store_that_vanishes_gives_the_same_answer(tmp_path: Path) -> None:
    generator = _generator(DiskKVStore(tmp_path / "store"))
    generator.generate(PREFIX, DOCUMENTS, QUERY)
    shutil.rmtree(tmp_path / "store")
    _forget(generator)
    again = generator.generate(PREFIX, DOCUMENTS, QUERY)
    assert again.cache["misses"] == 3
    assert again.token_ids == _expected()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("redis", reason="redis-py is not installed")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_redis_killed_and_restarted_during_a_generation_changes_nothing(server: Server) -> None:
    expected = _expected()
    store = RedisKVStore(server.url, timeout=0.5, retry_after=0.0)
    generator = _generator(store)
    assert generator.generate(PREFIX, DOCUMENTS, QUERY).cache["misses"] == 3
    _forget(generator)
    assert generator.generate(PREFIX, DOCUMENTS, QUERY).cache["hits"] == 3

    stream = generator.stream(PREFIX, DOCUMENTS, QUERY)
    first = next(stream)
    server.kill()
    assert first + "".join(stream) == stream.result.text
    assert stream.result.token_ids == expected

    _forget(generator)
    down = generator.generate(PREFIX, DOCUMENTS, QUERY)
    assert (down.cache["hits"], down.cache["misses"]) == (0, 3)
    assert down.token_ids == expected

    server.start()
    _forget(generator)
    back = generator.generate(PREFIX, DOCUMENTS, QUERY)
    assert back.token_ids == expected
    _forget(generator)
    assert generator.generate(PREFIX, DOCUMENTS, QUERY).cache["hits"] == 3


def test_slow_tier_that_dies_leaves_the_fast_one(server: Server, tmp_path: Path) -> None:
    remote = RedisKVStore(server.url, timeout=0.5, retry_after=0.0)
    store = TieredKVStore(MemoryKVStore("1MB"), DiskKVStore(tmp_path / "store"), remote)
    generator = _generator(store)
    generator.generate(PREFIX, DOCUMENTS, QUERY)
    store.flush()
    server.kill()
    _forget(generator)
    again = generator.generate(PREFIX, DOCUMENTS, QUERY)
    assert again.cache["hits"] == 3
    assert again.token_ids == _expected()


def test_stored_states_are_never_changed_by_a_generation(tmp_path: Path) -> None:
    store = MemoryKVStore()
    generator = _generator(store)
    generator.generate(PREFIX, DOCUMENTS, QUERY)
    prompt = generator.prepare(PREFIX, DOCUMENTS, QUERY)
    keys = generator._source.keys(prompt.prefix, prompt.contexts)
    before = [
        store.get(key, generator.info.spec(len(ids)))
        for key, ids in zip(keys, prompt.contexts, strict=True)
    ]
    kept = [[tensor.clone() for tensor in states.keys] for states in before if states]
    for number in range(3):
        generator.generate(PREFIX, DOCUMENTS, f"{QUERY} {number}", num_beams=1 + number)
    for key, ids, tensors in zip(keys, prompt.contexts, kept, strict=True):
        states = store.get(key, generator.info.spec(len(ids)))
        assert states is not None
        for now, then in zip(states.keys, tensors, strict=True):
            assert torch.equal(now, then)
