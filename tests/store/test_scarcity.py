"""Memory, mappings and threads run out: nothing is stored, or loaded, and nothing fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ape_integrations.core.generator import APEGenerator
from ape_integrations.store import DiskKVStore, KVStates, MemoryKVStore, TieredKVStore
from ape_integrations.store.base import KVSpec
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY
from tests.models import byte_tokenizer, tiny_model

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


def test_states_that_cannot_be_copied_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is there already; only the copy for the store fails."""
    expected = APEGenerator(tiny_model(), byte_tokenizer(), MemoryKVStore())
    answer = expected.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS).token_ids

    def allocate(_: KVSpec) -> None:
        raise OSError(12, "Cannot allocate memory")

    for store in (MemoryKVStore(), TieredKVStore(MemoryKVStore(), DiskKVStore(tmp_path))):
        generator = APEGenerator(tiny_model(), byte_tokenizer(), store)
        with monkeypatch.context() as scarce:
            scarce.setattr(KVSpec, "allocate", allocate)
            assert generator.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS).token_ids == answer
            assert store.stats().entries == 0
        generator.clear_assembled()
        result = generator.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS)
        assert result.token_ids == answer and result.cache["hits"] == 0
        with monkeypatch.context() as scarce:
            scarce.setattr(KVSpec, "allocate", allocate)
            key = "0" * 64
            assert store.get(key, generator.info.spec(3)) is None


def test_entries_in_memory_do_not_use_up_the_systems_mappings() -> None:
    """Linux maps 65,530 pieces for a process; mappings that lie side by side can be one."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    store = MemoryKVStore("1GB")
    states = KVStates([torch.zeros(2, 20, 64)], [torch.zeros(2, 20, 64)])
    before = len(maps.read_text().splitlines())
    for number in range(3000):
        assert store.put(f"{number:064x}", states)
    assert len(maps.read_text().splitlines()) - before < 300


@pytest.mark.parametrize("tiers", [1, 2])
def test_without_threads_the_callers_own_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: int
) -> None:
    disk = DiskKVStore(tmp_path)
    store = disk if tiers == 1 else TieredKVStore(MemoryKVStore(), disk)
    generator = APEGenerator(tiny_model(), byte_tokenizer(), store)
    reference = APEGenerator(tiny_model(), byte_tokenizer(), MemoryKVStore())
    answer = reference.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS).token_ids

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", start)
        assert generator.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS).token_ids == answer
        generator.clear_assembled()
        known = generator.generate(PREFIX, DOCUMENTS, QUERY, **SETTINGS)
        assert known.token_ids == answer and known.cache["misses"] == 0
    generator.close()
    assert disk.stats().entries == 4  # the prefix is one
