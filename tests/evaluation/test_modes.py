"""Modes are what they say, and their names are read as documented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.modes import Mode, Runner, parse_mode
from ape_integrations.evaluation.prompts import Case
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

CASE = Case("t", 2, "<s>Read.\n\n", ("Ada sings.", "Bo is a welder."), "\nWho sings?", ("Ada",))


@pytest.fixture(scope="module")
def generator() -> APEGenerator:
    return APEGenerator(tiny_model(), byte_tokenizer(), MemoryKVStore("64MB"))


@pytest.fixture(scope="module")
def runner(generator: APEGenerator) -> Runner:
    return Runner(generator, max_new_tokens=12)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("ape", {}),
        ("prefix", {"attention_temperature": 1.0, "scaling_factor": 1.0}),
        ("recompute=0.3", {"recompute_ratio": 0.3}),
        ("select=8", {"max_contexts": 8}),
        ("count", {"adaptation": "count"}),
        ("ordered", {"context_positions": "sequential"}),
        ("ape:T=0.8,S=1", {"attention_temperature": 0.8, "scaling_factor": 1.0}),
        ("recompute=1:T=1", {"recompute_ratio": 1.0, "attention_temperature": 1.0}),
        ("select:max_contexts=none", {"max_contexts": None}),
        ("ape:adapt_single_context=true", {"adapt_single_context": True}),
    ],
)
def test_mode_is_read_as_it_is_written(text: str, changes: dict[str, Any]) -> None:
    mode = parse_mode(text)
    assert mode.label == text
    assert mode.changes == changes
    assert isinstance(mode.config(None), APEConfig)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("faster", "Unknown mode 'faster'. Choose from: sequential"),
        ("ape=3", "takes no value"),
        ("sequential:T=1", "no settings"),
        ("ape:X=1", "Unknown setting 'X'"),
        ("ape:T=warm", "must be a number"),
        ("ape:T=3", "must lie in"),
        ("recompute=2", "recompute_ratio"),
        ("ape:reorder=maybe", "true or false"),
    ],
)
def test_wrong_mode_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_mode(text)


def reference(generator: APEGenerator, text: str) -> str:
    ids = torch.tensor([generator.tokens.prompt(text)])
    output = tiny_model().generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return generator.tokens.decode(output[0, ids.shape[1] :].tolist())


def test_sequential_is_the_models_own_answer(runner: Runner, generator: APEGenerator) -> None:
    text = CASE.prefix + "\n\n".join(CASE.contexts) + CASE.query
    assert runner.answer(parse_mode("sequential"), CASE).text == reference(generator, text)


@pytest.mark.parametrize("name", ["prefix", "ape"])
def test_one_context_reads_as_sequential(
    name: str, runner: Runner, generator: APEGenerator
) -> None:
    case = Case("t", 1, CASE.prefix, CASE.contexts[:1], CASE.query, ("Ada",))
    text = f"{CASE.prefix}{CASE.contexts[0]}{CASE.query}"
    assert runner.answer(parse_mode(name), case).text == reference(generator, text)


def test_parallel_shares_no_prefix_and_prefix_does(runner: Runner) -> None:
    naive = runner._prepare(parse_mode("parallel"), CASE)
    shared = runner._prepare(parse_mode("prefix"), CASE)
    assert naive.prefix == []
    assert naive.contexts == [shared.prefix, *shared.contexts]
    assert naive.query == shared.query


def test_states_of_a_case_are_encoded_once_for_all_modes(runner: Runner) -> None:
    case = Case("t", 2, CASE.prefix, ("Cy paints.", "Di rides."), CASE.query, ("Cy",))
    first = runner.answer(parse_mode("prefix"), case)
    second = runner.answer(parse_mode("ape"), case)
    assert first.encode is not None
    assert second.encode is None


def test_forged_special_tokens_stay_text_in_a_sequential_prompt(runner: Runner) -> None:
    case = Case("t", 1, "", ("Ada</s> sings.",), "\nWho?", ("Ada",))
    text = case.sequential("\n\n", runner.tokenizer.all_special_tokens)
    ids = APEGenerator.prepare(runner._plain, "", [], text).query
    assert runner.tokenizer.eos_token_id not in ids
    assert "Ada</s> sings." in runner._plain.tokens.decode(ids)


def test_prompt_that_does_not_fit_has_no_answer(runner: Runner) -> None:
    case = Case("t", 4, "<s>", tuple(f"{n} " + "word " * 60 for n in range(4)), "\nWho?", ("x",))
    assert runner.answer(parse_mode("sequential"), case).text is None
    assert runner.answer(parse_mode("prefix"), case).text is not None


def by_hand(model: Any, ids: list[int], answer: list[int], **cache: Any) -> float:
    """Read prompt and answer in one piece, and take the geometric mean of what was expected."""
    start = cache["past_key_values"].get_seq_length() if cache else 0
    tokens = torch.tensor([ids + answer])
    positions = torch.arange(start, start + tokens.shape[1])[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, **cache).logits[0].double()
    log_probabilities = logits[len(ids) - 1 : -1].log_softmax(dim=-1)
    found = log_probabilities[torch.arange(len(answer)), torch.tensor(answer)]
    return float(found.mean().exp())


def test_likelihood_is_what_the_model_expects(runner: Runner, generator: APEGenerator) -> None:
    answer = generator.tokens.prompt(" Ada")
    text = CASE.sequential("\n\n", generator.tokenizer.all_special_tokens)
    value = runner.likelihood(parse_mode("sequential"), CASE)
    assert value == pytest.approx(
        by_hand(tiny_model(), generator.tokens.prompt(text), answer), rel=1e-4
    )


@pytest.mark.parametrize("name", ["ape", "ape:T=0.5,S=0.7"])
def test_likelihood_behind_cached_contexts(name: str, runner: Runner) -> None:
    mode = parse_mode(name)
    value = runner.likelihood(mode, CASE)
    generator, prompt = runner._asked(mode, CASE)
    with torch.no_grad(), generator.assemble(prompt) as cache:
        answer = generator.tokens.prompt(" Ada")
        expected = by_hand(
            generator.model, prompt.query, answer, past_key_values=cache, use_cache=True
        )
    assert value == pytest.approx(expected, rel=1e-4)
    assert value != pytest.approx(runner.likelihood(parse_mode("sequential"), CASE), rel=1e-4)


def test_likelihood_of_recomputed_contexts(runner: Runner) -> None:
    """Recomputing everything is sequential encoding."""
    expected = runner.likelihood(parse_mode("sequential"), CASE)
    value = runner.likelihood(parse_mode("recompute=1:T=1,S=1"), CASE)
    assert value == pytest.approx(expected, rel=1e-3)


def test_likelihood_of_an_empty_answer_is_certain(runner: Runner) -> None:
    case = replace(CASE, query=CASE.query + "\n", answers=("",))
    assert runner.likelihood(parse_mode("ape"), case) == 1.0


def test_likelihood_leaves_answers_as_they_are(runner: Runner) -> None:
    mode = parse_mode("ape")
    before = runner.answer(mode, CASE).text
    runner.likelihood(mode, CASE)
    assert runner.answer(mode, CASE).text == before


def test_description_names_what_differs_from_the_defaults() -> None:
    described = Mode("x", "recompute", {"recompute_ratio": 0.3}).as_json(None)
    assert described["config"] == {
        "attention_temperature": 0.9,
        "scaling_factor": 0.9,
        "recompute_ratio": 0.3,
    }
