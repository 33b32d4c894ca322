"""Models that ``torch.compile`` compiled: compiled code reads contexts, and answers are right."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from tests.families.registry import SERVED, model_of
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
    ids,
)
from tests.families.vision_language import SERVED as VISION
from tests.families.vision_language import build
from tests.models import tiny_model
from tests.reference import reference_greedy

#: One of each kind of attention; the others are `make stress`, as compiling takes seconds.
_ALWAYS = {"Llama 2, 3.x", "Gemma 2", "Gemma 4 (text)", "GPT-2", "Qwen2-VL"}

SETTINGS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}


class Compiler:
    """A backend that runs graphs as they are, and remembers which operations they hold."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.operations += [str(node.target) for node in graph.graph.nodes]
        return graph.forward

    @property
    def attends(self) -> bool:
        """Whether compiled code read the states of an APE cache."""
        return any("ape_integrations.attend" in operation for operation in self.operations)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield Compiler()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.stress)
        for name in (*SERVED, *VISION)
    ],
)
def test_compiled_decoding_equals_brute_force(
    title: str, compiler: Compiler, record_property: Record
) -> None:
    record_property("family", title)
    model = copy.deepcopy(model_of(title)) if title in SERVED else build(title)
    model.compile(backend=compiler)
    generator = attached(model)
    assert not compiler.operations  # what a model wants to see is read off its own code
    tokens, rows = greedy(generator, CONTEXTS)
    assert compiler.attends
    expected, logits = reference_greedy(model, PREFIX, CONTEXTS, QUERY, T, S, STEPS)
    assert tokens == expected
    close(rows, logits)


def test_compiled_model_needs_no_graph_break(compiler: Compiler) -> None:
    """Fails otherwise: ``fullgraph`` turns a graph break into an error."""
    model = tiny_model()
    model.compile(backend=compiler, fullgraph=True)
    assert len(greedy(attached(model), CONTEXTS)[0]) == STEPS
    assert compiler.attends


def test_one_graph_serves_other_contexts_and_lengths(compiler: Compiler) -> None:
    model = tiny_model()
    generator = attached(model, draft_tokens=0, self_check=False)
    model.compile(backend=compiler)
    for seed in range(3):
        # Other numbers of contexts, other lengths of contexts, queries and answers.
        contexts = [ids(10 * seed + i, 9 + 4 * i + seed) for i in range(3 + seed)]
        prompt = PreparedPrompt(PREFIX, contexts, ids(seed, 6 + 3 * seed))
        generator.generate_ids(prompt, **{**SETTINGS, "max_new_tokens": STEPS + seed})
        if seed == 1:
            compiled = len(compiler.operations)
    assert compiler.attends and len(compiler.operations) == compiled


def everything(generator: APEGenerator) -> dict[str, Any]:
    """Ask in every way that sends a model other shapes, or other caches."""

    def ask(contexts: list[list[int]], query: list[int], **settings: Any) -> list[int]:
        prompt = PreparedPrompt(PREFIX, contexts, query)
        return generator.generate_ids(prompt, **{**SETTINGS, **settings}).token_ids

    answer = ask(CONTEXTS, QUERY)
    prompts = [PreparedPrompt(PREFIX, CONTEXTS, ids(seed, seed)) for seed in (9, 2, 5)]
    found: list[Any] = [None] * 3

    def run(index: int) -> None:
        found[index] = ask(CONTEXTS, ids(50 + index, 7 + index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "answer": answer,
        "next turn": ask(CONTEXTS, [*QUERY, *answer, *ids(77, 6)]),
        "batch": [r.token_ids for r in generator.generate_batch_ids(prompts, **SETTINGS)],
        "beams": ask(CONTEXTS, QUERY, num_beams=3),
        "sampled": ask(CONTEXTS, QUERY, do_sample=True, seed=3),
        "no contexts": ask([], QUERY),
        "one token": ask(CONTEXTS, QUERY[:1]),
        "threads": found,
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"recompute_ratio": 0.3}, marks=pytest.mark.stress),
        pytest.param({"max_contexts": 2}, marks=pytest.mark.stress),
    ],
)
def test_compiling_changes_no_answer(config: dict[str, Any], compiler: Compiler) -> None:
    expected = everything(attached(tiny_model(num_hidden_layers=2), **config))
    compiled = attached(tiny_model(num_hidden_layers=2), **config)
    compiled.model.compile(backend=compiler, dynamic=True)
    assert everything(compiled) == expected
    assert compiler.attends


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
def test_compiled_machine_code_gives_the_same_tokens(compiler: Compiler) -> None:
    """With torch's own backend, and the products that APE's own calls use."""
    expected = greedy(attached(tiny_model(num_hidden_layers=1)), CONTEXTS)
    model = tiny_model(num_hidden_layers=1)
    model.forward = torch.compile(model.forward)
    tokens, rows = greedy(attached(model), CONTEXTS)
    assert tokens == expected[0]
    close(rows, expected[1])


def test_wrapper_of_a_compiled_model_is_served_by_the_model_inside() -> None:
    """As transformers' ``generate()`` does it, which such a wrapper does not compile either."""
    expected = greedy(attached(tiny_model()), CONTEXTS)[0]
    model = tiny_model()
    generator = attached(torch.compile(model))
    assert generator.model is model
    assert greedy(generator, CONTEXTS)[0] == expected
