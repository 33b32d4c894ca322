from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from store_helpers import entry_files, entry_nbytes, make_states, same, spec_of

from ape_integrations.store import DiskKVStore, KVStates
from ape_integrations.store.base import from_layers
from ape_integrations.store.quantization import KV_DTYPES
from ape_integrations.store.serialization import (
    EntryError,
    deserialize,
    serialize,
    verify,
)


class Bytes:
    """An entry in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.nbytes, self.offset = data, len(data), 0

    def readinto(self, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            piece = self.data[self.offset : self.offset + len(buffer)]
            if len(piece) < len(buffer):
                raise EntryError("ends early")
            buffer[:] = piece
            self.offset += len(piece)


def to_bytes(states: KVStates, kv_dtype: str = "auto", key: str = "key") -> bytes:
    return b"".join(serialize(key, states, kv_dtype))


def read(data: bytes, states: KVStates, kv_dtype: str = "auto", key: str = "key") -> KVStates:
    destination = states.spec.allocate()
    assert deserialize(Bytes(data), key, states.spec, destination, kv_dtype) == len(data)
    return from_layers(destination)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_states_come_back_bit_for_bit(dtype):
    states = make_states(1, tokens=33, layers=3, dtype=dtype)
    assert same(read(to_bytes(states), states), states)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_entries_are_safetensors_files(kv_dtype, tmp_path):
    states = make_states(1, tokens=33)
    path = tmp_path / "entry.safetensors"
    path.write_bytes(to_bytes(states, kv_dtype))
    assert path.stat().st_size == entry_nbytes("key", states.spec, kv_dtype)
    tensors = safetensors.torch.load_file(path)
    assert tensors["layer.001.value"].shape == (2, 33, 4)
    if kv_dtype == "auto":
        assert torch.equal(tensors["layer.001.key"], states.keys[1])
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["num_tokens"] == "33" and metadata["format"] == "2"


def test_large_tensors_are_read_in_pieces():
    states = make_states(2, tokens=40_000, layers=2)
    assert states.keys[0].nbytes > 2 * 2**20
    assert same(read(to_bytes(states), states), states)


def test_more_tensors_than_one_system_call_takes(tmp_path):
    states = make_states(3, tokens=1, layers=700)
    store = DiskKVStore(tmp_path / "kv")
    assert store.put("k", states)
    assert same(store.get("k", states.spec), states)


def test_verify_recognises_a_good_entry():
    states = make_states(1)
    assert verify(Bytes(to_bytes(states, "int8"))) == ("key", states.spec, "int8")


@pytest.mark.parametrize(
    ("key", "spec", "kv_dtype"),
    [
        ("other", spec_of(), "auto"),
        ("key", spec_of(tokens=5), "auto"),
        ("key", spec_of(layers=1), "auto"),
        ("key", spec_of(dtype=torch.bfloat16), "auto"),
        ("key", spec_of(), "float16"),
    ],
)
def test_reader_who_expects_anything_else_is_refused(key, spec, kv_dtype):
    data = to_bytes(make_states(1))
    with pytest.raises(EntryError):
        deserialize(Bytes(data), key, spec, spec.allocate(), kv_dtype)


def _positions(data: bytes) -> dict[str, int]:
    """Return one byte position of every class that an entry has."""
    header = 8 + int.from_bytes(data[:8], "little")
    positions = {
        "length, low": 0,
        "length, high": 7,
        "brace": 8,
        "padding": header - 1,
        "first byte": header,
        "last byte": len(data) - 1,
    }
    for name in (b"checksum", b"format", b"num_tokens", b"dtype", b"kv_dtype", b"shape"):
        positions[name.decode()] = data.index(b'"' + name + b'":') + len(name) + 5
    for layer in range(2):
        for kind in ("key", "value"):
            positions[f"name {layer} {kind}"] = data.index(f"layer.{layer:03d}.{kind}".encode())
    positions["offsets"] = data.index(b"data_offsets") + 16
    step = (len(data) - header) // 8
    positions |= {f"tensor bytes {i}": header + i * step for i in range(8)}
    return positions


def test_damage_at_every_kind_of_position_is_a_miss(tmp_path):
    states = make_states(1)
    store = DiskKVStore(tmp_path / "kv")
    for count, (where, position) in enumerate(_positions(to_bytes(states)).items(), 1):
        store.put("k", states)
        (file,) = entry_files(store.directory)
        data = bytearray(file.read_bytes())
        data[position] ^= 0x01
        file.write_bytes(data)
        assert store.get("k", states.spec) is None, where
        assert not store.contains("k"), f"{where}: bad entries are dropped"
        assert not file.exists()
        assert store.stats().corrupted == count


def test_every_single_flipped_bit_of_an_entry_is_found():
    states = make_states(1, tokens=1, layers=1)
    data = to_bytes(states)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(EntryError):
            read(bytes(damaged), states)
        with pytest.raises(EntryError):
            verify(Bytes(bytes(damaged)))


def test_truncation_at_every_length_is_found():
    states = make_states(1, tokens=1, layers=1)
    data = to_bytes(states)
    for length in range(len(data)):
        with pytest.raises(EntryError):
            read(data[:length], states)
        with pytest.raises(EntryError):
            verify(Bytes(data[:length]))
    with pytest.raises(EntryError):
        read(data + b"\0", states)


def test_truncated_entry_is_logged_once(tmp_path, caplog):
    states = make_states(1)
    store = DiskKVStore(tmp_path / "kv")
    store.put("k", states)
    (file,) = entry_files(store.directory)
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(3):
        assert store.get("k", states.spec) is None
    assert len([r for r in caplog.records if "Dropped" in r.message]) == 1
    assert store.stats().misses == 3 and store.stats().corrupted == 1


MUTATIONS: list[Callable[[random.Random, bytes, bytes], bytes]] = [
    lambda rng, data, other: rng.randbytes(rng.randrange(3000)),
    lambda rng, data, other: rng.randbytes(len(data)),
    lambda rng, data, other: data[: rng.randrange(len(data))],
    lambda rng, data, other: data + rng.randbytes(rng.randrange(1, 100)),
    lambda rng, data, other: _flip(rng, data, rng.randrange(1, 20), len(data)),
    lambda rng, data, other: _flip(rng, data, rng.randrange(1, 20), 900),
    lambda rng, data, other: rng.randbytes(8) + data[8:],
    lambda rng, data, other: data[: (cut := rng.randrange(100, len(data) - 1))] + other[cut:],
    lambda rng, data, other: (1 << rng.randrange(64)).to_bytes(8, "little") + data[8:],
    lambda rng, data, other: data[:8] + b"[" * (len(data) - 8),
    lambda rng, data, other: _splice(rng, data, b"9" * rng.randrange(1, 6000)),
    lambda rng, data, other: _splice(
        rng, data, rng.choice([b"null", b"{}", b"-1", b'"', b"1e999"])
    ),
]


def _flip(rng: random.Random, data: bytes, count: int, below: int) -> bytes:
    damaged = bytearray(data)
    for _ in range(count):
        damaged[rng.randrange(below)] = rng.randrange(256)
    return bytes(damaged)


def _splice(rng: random.Random, data: bytes, piece: bytes) -> bytes:
    at = rng.randrange(8, 900)
    body = data[8:at] + piece + data[at:]
    length = int.from_bytes(data[:8], "little") + len(piece)
    return length.to_bytes(8, "little") + body


def _fuzz(directory: Path, rounds: int, stored_every: int) -> None:
    """Read mutated entries from memory, and every so many of them from a store."""
    rng = random.Random(0)
    states, store = make_states(1), DiskKVStore(directory)
    logging.disable()
    key = "v1//auto/k"
    other = b"".join(serialize(key, make_states(2)))
    good = b"".join(serialize(key, states))
    for round_ in range(rounds):
        data = MUTATIONS[round_ % len(MUTATIONS)](rng, good, other)
        for reader in (lambda d: read(d, states, key=key), lambda d: verify(Bytes(d))):
            try:
                found = reader(data)
                # A mutation may by chance leave a good entry; then it is what it claims to be.
                assert data == good and (not isinstance(found, KVStates) or same(found, states))
            except EntryError:
                assert data != good
        if round_ % stored_every == 0:
            store.put("k", states)
            (file,) = entry_files(directory)
            file.write_bytes(data)
            assert (store.get("k", states.spec) is None) == (data != good)
    logging.disable(logging.NOTSET)


def test_fuzzed_entries_are_misses(tmp_path):
    _fuzz(tmp_path / "kv", 500, stored_every=7)


@pytest.mark.stress
def test_ten_thousand_fuzzed_entries_are_misses(tmp_path):
    _fuzz(tmp_path / "kv", 10_000, stored_every=1)
