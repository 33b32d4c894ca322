"""Decoding behind cached contexts, with drafts copied from the contexts and verified exactly.

Answers often quote their sources. Where the last tokens stand in a context, the tokens that follow
there are a good guess of what comes next; reading them all takes one forward pass instead of one
each. Every guess is checked against the token that is chosen anyway, so the output is the same as
without drafts, greedy and sampled alike (prompt lookup decoding, a form of speculative decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ape_integrations.core.cache import APECache

#: Tokens that must agree before a draft is made; shorter agreements are mostly chance.
_MATCH = 3

#: How far back agreements are compared to choose the best place.
_LONGEST_MATCH = 12


class ContextDrafts:
    """Guesses the next tokens from places in the contexts where the last tokens stand.

    Parameters
    ----------
    texts : sequence of sequences of int
        Token ids to copy from, each by itself.
    max_tokens : int
        Longest draft.
    """

    def __init__(self, texts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._texts = texts
        self._max_tokens = max_tokens
        self._length = max_tokens
        self._indexed = False

    def _index(self) -> None:
        """Sort the texts' pairs of tokens; not before the first token is out."""
        # A separator keeps drafts from running from one text into the next.
        joined = [token for text in self._texts for token in (*text, -1)]
        self._tokens = np.asarray(joined, dtype=np.int64)
        pairs = (self._tokens[:-1] << 32) + self._tokens[1:]
        self._order = np.argsort(pairs, kind="stable")
        self._pairs = pairs[self._order]
        self._indexed = True

    def propose(self, ids: Sequence[int]) -> list[int]:
        """Return a guess of what follows ``ids``; empty where nothing agrees."""
        if len(ids) < _MATCH:
            return []
        if not self._indexed:
            self._index()
        pair = (ids[-2] << 32) + ids[-1]
        first, last = np.searchsorted(self._pairs, [pair, pair + 1])
        best, place = _MATCH - 1, -1
        for start in self._order[first:last]:
            agreement = self._agreement(int(start) + 1, ids)
            if agreement > best:
                best, place = agreement, int(start) + 2
        if place < 0:
            return []
        draft: list[int] = self._tokens[place : place + self._length].tolist()
        return draft[: draft.index(-1)] if -1 in draft else draft

    def _agreement(self, end: int, ids: Sequence[int]) -> int:
        """Return how many tokens up to ``end`` equal the last ones of ``ids``."""
        count = 0
        while count < min(_LONGEST_MATCH, len(ids), end + 1):
            if self._tokens[end - count] != ids[-1 - count]:
                break
            count += 1
        return count

    def learn(self, drafted: int, accepted: int) -> None:
        """Lengthen drafts while they are right, shorten them when they are not."""
        if drafted:
            grown = 2 * self._length if accepted == drafted else accepted + 2
            self._length = min(self._max_tokens, grown)


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafts: ContextDrafts,
    **model_kwargs: Any,
) -> Tensor:
    """Decode one sequence; a ``custom_generate`` function of ``model.generate()``.

    Parameters
    ----------
    input_ids : Tensor
        Logical ids of the prompt, ``(1, length)``; the cache stands for all but the last ones.
    drafts : ContextDrafts
        Where guesses come from.

    Returns
    -------
    Tensor
        Prompt and new ids, ``(1, length + new)``.
    """
    cache: APECache = model_kwargs.pop("past_key_values")
    for owned in ("attention_mask", "position_ids", "use_cache"):
        model_kwargs.pop(owned, None)
    prompt_length = input_ids.shape[1]
    pending = input_ids[:, cache.get_seq_length() :]
    draft: list[int] = []
    while True:
        logits = _read(model, cache, pending, draft, model_kwargs)
        accepted = 0
        for position in range(len(draft) + 1):
            any_ids: Any = input_ids
            scores: Any = logits_processor(any_ids, logits[position : position + 1])
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token.to(input_ids.device)], dim=-1)
            any_ids = input_ids
            if bool(stopping_criteria(any_ids, scores).all()):
                cache.crop(accepted - len(draft))
                return input_ids
            if position == len(draft) or int(token) != draft[position]:
                break
            accepted += 1
        cache.crop(accepted - len(draft))
        drafts.learn(len(draft), accepted)
        pending = input_ids[:, -1:]
        start = max(prompt_length, input_ids.shape[1] - _LONGEST_MATCH)
        # Behind the last token that may be generated the model may have no position.
        room = generation_config.max_length - input_ids.shape[1] - 1
        draft = drafts.propose(input_ids[0, start:].tolist())[:room]


def _read(
    model: PreTrainedModel,
    cache: APECache,
    pending: Tensor,
    draft: Sequence[int],
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Return logits behind the last pending token and each drafted one, ``(1 + draft, vocab)``."""
    ids = torch.cat([pending, torch.tensor([draft], dtype=torch.long, device=pending.device)], 1)
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    kept = len(draft) + 1
    if "logits_to_keep" in model_kwargs:
        model_kwargs = {**model_kwargs, "logits_to_keep": kept}
    logits: Tensor = model(
        input_ids=ids,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **model_kwargs,
    ).logits
    return logits[0, -kept:].float()
