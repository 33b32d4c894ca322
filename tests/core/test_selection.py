"""Which contexts are kept where there are more than wanted, and that the rest is never read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ape_integrations.core import selection
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.core.registry import ContextRegistry
from ape_integrations.core.selection import attention_mass, best
from ape_integrations.store import MemoryKVStore
from tests.families.registry import SERVED
from tests.models import VOCAB, byte_tokenizer, tiny_model
from tests.reference import reference_mass


def _ids(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


PREFIX, QUERY = _ids(1, 5), _ids(2, 7)
CONTEXTS = [_ids(3, 11), _ids(4, 4), _ids(5, 17), _ids(6, 17), _ids(7, 2)]
TEXTS = ["The cat sleeps.", "A dog barks at night.", "Fish swim.", "Birds fly south."]


def _generator(model: Any = None, **config: Any) -> APEGenerator:
    model = tiny_model() if model is None else model
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(**config))


def _mass(generator: APEGenerator) -> list[float]:
    """Return the attention mass of each context of CONTEXTS."""
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    with generator.assemble(prompt) as cache:
        mass = attention_mass(generator.model, generator.info, cache, [QUERY])
    order = [CONTEXTS.index(ids) for ids in generator._ordered(prompt)[1]]
    return [mass[order.index(index)] for index in range(len(CONTEXTS))]


@pytest.mark.parametrize("title", ["Llama 2, 3.x", "Mistral", "Gemma 2", "GPT-OSS"])
def test_attention_mass_equals_brute_force(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that hide contexts, softcap and sinks included."""
    model = SERVED[title].build()
    generator = _generator(model, attention_temperature=0.8, scaling_factor=1.1)
    monkeypatch.setattr(selection, "LAST", 3)
    expected = torch.tensor(reference_mass(model, PREFIX, CONTEXTS, QUERY, 0.8, 1.1, last=3))
    expected /= torch.tensor([len(ids) for ids in CONTEXTS])
    torch.testing.assert_close(torch.tensor(_mass(generator)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("title", ["Llama 2, 3.x", "Mistral", "GPT-OSS"])
def test_measuring_attention_does_not_change_it(title: str) -> None:
    """The later layers' mass is right only if every layer's output is."""
    generator = _generator(SERVED[title].build(), max_contexts=9)
    before = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    _mass(generator)
    assert torch.equal(generator.query_logits(PREFIX, CONTEXTS, QUERY), before)


@pytest.mark.parametrize(
    "config", [{}, {"context_positions": "sequential"}, {"recompute_ratio": 0.5}]
)
def test_answer_is_that_of_the_contexts_with_the_most_attention(config: dict[str, Any]) -> None:
    """In the prompt's order, whichever way they are encoded."""
    kept = best(_mass(_generator()), 2)
    logits = _generator(max_contexts=2, **config).query_logits(PREFIX, CONTEXTS, QUERY)
    expected = _generator(**config).query_logits(PREFIX, [CONTEXTS[i] for i in kept], QUERY)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_dropped_contexts_are_counted() -> None:
    """All contexts were looked up, two were read."""
    generator = _generator(max_contexts=2)
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    first = generator.generate_ids(prompt, max_new_tokens=2)
    assert (first.cache["contexts"], first.cache["dropped"]) == (2, 3)
    assert first.cache["misses"] == 5
    assert first.timings["select"] > 0
    again = generator.generate_ids(prompt, max_new_tokens=2)
    assert (again.cache["hits"], again.cache["misses"]) == (5, 0)
    assert again.token_ids == first.token_ids
    few = generator.generate_ids(PreparedPrompt(PREFIX, CONTEXTS[:2], QUERY), max_new_tokens=2)
    assert (few.cache["contexts"], few.cache["dropped"]) == (2, 0)
    assert few.timings["select"] == 0


def test_queries_of_a_batch_choose_together() -> None:
    """A batch shares its contexts, so all of its queries count."""
    queries = [_ids(seed, 6) for seed in (20, 21, 22)]
    generator = _generator(max_contexts=1)
    prompts = [PreparedPrompt(PREFIX, CONTEXTS, query) for query in queries]
    results = generator.generate_batch_ids(prompts, max_new_tokens=3, do_sample=False)
    plain = _generator()
    with plain.assemble(prompts[0]) as cache:
        mass = attention_mass(plain.model, plain.info, cache, queries)
        kept = plain._ordered(prompts[0])[1][best(mass, 1)[0]]
    for query, result in zip(queries, results, strict=True):
        alone = plain.generate_ids(
            PreparedPrompt(PREFIX, [kept], query), max_new_tokens=3, do_sample=False
        )
        assert result.token_ids == alone.token_ids
        assert result.cache["dropped"] == 4


def test_known_scores_decide_before_anything_is_loaded() -> None:
    """Contexts with low retrieval scores are neither encoded nor looked up."""
    generator = _generator(max_contexts=2)
    scores = dict(zip(TEXTS, (0.1, 0.9, 0.2, 0.8), strict=True))
    generator.registry.register(TEXTS, "Who flies?", scores)
    result = generator.generate("Answer.\n\n", TEXTS, "Who flies?", max_new_tokens=2)
    assert (result.cache["contexts"], result.cache["dropped"]) == (2, 2)
    assert (result.cache["hits"], result.cache["misses"]) == (0, 2)
    expected = _generator().generate(
        "Answer.\n\n", [TEXTS[1], TEXTS[3]], "Who flies?", max_new_tokens=2
    )
    assert result.token_ids == expected.token_ids
    stream = generator.stream("Answer.\n\n", TEXTS, "Who flies?", max_new_tokens=2)
    list(stream)
    assert stream.result.cache["dropped"] == 2
    batch = generator.generate_batch("Answer.\n\n", TEXTS, ["Who flies?", "Why?"], max_new_tokens=2)
    assert [answer.cache["dropped"] for answer in batch] == [2, 2]


def test_scores_of_one_retrieval_are_compared_alone() -> None:
    """The query's own retrieval comes first; scores of different ones are never mixed."""
    registry = ContextRegistry()
    registry.register(TEXTS, "one", {text: float(i) for i, text in enumerate(TEXTS)})
    registry.register(TEXTS, "two", {text: float(-i) for i, text in enumerate(TEXTS)})
    registry.register(["other"], "three", {"other": 5.0})
    assert registry.scores(TEXTS, "Question: one?") == [0.0, 1.0, 2.0, 3.0]
    assert registry.scores(TEXTS, "Question: two?") == [0.0, -1.0, -2.0, -3.0]
    assert registry.scores(TEXTS, "rewritten") == [0.0, -1.0, -2.0, -3.0]
    assert registry.scores([*TEXTS, "other"], "one") is None
    assert registry.scores([f"Source 1:\n{TEXTS[2]}\n"], "one") == [2.0]
    registry.clear()
    assert registry.scores(TEXTS, "one") is None


def test_best_keeps_the_order_and_the_first_of_equals() -> None:
    """Positions of the highest scores, ascending."""
    assert best([0.1, 0.9, 0.5, 0.9], 2) == [1, 3]
    assert best([1.0, 1.0, 1.0], 2) == [0, 1]
    assert best([1.0], 3) == [0]
