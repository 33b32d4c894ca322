"""The math: against transformers' own sequential logits, and against a float64 brute force."""

from __future__ import annotations

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
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
    return APEGenerator(
        tiny_model(family), byte_tokenizer(), MemoryKVStore(), APEConfig(**config)
    )


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
