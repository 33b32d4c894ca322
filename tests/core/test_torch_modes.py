"""Answers do not depend on what the caller has set for torch."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ape_integrations
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}


def ids(seed: int, length: int) -> list[int]:
    return [(37 * seed + 11 * place * place + 5 * place) % 370 + 10 for place in range(length)]


PREFIX, QUERY = ids(1, 5), ids(2, 7)
CONTEXTS = [ids(3, 11), ids(4, 4), ids(5, 17)]


def made(**config: Any) -> APEGenerator:
    store = MemoryKVStore()
    return APEGenerator(tiny_model(), byte_tokenizer(), store, APEConfig(**config))


def everything(generator: APEGenerator, mode: str) -> list[Any]:
    """Ask in every way that makes tensors which outlast a question."""
    # transformers' own beam search takes tensors off the default device.
    beams = 1 if mode == "default device" else 2

    def ask(contexts: list[list[int]], query: list[int], **settings: Any) -> list[int]:
        prompt = PreparedPrompt(PREFIX, contexts, query)
        return generator.generate_ids(prompt, **{**SETTINGS, **settings}).token_ids

    answer = ask(CONTEXTS, QUERY)
    batch = [PreparedPrompt(PREFIX, CONTEXTS, ids(seed, seed)) for seed in (9, 2, 5)]
    texts = ["one text", "and two"]
    generator.warm("another prefix", texts, show_progress=False)
    return [
        answer,
        ask(CONTEXTS, [*QUERY, *answer, *ids(7, 6)]),
        ask(CONTEXTS[:2], QUERY),
        ask(CONTEXTS, QUERY, num_beams=beams),
        ask([], QUERY),
        [result.token_ids for result in generator.generate_batch_ids(batch, **SETTINGS)],
        generator.query_logits(PREFIX, CONTEXTS, QUERY).argmax(dim=-1).tolist(),
        "".join(generator.stream("another prefix", texts, "what?", **SETTINGS)),
    ]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic algorithms": deterministic,
    # What lands there by mistake cannot be computed with any more.
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("config", [{}, {"recompute_ratio": 0.3}, {"max_contexts": 2}])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_same_inside_and_outside_of_a_mode(
    mode: str, config: dict[str, Any]
) -> None:
    """States made inside are read outside, and the other way round."""
    inside: Callable[[], contextlib.AbstractContextManager[Any]] = MODES[mode]
    expected = everything(made(**config), mode)
    generator = made(**config)
    with inside():
        first = everything(generator, mode)
    outside = everything(generator, mode)
    with inside():
        again = everything(generator, mode)
    generator.clear_assembled()
    assert [first, outside, again, everything(generator, mode)] == [expected] * 4


@pytest.mark.parametrize("mode", MODES)
def test_generator_may_be_made_inside_of_a_mode(mode: str) -> None:
    expected = everything(made(recompute_ratio=0.3), mode)
    model = tiny_model()
    with MODES[mode]():
        config = APEConfig(recompute_ratio=0.3)
        generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore(), config)
    assert everything(generator, mode) == expected


def test_assembled_cache_leaves_the_callers_mode_as_it_was() -> None:
    generator = made()
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    with torch.inference_mode():
        with generator.assemble(prompt):
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
    with generator.assemble(prompt):
        pass
    assert torch.is_grad_enabled()


#: Functions that make a tensor on the default device where none is named.
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"}
FACTORIES |= {"randn", "randperm", "tensor", "zeros"}


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    root = Path(ape_integrations.__file__).parent
    unnamed, seen = [], 0
    for folder in ("core", "store", "llama_index", "langchain"):
        for path in (root / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "torch"
                    and node.func.attr in FACTORIES
                ):
                    seen += 1
                    if not any(keyword.arg == "device" for keyword in node.keywords):
                        unnamed.append(f"{path.name}:{node.lineno}")
    assert seen > 20
    assert not unnamed
