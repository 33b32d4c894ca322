"""Vision-language models with text alone: through their language model, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.errors import UnsupportedModelError
from ape_integrations.store import MemoryKVStore
from tests.families.registry import REFUSED as FAMILIES
from tests.families.test_families import (
    CONTEXTS,
    PREFIX,
    QUERY,
    STEPS,
    Record,
    S,
    T,
    attached,
    close,
    greedy,
    own_greedy,
)
from tests.families.test_refusals import state
from tests.families.vision_language import REFUSED, SERVED, build
from tests.models import byte_tokenizer
from tests.reference import reference_greedy, reference_logits


@pytest.fixture(params=SERVED)
def title(request: pytest.FixtureRequest, record_property: Record) -> str:
    record_property("family", request.param)
    return str(request.param)


def test_text_only_contexts_equal_brute_force(title: str) -> None:
    generator = attached(build(title))
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    expected = reference_logits(generator.model, PREFIX, CONTEXTS, QUERY, T, S)
    plain = reference_logits(generator.model, PREFIX, CONTEXTS, QUERY, 1.0, 1.0)
    assert float((expected - plain).abs().max()) > 0.02
    close(logits, expected)


def test_text_only_decoding_equals_brute_force(title: str) -> None:
    generator = attached(build(title))
    tokens, rows = greedy(generator, CONTEXTS)
    expected, logits = reference_greedy(generator.model, PREFIX, CONTEXTS, QUERY, T, S, STEPS)
    assert tokens == expected
    close(rows, logits)


def test_text_only_equals_sequential_generation(title: str) -> None:
    model = build(title)
    expected, logits = own_greedy(model, [*PREFIX, *CONTEXTS[2], *QUERY])
    tokens, rows = greedy(attached(model), CONTEXTS[2:])
    assert tokens == expected
    close(rows, logits)


def test_text_only_equals_sequential_in_bf16(title: str) -> None:
    exact, model = build(title), copy.deepcopy(build(title)).to(torch.bfloat16)
    sequence = torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]])
    with torch.no_grad():
        expected = exact(input_ids=sequence, use_cache=False).logits[0, -len(QUERY) :]
        own = model(input_ids=sequence, use_cache=False).logits[0, -len(QUERY) :]
    logits = attached(model).query_logits(PREFIX, CONTEXTS[2:], QUERY)
    rounding = float((own.double() - expected).norm() / expected.norm())
    assert float((logits.double() - expected).norm() / expected.norm()) <= 1.5 * rounding + 0.01


def test_vision_tower_keeps_its_attention(title: str) -> None:
    """Only the language model answers through APE attention."""
    model = copy.deepcopy(build(title))
    vision = model.config.vision_config
    before = vision._attn_implementation
    attached(model)
    assert vision._attn_implementation == before
    assert model.config.get_text_config()._attn_implementation.startswith("ape_")


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "GLM-4.1V"])
@pytest.mark.parametrize("beams", [1, 3])
def test_positions_do_not_depend_on_an_earlier_picture(name: str, beams: int) -> None:
    """Multimodal RoPE leaves an offset of the last picture in the model; ours is another prompt."""
    model = copy.deepcopy(build(name))
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)

    def tokens() -> list[int]:
        result = attached(model).generate_ids(
            prompt, max_new_tokens=STEPS, num_beams=beams, do_sample=False, eos_token_id=-1
        )
        return result.token_ids

    expected = tokens()
    model.model.rope_deltas = torch.tensor([[-9]])
    assert tokens() == expected


@pytest.mark.parametrize("name", REFUSED)
def test_vision_language_model_is_refused_with_reason(name: str, record_property: Record) -> None:
    record_property("refused", name)
    model: Any = build(name)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][3]) as refusal:
        APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig())
    record_property("reason", str(refusal.value).split(". ")[0])
    assert state(model) == before


def test_checkpoint_is_loaded_by_name_and_t5_is_refused(tmp_path: Path) -> None:
    """Neither is registered with transformers as a causal language model."""
    build("Qwen2-VL").save_pretrained(tmp_path / "vision")
    byte_tokenizer().save_pretrained(tmp_path / "vision")
    generator = APEGenerator.from_pretrained(tmp_path / "vision", store=MemoryKVStore())
    assert generator.generate("", ["a text"], "a question", max_new_tokens=2).token_ids
    FAMILIES["T5"].build().save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        APEGenerator.from_pretrained(tmp_path / "t5", store=MemoryKVStore())
