"""RoPE scaling: stored keys depend on the model and their tokens, not on what ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from ape_integrations.core.model import max_positions
from ape_integrations.errors import ContextWindowError
from tests.families.registry import SHAPE
from tests.families.test_families import (
    CONTEXTS,
    PREFIX,
    QUERY,
    STEPS,
    S,
    T,
    attached,
    close,
    greedy,
    ids,
    own_greedy,
)
from tests.reference import reference_greedy, reference_logits

ORIGINAL = 64
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [3.0, 4.0, 6.0, 9.0],
    "original_max_position_embeddings": ORIGINAL,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "longrope": LONG,
}


def model_with(scaling: str) -> Any:
    shape = {**SHAPE, "max_position_embeddings": ORIGINAL if scaling == "dynamic" else 512}
    if scaling == "longrope":
        shape["original_max_position_embeddings"] = ORIGINAL
    config = (Phi3Config if scaling == "longrope" else LlamaConfig)(
        **shape, rope_parameters=dict(SCALINGS[scaling])
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rope_equals_brute_force(scaling: str) -> None:
    """Several contexts, T and S not 1, and decoded tokens."""
    model = model_with(scaling)
    generator = attached(model)
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    close(logits, reference_logits(model, PREFIX, CONTEXTS, QUERY, T, S))
    tokens, rows = greedy(generator, CONTEXTS)
    expected, expected_rows = reference_greedy(model, PREFIX, CONTEXTS, QUERY, T, S, STEPS)
    assert tokens == expected
    close(rows, expected_rows)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rope_equals_sequential_generation(scaling: str) -> None:
    model = model_with(scaling)
    expected, expected_rows = own_greedy(model, [*PREFIX, *CONTEXTS[2], *QUERY])
    tokens, rows = greedy(attached(model), CONTEXTS[2:])
    assert tokens == expected
    close(rows, expected_rows)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_states_do_not_depend_on_a_long_prompt_that_ran_before(scaling: str) -> None:
    """Somebody else's long prompt changes frequencies inside the model, but not our states."""
    model = model_with(scaling)
    generator = attached(model)
    expected = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids(9, ORIGINAL + 30)]), use_cache=False)
    after = attached(model).query_logits(PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(after, expected)
    # The whole of the served length, in one pass right after a long one.
    long = ids(8, generator.info.max_positions - len(PREFIX) - len(QUERY))
    before = attached(model_with(scaling)).query_logits(PREFIX, [long], QUERY)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids(9, ORIGINAL + 30)]), use_cache=False)
    torch.testing.assert_close(generator.query_logits(PREFIX, [long], QUERY), before)


@pytest.mark.parametrize(("scaling", "limit"), [("dynamic", ORIGINAL - 1), ("longrope", ORIGINAL)])
def test_positions_end_where_the_frequencies_would_change(scaling: str, limit: int) -> None:
    """Beyond, a query would be turned by other frequencies than the keys that it meets."""
    generator = attached(model_with(scaling))
    assert generator.info.max_positions == limit
    with pytest.raises(ContextWindowError, match=f"{limit} positions"):
        generator.query_logits(PREFIX, CONTEXTS, ids(7, ORIGINAL))
    # Contexts share their positions, so that their sum may well be longer.
    many = [ids(20 + i, 40) for i in range(4)]
    logits = generator.query_logits(PREFIX, many, QUERY)
    close(logits, reference_logits(generator.model, PREFIX, many, QUERY, T, S))


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_fixed_frequencies_do_not_limit_positions(scaling: str) -> None:
    assert max_positions(model_with(scaling).config) == 512
