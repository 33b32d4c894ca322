"""Rules that only show beyond the length of the self-check are read off the masks themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from ape_integrations.core.attention import partitioned_attention
from ape_integrations.core.cache import APECacheLayer, ContextLayout
from ape_integrations.core.visibility import LayerCall, check_visibility
from ape_integrations.errors import UnsupportedModelError
from tests.families.registry import SERVED, model_of
from tests.families.test_families import CONTEXTS, PREFIX, QUERY, attached, ids

NEVER = torch.zeros(1, dtype=torch.long)
RULES = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4096),
    "chunks": masking_utils.chunked_causal_mask_function(8192, NEVER),
    "both directions": masking_utils.bidirectional_mask_function,
    "window in both directions": masking_utils.sliding_window_bidirectional_mask_function(4096),
    "pictures in both directions": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(1, 8))
    ),
    "window without pictures": masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(4096),
        masking_utils.blockwise_overlay(torch.full((1, 8), -1)),
    ),
    "chunks without pictures": masking_utils.or_masks(
        masking_utils.chunked_causal_mask_function(8192, NEVER),
        masking_utils.blockwise_overlay(torch.full((1, 8), -1)),
    ),
}


class Config:
    max_position_embeddings = 131072


def check(rule: str, window: int | None, config: Any = Config, **changes: Any) -> None:
    call = LayerCall(0, window, RULES[rule], None, False, ())
    for name, value in changes.items():
        setattr(call, name, value)
    check_visibility("AModel", [call], config, "Use another.")


@pytest.mark.parametrize(
    ("rule", "window"), [("causal", None), ("window", 4096), ("window without pictures", 4096)]
)
def test_mask_that_the_attention_function_knows_is_served(rule: str, window: int | None) -> None:
    check(rule, window)


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        ("window", None),
        ("window", 4095),
        ("window", 4097),
        ("causal", 4096),
        ("chunks", None),
        ("chunks", 8192),
        ("both directions", None),
        ("window in both directions", 4096),
        ("pictures in both directions", None),
        ("window without pictures", None),
        ("chunks without pictures", None),
    ],
)
def test_mask_by_another_rule_is_refused(rule: str, window: int | None) -> None:
    with pytest.raises(UnsupportedModelError, match=r"AModel.*another rule.*Use another"):
        check(rule, window)


def test_window_beyond_the_last_position_does_not_matter() -> None:
    class Short:
        max_position_embeddings = 4096

    check("window", None, Short)
    check("causal", 4096, Short)


def test_unknown_argument_of_an_attention_function_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="position_bias, which APE attention does not"):
        check("causal", None, unknown=("position_bias",))


def test_model_that_calls_no_attention_interface_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does not call"):
        check_visibility("AModel", [], Config, "Use another.")  # type: ignore[arg-type]


def test_window_that_only_the_mask_knows_is_refused_whatever_its_length() -> None:
    """The numerical check reads a dozen tokens and would not see it."""
    with pytest.raises(UnsupportedModelError, match="another rule"):
        attached(SERVED["Phi-3.5-MoE"].build(sliding_window=300))
    attached(SERVED["Phi-3.5-MoE"].build(sliding_window=512))


def test_observing_leaves_other_threads_and_other_models_alone() -> None:
    """A model that is being attached answers as before meanwhile."""
    from ape_integrations.core import visibility

    model = copy.deepcopy(model_of("Mistral"))
    sequence = torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]])
    with torch.no_grad():
        expected = model(input_ids=sequence, use_cache=False).logits
        model.set_attn_implementation(visibility.register("sdpa"))
        torch.testing.assert_close(model(input_ids=sequence, use_cache=False).logits, expected)


@pytest.mark.parametrize("title", ["Llama 2, 3.x", "Gemma 4 (text)", "GPT-OSS", "Mistral"])
@pytest.mark.parametrize("kept", [1, 3, 0])
def test_attached_model_answers_others_as_before(title: str, kept: int) -> None:
    """Calls without an APE cache, for all logits or the last ones alone."""
    model = copy.deepcopy(model_of(title))
    model.set_attn_implementation("eager" if title == "GPT-OSS" else "sdpa")
    sequence = torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]])
    with torch.no_grad():
        expected = model(input_ids=sequence, logits_to_keep=kept).logits
        attached(model)
        after = model(input_ids=sequence, logits_to_keep=kept).logits
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kept", [1, 2, 4, 7])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_last_queries_alone_see_what_they_see_among_all(kept: int, window: int | None) -> None:
    """Layers with shared states may leave out queries whose output nobody reads."""
    torch.manual_seed(0)
    states = [torch.randn(2, length, 8) for length in (3, 3, 14, 14)]
    layer = APECacheLayer(
        ContextLayout(3, (5, 9)), (states[0], states[1]), (states[2], states[3]), 0.8, 1.2
    )
    parts, _ = layer.update(torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8))
    query = torch.randn(1, 6, 7, 8)

    def attend(queries: Tensor) -> Tensor:
        return partitioned_attention(queries, parts, scaling=0.4, sliding_window=window)

    torch.testing.assert_close(attend(query[:, :, -kept:]), attend(query)[:, :, -kept:])


def test_several_drafted_tokens_are_read_at_once_by_shared_layers() -> None:
    """Gemma 4's last layers, asked for the logits of the last three tokens alone."""
    model = model_of("Gemma 4 (text)")
    generator = attached(model)
    from ape_integrations.core.prepared import PreparedPrompt

    prompt = PreparedPrompt(PREFIX, CONTEXTS, ids(2, 7))
    logits = []
    for kept in (0, 3):
        with generator.assemble(prompt) as cache, torch.no_grad():
            start = prompt.layout.query_position
            answer = model(
                input_ids=torch.tensor([prompt.query]),
                position_ids=torch.arange(start, start + 7)[None],
                past_key_values=cache,
                logits_to_keep=kept,
            )
            logits.append(answer.logits[:, -3:])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
