from __future__ import annotations

import pytest
import torch
from store_helpers import entry_files, entry_nbytes

from ape_integrations.store import DiskKVStore, KVStates
from ape_integrations.store.quantization import dequantize_into, quantize

TOKENS, HEADS, DIM = 64, 2, 32


def realistic_states(dtype: torch.dtype = torch.float32) -> KVStates:
    """Return keys with a few channels that are large for every token, as models have them."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(HEADS, TOKENS, DIM, generator=generator)
    keys[:, :, 3] = keys[:, :, 3] * 0.5 + 40
    values = torch.randn(HEADS, TOKENS, DIM, generator=generator)
    values[:, 5] *= 30
    return KVStates([keys.to(dtype)], [values.to(dtype)])


@pytest.mark.parametrize(
    ("kv_dtype", "tolerance"),
    [("bfloat16", 2**-8), ("float16", 2**-11), ("float8_e4m3", 2**-4), ("int8", None)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_within_the_dtypes_precision(tmp_path, kv_dtype, tolerance, dtype):
    states = realistic_states(dtype)
    store = DiskKVStore(tmp_path / "kv", kv_dtype=kv_dtype)
    assert store.put("k", states)
    found = store.get("k", states.spec)
    own = torch.finfo(dtype).eps
    for tensor, expected, axis in (
        (found.keys[0], states.keys[0], 1),
        (found.values[0], states.values[0], 2),
    ):
        assert tensor.dtype == dtype
        error, exact = (tensor.double() - expected.double()).abs(), expected.double().abs()
        if tolerance is None:
            # Half a step of the scale of the channel (keys) or of the token and head (values).
            allowed = exact.amax(dim=axis, keepdim=True) / 127 * 0.501 + own * exact
        else:
            allowed = (tolerance + own) * exact + 2.0**-9 * (exact.amax(axis, keepdim=True) / 448)
        assert (error <= allowed + 1e-9).all()


def test_large_key_channels_do_not_spoil_the_others():
    keys = realistic_states().keys[0]
    restored = torch.empty_like(keys)
    dequantize_into(restored, quantize(keys, torch.int8, is_key=True))
    small = [channel for channel in range(DIM) if channel != 3]
    assert (restored - keys)[:, :, small].abs().max() < 0.02
    dequantize_into(restored, quantize(keys, torch.int8, is_key=False))
    assert (restored - keys)[:, :, small].abs().max() > 0.1, "per token it would"


def test_quantised_entries_are_smaller(tmp_path):
    spec = realistic_states().spec
    exact = entry_nbytes("k", spec, "auto")
    for kv_dtype, factor in (("bfloat16", 2), ("int8", 4), ("float8_e4m3", 4)):
        store = DiskKVStore(tmp_path / kv_dtype, kv_dtype=kv_dtype)
        store.put("k", realistic_states())
        (file,) = entry_files(store.directory)
        assert file.stat().st_size < exact / factor * 1.2


def test_zero_states_stay_zero(tmp_path):
    states = KVStates([torch.zeros(1, 4, 8)], [torch.zeros(1, 4, 8)])
    for kv_dtype in ("int8", "float8_e4m3"):
        store = DiskKVStore(tmp_path / kv_dtype, kv_dtype=kv_dtype)
        store.put("k", states)
        assert not store.get("k", states.spec).keys[0].any()


def test_states_that_are_not_finite_are_not_quantised(tmp_path, caplog):
    states = KVStates([torch.full((1, 4, 8), torch.inf)], [torch.zeros(1, 4, 8)])
    store = DiskKVStore(tmp_path / "kv", kv_dtype="int8")
    assert not store.put("k", states)
    assert "not finite" in caplog.text
    assert store.put("good", realistic_states()), "storing goes on"


def test_values_beyond_float16_saturate(tmp_path):
    states = KVStates([torch.full((1, 4, 8), 1e6)], [torch.full((1, 4, 8), -1e6)])
    store = DiskKVStore(tmp_path / "kv", kv_dtype="float16")
    store.put("k", states)
    found = store.get("k", states.spec)
    assert found.keys[0].max() == 65504 and found.values[0].min() == -65504


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "value", "expected"),
    [
        (torch.float16, "bfloat16", 65500.0, 65504.0),
        (torch.float16, "bfloat16", -65504.0, -65504.0),
        (torch.bfloat16, "float16", 70144.0, 65536.0),
        (torch.float32, "bfloat16", 3.4028e38, torch.finfo(torch.bfloat16).max),
    ],
)
def test_rounding_makes_nothing_infinite(tmp_path, dtype, kv_dtype, value, expected):
    tensor = torch.full((1, 4, 8), value, dtype=dtype)
    store = DiskKVStore(tmp_path / "kv", kv_dtype=kv_dtype)
    states = KVStates([tensor], [tensor])
    store.put("k", states)
    found = store.get("k", states.spec)
    assert found.keys[0].unique().tolist() == found.values[0].unique().tolist() == [expected]
