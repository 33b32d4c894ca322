from __future__ import annotations

import gc

import pytest
import torch
from store_helpers import make_states, same, spec_of

from ape_integrations.errors import ConfigError
from ape_integrations.store import KVStates, KVStore
from ape_integrations.store.disk import DiskKVStore
from ape_integrations.store.memory import MemoryKVStore
from ape_integrations.store.sizes import format_size, parse_size
from ape_integrations.store.tiered import TieredKVStore


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("512MiB", 512 * 2**20),
        ("7", 7),
        (4096, 4096),
        ("2t", 2 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("bad", ["", "20 gigs", "-1GB", "GB", 0, -5, "0.1", True, None, "1e9"])
def test_bad_size_is_a_clear_error(bad):
    with pytest.raises(ConfigError, match="size_limit"):
        parse_size(bad)


def test_sizes_are_written_for_people():
    assert [format_size(n) for n in (999, 12_340_000, 3 * 10**12)] == ["999 B", "12.3 MB", "3.0 TB"]


def test_states_know_their_spec_and_size():
    states = make_states(tokens=5, layers=3)
    assert states.spec == spec_of(5, 3)
    assert states.num_tokens == 5
    assert states.nbytes == states.spec.nbytes == 5 * 3 * (2 * 8 + 2 * 4) * 4


def test_states_cannot_be_changed():
    states = make_states()
    with pytest.raises(AttributeError):
        states.keys = ()
    with pytest.raises(TypeError):
        states.keys[0] = torch.zeros(1)  # type: ignore[index]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ([], []),
        ([torch.zeros(2, 1, 4)], []),
        ([torch.zeros(2, 4)], [torch.zeros(2, 4)]),
        ([torch.zeros(1, 2, 4)], [torch.zeros(1, 3, 4)]),
        ([torch.zeros(2, 1, 4)], [torch.zeros(2, 1, 4, dtype=torch.float16)]),
        ([torch.zeros(1, 0, 4)], [torch.zeros(1, 0, 4)]),
        ([torch.zeros(2, 1, 4, dtype=torch.int8)], [torch.zeros(2, 1, 4, dtype=torch.int8)]),
    ],
)
def test_states_that_do_not_fit_together_are_refused(keys, values):
    with pytest.raises(ConfigError):
        KVStates(keys, values)


def test_copies_do_not_keep_a_batch_alive():
    batch = torch.zeros(100, 2, 6, 8)
    states = KVStates([batch[0]], [batch[1]]).copy()
    assert states.keys[0].untyped_storage().nbytes() == states.nbytes
    batch.fill_(1)
    gc.collect()
    assert not states.keys[0].any()


def test_every_store_keeps_the_protocol(tmp_path):
    disk = DiskKVStore(tmp_path / "a")
    tiered = TieredKVStore(MemoryKVStore("1MB"), DiskKVStore(tmp_path / "b"))
    for store in (disk, MemoryKVStore("1MB"), tiered):
        assert isinstance(store, KVStore)
        with store:
            assert store.put("k", make_states(3), tag="m")
            assert "k" in store and "other" not in store
            assert same(store.get("k", spec_of()), make_states(3))
            assert store.get("k", spec_of(tokens=7)) is None
            assert store.put("k", make_states(4))
            assert same(store.get("k", spec_of()), make_states(4))
            assert store.delete("k") and not store.delete("k")
            assert store.put("a", make_states(1)) and store.put("b", make_states(2))
            store.flush()
            assert store.stats().entries == 2
            assert store.clear() == 2
            assert store.stats().entries == store.stats().bytes == 0


def test_destination_that_does_not_fit_is_an_error_not_a_miss(tmp_path):
    store = DiskKVStore(tmp_path / "kv")
    spec = spec_of()
    store.put("k", make_states())
    good = spec.allocate()
    wrong_dtype = [(k.half(), v.half()) for k, v in good]
    strided = [(k.transpose(1, 2).contiguous().transpose(1, 2), v) for k, v in good]
    for bad in (good[:1], wrong_dtype, strided, [(v, k) for k, v in good]):
        with pytest.raises(ConfigError):
            store.load("k", spec, bad)
    assert store.contains("k")


def test_load_fills_slices_of_a_larger_buffer_and_nothing_else(tmp_path):
    states = make_states(5)
    for store in (DiskKVStore(tmp_path / "kv"), MemoryKVStore("1MB")):
        store.put("k", states)
        buffers = [(torch.zeros(2, 20, 8), torch.zeros(2, 20, 4)) for _ in range(2)]
        slices = [(keys[:, 7:13], values[:, 7:13]) for keys, values in buffers]
        assert store.load("k", states.spec, slices)
        assert same(KVStates(*map(list, zip(*slices, strict=True))), states)
        for keys, values in buffers:
            assert not keys[:, :7].any() and not keys[:, 13:].any()
            assert not values[:, :7].any() and not values[:, 13:].any()


def test_writing_to_loaded_states_does_not_change_the_store(tmp_path):
    tiered = TieredKVStore(MemoryKVStore("1MB"), DiskKVStore(tmp_path / "kv"))
    for store in (tiered, MemoryKVStore("1MB"), DiskKVStore(tmp_path / "kv2")):
        given = make_states(1)
        store.put("k", given)
        given.keys[0].fill_(7)
        store.get("k", given.spec).keys[0].fill_(9)
        assert same(store.get("k", given.spec), make_states(1))
        store.flush()
        assert same(store.get("k", given.spec), make_states(1))
