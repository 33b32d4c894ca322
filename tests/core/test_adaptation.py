"""T and S for a set of contexts."""

from __future__ import annotations

import pytest
import torch

from ape_integrations.core.adaptation import adapted, by_count
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import ConfigError
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model
from tests.reference import reference_logits


def test_fixed_settings_hold_for_any_number() -> None:
    config = APEConfig(attention_temperature=0.7, scaling_factor=1.2)
    assert adapted(config, [5, 5]) == adapted(config, [5] * 40) == (0.7, 1.2)


@pytest.mark.parametrize("adaptation", ["fixed", "count"])
def test_one_context_is_not_adapted(adaptation: str) -> None:
    """Parallel encoding of one context is sequential encoding."""
    config = APEConfig(adaptation=adaptation)  # type: ignore[arg-type]
    assert adapted(config, [17]) == (1.0, 1.0)


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_recomputed_contexts_are_not_adapted(ratio: float) -> None:
    """Their states are those of a sequence, or nearly so."""
    assert adapted(APEConfig(recompute_ratio=ratio), [17, 12]) == (1.0, 1.0)


def test_temperature_falls_with_the_number_of_contexts() -> None:
    temperatures = [by_count([50] * number)[0] for number in (1, 2, 4, 16, 32, 64, 500)]
    assert temperatures == pytest.approx([1.0, 0.96, 0.92, 0.84, 0.8, 0.8, 0.8])
    assert all(by_count([50] * number)[1] == 1.0 for number in (1, 2, 64))


def test_short_contexts_beside_a_long_one_count_for_less() -> None:
    assert by_count([1000, 5, 5])[0] > 0.99 > by_count([1000, 1000, 1000])[0]


def test_number_of_contexts_reaches_the_attention() -> None:
    """The logits are those of T and S by count."""
    contexts, query = [[11, 12, 13], [14, 15, 16, 17], [18, 19]], [20, 21, 22]
    model = tiny_model()
    config = APEConfig(adaptation="count")
    generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore(), config)
    expected = reference_logits(model, [5, 6], contexts, query, *by_count([3, 4, 2]))
    logits = generator.query_logits([5, 6], contexts, query)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recompute_ratio", -0.1),
        ("recompute_ratio", 1.5),
        ("recompute_ratio", True),
        ("recompute_ratio", "half"),
        ("max_contexts", 0),
        ("max_contexts", 2.5),
        ("adaptation", "number"),
        ("context_positions", "staggered"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        APEConfig(**{name: value})  # type: ignore[arg-type]
