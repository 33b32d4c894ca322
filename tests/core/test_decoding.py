"""Drafts change how fast tokens come, never which."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.decoding import ContextDrafts
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.errors import ConfigError
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model


def test_draft_continues_the_longest_agreement() -> None:
    drafts = ContextDrafts([[1, 2, 3, 4, 5], [9, 1, 2, 3, 7, 8]], max_tokens=2)
    assert drafts.propose([9, 1, 2, 3]) == [7, 8]
    assert drafts.propose([0, 1, 2, 3]) == [4, 5]


def test_draft_stays_inside_its_text() -> None:
    drafts = ContextDrafts([[1, 2, 3, 4], [5, 6, 7]], max_tokens=8)
    assert drafts.propose([1, 2, 3]) == [4]
    assert drafts.propose([2, 3, 4]) == []


def test_short_agreement_is_no_draft() -> None:
    drafts = ContextDrafts([[1, 2, 3, 4]], max_tokens=8)
    assert drafts.propose([7, 2, 3]) == []
    assert drafts.propose([2, 3]) == []


class _Parrot:
    """A logits processor that makes a random model quote a text from somewhere in it."""

    def __init__(self, text: list[int], start: int) -> None:
        self.text, self.start, self.length = text, start, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.length = self.length or ids.shape[1]
        scores = scores.clone()
        place = self.start + ids.shape[1] - self.length
        # Every ninth token is the model's own, so that drafts fail now and then.
        if place % 9 and place < len(self.text):
            scores[:, self.text[place]] += 50
        return scores


def _generate(draft_tokens: int, **kwargs: Any) -> tuple[list[int], int]:
    """Return the tokens, and how many forward passes decoding took."""
    model = tiny_model("llama")
    generator = APEGenerator(
        model, byte_tokenizer(), MemoryKVStore(), APEConfig(draft_tokens=draft_tokens)
    )
    contexts = [list(range(20, 60)), list(range(90, 140)), list(range(55, 95))]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    prompt = PreparedPrompt([5, 6], contexts, [7, 8, 9])
    generator.generate_ids(prompt, max_new_tokens=1)
    passes.clear()
    result = generator.generate_ids(
        prompt,
        max_new_tokens=30,
        eos_token_id=-1,
        logits_processor=[_Parrot(contexts[1], 3)],
        **kwargs,
    )
    return result.token_ids, len(passes)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 1.3, "top_k": 0},
        {"do_sample": True, "top_p": 0.9, "seed": 3},
    ],
)
def test_tokens_are_the_same_in_fewer_passes(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(11)
    without, slow = _generate(0, **kwargs)
    torch.manual_seed(11)
    drafted, fast = _generate(8, **kwargs)
    assert drafted == without
    assert slow == 30
    assert fast < 20


def test_stop_in_the_middle_of_a_draft_leaves_the_cache_right() -> None:
    model = tiny_model("llama")
    generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore())
    plain = APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(draft_tokens=0))
    contexts = [list(range(20, 60)), list(range(90, 140))]
    query = [7, 8, 9]
    for end in (96, 97, 98, 101):
        kwargs: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": end}
        first = generator.generate_ids(
            PreparedPrompt([5, 6], contexts, query),
            logits_processor=[_Parrot(contexts[1], 1)],
            **kwargs,
        )
        assert first.token_ids[-1] == end
        # The next turn starts from the kept tail: a wrong crop would show here.
        turn = PreparedPrompt([5, 6], contexts, [*query, *first.token_ids, 11, 12])
        kwargs["eos_token_id"] = -1
        assert (
            generator.generate_ids(turn, **kwargs).token_ids
            == plain.generate_ids(turn, **kwargs).token_ids
        )


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_bad_draft_length_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="draft_tokens"):
        APEConfig(draft_tokens=value)
