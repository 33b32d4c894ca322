"""The math: against transformers' own sequential logits, and against a float64 brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ape_integrations.core import attention, products
from ape_integrations.core.attention import (
    SPLIT_FROM,
    PartitionedStates,
    partitioned_attention,
)
from ape_integrations.core.cache import APECacheLayer, ContextLayout
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import MemoryKVStore
from tests.models import VOCAB, byte_tokenizer, tiny_model
from tests.reference import reference_greedy, reference_logits

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def _ids(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


PREFIX, QUERY = _ids(1, 5), _ids(2, 7)
CONTEXTS = [_ids(3, 11), _ids(4, 4), _ids(5, 17), _ids(6, 17), _ids(7, 1)]


def _generator(family: str, **config: object) -> APEGenerator:
    return APEGenerator(tiny_model(family), byte_tokenizer(), MemoryKVStore(), APEConfig(**config))


@pytest.mark.parametrize("family", FAMILIES)
def test_single_context_equals_sequential(family: str) -> None:
    """One context, T = S = 1: logits and greedy tokens are the model's own."""
    generator = _generator(family, attention_temperature=1.0, scaling_factor=1.0)
    logits = generator.query_logits(PREFIX, CONTEXTS[:1], QUERY)
    sequence = torch.tensor([[*PREFIX, *CONTEXTS[0], *QUERY]])
    with torch.no_grad():
        expected = generator.model(input_ids=sequence).logits[0, -len(QUERY) :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.9, 0.9), (0.6, 1.3), (1.4, 0.5)])
def test_contexts_equal_brute_force(family: str, temperature: float, scale: float) -> None:
    """Several contexts, any T and S."""
    generator = _generator(family, attention_temperature=temperature, scaling_factor=scale)
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    expected = reference_logits(generator.model, PREFIX, CONTEXTS, QUERY, temperature, scale)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_brute_force(family: str) -> None:
    """Sixteen decoded tokens, each step's logits included."""
    generator = _generator(family, attention_temperature=0.7, scaling_factor=1.2)
    expected, rows = reference_greedy(generator.model, PREFIX, CONTEXTS, QUERY, 0.7, 1.2, 16)
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    seen: list[torch.Tensor] = []

    def record(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores[0].clone())
        return scores

    result = generator.generate_ids(
        prompt, max_new_tokens=16, do_sample=False, logits_processor=[record], eos_token_id=-1
    )
    assert result.token_ids == expected
    torch.testing.assert_close(torch.stack(seen).double(), rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [4, 9, 14, 20, 33])
def test_sliding_window_masks_by_position(window: int) -> None:
    """Windows shorter and longer than the contexts; contexts longer than the window."""
    model = tiny_model("mistral", sliding_window=window)
    generator = APEGenerator(
        model,
        byte_tokenizer(),
        MemoryKVStore(),
        APEConfig(attention_temperature=0.8, scaling_factor=1.1),
    )
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    expected = reference_logits(model, PREFIX, CONTEXTS, QUERY, 0.8, 1.1)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


def test_order_of_contexts_does_not_matter() -> None:
    """Contexts share positions, so a set has no order."""
    generator = _generator("llama")
    forward = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    backward = _generator("llama").query_logits(PREFIX, CONTEXTS[::-1], QUERY)
    torch.testing.assert_close(forward, backward, atol=1e-4, rtol=0)


def test_cached_fresh_and_batched_states_agree() -> None:
    """One by one, in one padded batch, in pieces, or read back: the same logits."""
    fresh = _generator("qwen3", max_batch_tokens=1)
    batched = _generator("qwen3", max_batch_tokens=1000)
    pieces = _generator("qwen3", max_batch_tokens=6)
    expected = fresh.query_logits(PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(
        batched.query_logits(PREFIX, CONTEXTS, QUERY), expected, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        pieces.query_logits(PREFIX, CONTEXTS, QUERY), expected, atol=1e-4, rtol=0
    )
    batched._sets.clear()
    again = batched.query_logits(PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)


def test_empty_prefix_equals_brute_force() -> None:
    """Contexts may start the sequence."""
    generator = _generator("llama")
    logits = generator.query_logits([], CONTEXTS, QUERY)
    expected = reference_logits(generator.model, [], CONTEXTS, QUERY, 0.9, 0.9)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_plain_and_fused_attention_agree(
    softcap: float | None, with_sinks: bool, window: int | None
) -> None:
    """Softcap, sinks and windows against one softmax over reweighted float64 logits."""
    torch.manual_seed(1)
    temperature, scale, prefix, lengths, tail, new = 0.8, 1.2, 3, (5, 9, 2), 4, 6
    heads, kv_heads, dim = 6, 2, 8
    layout = ContextLayout(prefix, lengths)
    states = [torch.randn(kv_heads, n, dim) for n in (prefix, prefix, sum(lengths), sum(lengths))]
    layer = APECacheLayer(
        layout, (states[0], states[1]), (states[2], states[3]), temperature, scale
    )
    layer.update(torch.randn(2, kv_heads, tail, dim), torch.randn(2, kv_heads, tail, dim))
    parts, _ = layer.update(torch.randn(2, kv_heads, new, dim), torch.randn(2, kv_heads, new, dim))
    query = torch.randn(2, heads, new, dim)
    sinks = torch.randn(heads) if with_sinks else None
    output = partitioned_attention(
        query, parts, scaling=0.3, softcap=softcap, sliding_window=window, sinks=sinks
    )

    keys = torch.cat(
        [states[0].expand(2, -1, -1, -1), states[2].expand(2, -1, -1, -1), layer.tail()[0]], 2
    ).double()
    values = torch.cat(
        [states[1].expand(2, -1, -1, -1), states[3].expand(2, -1, -1, -1), layer.tail()[1]],
        2,
    ).double()
    positions = torch.tensor(
        [*range(prefix), *(prefix + i for n in lengths for i in range(n)), *range(12, 22)]
    )
    rows = torch.arange(16, 22)
    context = torch.zeros(len(positions), dtype=torch.bool)
    context[prefix : prefix + sum(lengths)] = True
    logits = torch.einsum(
        "bhid,bhjd->bhij", query.double(), keys.repeat_interleave(heads // kv_heads, 1)
    )
    logits = logits * 0.3
    logits = torch.where(context, logits / temperature, logits)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    visible = positions[None] <= rows[:, None]
    if window:
        visible &= rows[:, None] - positions[None] < window
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.masked_fill(~context, -torch.inf).logsumexp(-1, keepdim=True)
    shift = torch.where(lse.isinf(), 0.0, (scale * temperature - 1) * lse)
    logits = torch.where(context, logits + shift, logits)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(2, heads, new, 1)
        weights = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    expected = torch.einsum(
        "bhij,bhjd->bhid", weights, values.repeat_interleave(heads // kv_heads, 1)
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [SPLIT_FROM, SPLIT_FROM + 7, 3000])
@pytest.mark.parametrize("way", ["flash", "products", "few rows", "few rows, long"])
def test_long_contexts_equal_one_softmax(
    total: int, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in pieces or by plain products while decoding, batch items and head groups alike."""
    if way != "flash" and not products.onednn_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_pays", lambda: way != "flash")
    monkeypatch.setattr(products, "pieces_pay", lambda: way.startswith("few"))
    monkeypatch.setattr(attention, "PRODUCTS_LOGITS", 4 * total)
    monkeypatch.setattr(attention, "PRODUCTS_ROWS", 4)
    monkeypatch.setattr(attention, "PRODUCTS_FEW_ROWS", 100)
    monkeypatch.setattr(attention, "PRODUCTS_LONG", 10 if way.endswith("long") else 1 << 20)
    torch.manual_seed(2)
    heads, kv_heads, dim, batch, prefix = 6, 2, 8, 3, 4
    layout = ContextLayout(prefix, (total - 100, 100))
    states = [torch.randn(kv_heads, n, dim, dtype=dtype) for n in (prefix, prefix, total, total)]
    layer = APECacheLayer(layout, (states[0], states[1]), (states[2], states[3]), 0.8, 1.1)
    parts, _ = layer.update(
        torch.randn(batch, kv_heads, 1, dim, dtype=dtype),
        torch.randn(batch, kv_heads, 1, dim, dtype=dtype),
    )
    query = torch.randn(batch, heads, 1, dim, dtype=dtype)
    output = partitioned_attention(query, parts, scaling=1.0)
    whole = dataclasses.replace(parts, contexts=None)
    keys = states[2].double().repeat_interleave(heads // kv_heads, 0)
    logits = torch.einsum("bhid,hjd->bhij", query.double(), keys) / 0.8
    lse = logits.logsumexp(-1)
    contexts = torch.einsum(
        "bhij,hjd->bhid", logits.softmax(-1), states[3].double().repeat_interleave(3, 0)
    )
    rest = partitioned_attention(query.double(), _as_double(whole), scaling=1.0)
    rest_keys = torch.cat([p.keys.double().expand(batch, -1, -1, -1) for p in parts.rest], 2)
    rest_lse = torch.einsum(
        "bhid,bhjd->bhij", query.double(), rest_keys.repeat_interleave(3, 1)
    ).logsumexp(-1)
    weight = (0.8 * 1.1 * lse - rest_lse).sigmoid().unsqueeze(-1)
    expected = weight * contexts + (1 - weight) * rest
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)


def _as_double(states: PartitionedStates) -> PartitionedStates:
    rest = [
        dataclasses.replace(part, keys=part.keys.double(), values=part.values.double())
        for part in states.rest
    ]
    return dataclasses.replace(states, rest=rest)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_shares_its_prefix(batch: int) -> None:
    """Encoding many short contexts behind a long prefix must not copy it for each of them."""
    prefix = (torch.randn(2, 50, 8), torch.randn(2, 50, 8))
    layer = APECacheLayer(ContextLayout(50, ()), prefix, tail_capacity=4)
    parts, _ = layer.update(torch.randn(batch, 2, 4, 8), torch.randn(batch, 2, 4, 8))
    assert layer.keys.shape[2] == (54 if batch == 1 else 4)
    assert parts.rest[0].keys.shape[:3] == (1, 2, 50)
