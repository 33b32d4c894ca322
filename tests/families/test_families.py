"""Every served family: against the float64 reference, and against the model's own generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ape_integrations.core.config import APEConfig
from ape_integrations.core.decoding import ContextDrafts
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import MemoryKVStore
from tests.families.registry import SERVED, model_of
from tests.models import VOCAB, byte_tokenizer
from tests.reference import reference_greedy, reference_logits

T, S = 0.8, 1.2
STEPS = 10

Record = Callable[[str, object], None]


def ids(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


# Contexts and prompt are longer than the models' sliding windows of six tokens.
PREFIX, QUERY = ids(1, 5), ids(2, 7)
CONTEXTS = [ids(3, 11), ids(4, 4), ids(5, 17)]


def attached(model: Any, **config: Any) -> APEGenerator:
    settings = {"attention_temperature": T, "scaling_factor": S, **config}
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(**settings))


def greedy(generator: APEGenerator, contexts: list[list[int]]) -> tuple[list[int], Tensor]:
    """Decode greedily; ids and the logits of each step."""
    rows: list[Tensor] = []

    def record(_: Tensor, scores: Tensor) -> Tensor:
        rows.append(scores[0].clone())
        return scores

    result = generator.generate_ids(
        PreparedPrompt(PREFIX, contexts, QUERY),
        max_new_tokens=STEPS,
        do_sample=False,
        logits_processor=[record],
        eos_token_id=-1,
    )
    return result.token_ids, torch.stack(rows).double()


def own_greedy(model: Any, sequence: list[int]) -> tuple[list[int], Tensor]:
    """Decode greedily with transformers alone."""
    result = model.generate(
        torch.tensor([sequence]),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(sequence) :].tolist(), torch.cat(result.logits).double()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> float:
    """Assert agreement, relative to the logits where they are large; the largest difference."""
    scale = max(1.0, float(expected.abs().max()) / 10)
    difference = float((actual.double() - expected.double()).abs().max())
    assert difference <= tolerance * scale
    return difference


@pytest.fixture(params=SERVED)
def title(request: pytest.FixtureRequest, record_property: Record) -> str:
    record_property("family", request.param)
    return str(request.param)


def test_reference_equals_the_family_itself(title: str) -> None:
    """The float64 reference is this family's attention: one sequence, past the window."""
    model = copy.deepcopy(model_of(title)).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(input_ids=torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]]), use_cache=False)
    expected = own.logits[0, -len(QUERY) :]
    reference = reference_logits(model_of(title), PREFIX, CONTEXTS[2:], QUERY, 1.0, 1.0)
    # Some families compute norms or rotations in fp32 whatever their dtype.
    close(reference, expected, 1e-5)


def test_contexts_equal_brute_force(title: str, record_property: Record) -> None:
    """Several contexts with T and S not 1; the self-check passes on the way."""
    generator = attached(model_of(title))
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    expected = reference_logits(generator.model, PREFIX, CONTEXTS, QUERY, T, S)
    plain = reference_logits(generator.model, PREFIX, CONTEXTS, QUERY, 1.0, 1.0)
    # Otherwise this test could not fail.
    assert float((expected - plain).abs().max()) > 0.02
    record_property("error", close(logits, expected))


def test_decoding_equals_brute_force(title: str) -> None:
    """Decoded tokens and their logits, past the window of layers that have one."""
    generator = attached(model_of(title))
    tokens, rows = greedy(generator, CONTEXTS)
    expected, logits = reference_greedy(generator.model, PREFIX, CONTEXTS, QUERY, T, S, STEPS)
    assert tokens == expected
    close(rows, logits)


def test_drafted_tokens_are_verified_exactly(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and wrong guesses, read several at a time, past the window: the same tokens."""
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}
    plain = attached(model_of(title), draft_tokens=0, self_check=False)
    expected = plain.generate_ids(prompt, **settings).token_ids
    proposals = []

    def propose(_: ContextDrafts, new: list[int]) -> list[int]:
        proposals.append([*expected[len(new) : len(new) + 3], 5])
        return proposals[-1]

    monkeypatch.setattr(ContextDrafts, "propose", propose)
    drafting = attached(model_of(title), self_check=False)
    assert drafting.generate_ids(prompt, **settings).token_ids == expected
    # Several tokens a step, or the guesses were not used.
    assert 2 <= len(proposals) <= 4


def test_batch_gives_each_query_its_own_answer(title: str) -> None:
    """Queries of unequal length over the same contexts, padded to the left."""
    generator = attached(model_of(title), self_check=False)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}
    prompts = [PreparedPrompt(PREFIX, CONTEXTS, ids(seed, seed)) for seed in (9, 2, 5)]
    alone = [generator.generate_ids(prompt, **settings).token_ids for prompt in prompts]
    together = generator.generate_batch_ids(prompts, **settings)
    assert [result.token_ids for result in together] == alone


def test_one_context_equals_sequential_generation(title: str) -> None:
    """One context, T = S = 1: the model's own tokens."""
    tokens, rows = greedy(attached(model_of(title)), CONTEXTS[2:])
    expected, logits = own_greedy(model_of(title), [*PREFIX, *CONTEXTS[2], *QUERY])
    assert tokens == expected
    close(rows, logits)


def test_one_context_equals_sequential_in_bf16(title: str, record_property: Record) -> None:
    """Cached contexts add no more error to bf16 than bf16 has anyway."""
    exact, model = model_of(title), copy.deepcopy(model_of(title)).to(torch.bfloat16)
    sequence = torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]])
    with torch.no_grad():
        expected = exact(input_ids=sequence, use_cache=False).logits[0, -len(QUERY) :]
        own = model(input_ids=sequence, use_cache=False).logits[0, -len(QUERY) :]
    logits = attached(model).query_logits(PREFIX, CONTEXTS[2:], QUERY)
    assert logits.dtype == torch.bfloat16
    rounding = float((own.double() - expected).norm() / expected.norm())
    error = float((logits.double() - expected).norm() / expected.norm())
    record_property("bf16", f"{error:.3f} / {rounding:.3f}")
    assert error <= 1.5 * rounding + 0.01
