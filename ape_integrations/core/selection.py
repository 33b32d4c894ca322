"""The contexts that matter most to a query, by retrieval score or by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ape_integrations.core.attention import (
    Partial,
    Partition,
    PartitionedStates,
    attend_partition,
    merge,
)
from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.compiled import CompilableCache
from ape_integrations.core.model import ModelInfo, last_logits_only

#: Tokens at the end of a query whose attention counts.
LAST = 8


def best(scores: Sequence[float], count: int) -> list[int]:
    """Return the indices of the highest scores, ascending; of equal ones, the first."""
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    return sorted(ranked[:count])


@dataclass(frozen=True)
class _MeasuredStates(PartitionedStates):
    """States whose contexts are read one by one, to see which get attention.

    Parameters
    ----------
    layout : ContextLayout
        Where each context begins and ends.
    mass : Tensor
        Attention that each context got from the last queries, ``(contexts,)``; added to.
    """

    layout: ContextLayout = field(kw_only=True)
    mass: Tensor = field(kw_only=True)

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what the query reads, and add up how much of it each context gave."""

        def read(part: Partition, temperature: float) -> Partial | None:
            scale = scaling / temperature
            return attend_partition(query, self, part, scale, softcap, sliding_window)

        found = {}
        for index, piece in enumerate(self._pieces()):
            seen = read(piece, self.temperature)
            if seen is not None:
                found[index] = seen
        rest = [seen for part in self.rest if (seen := read(part, 1.0)) is not None]
        if not found:
            return merge(rest, sinks, query.dtype)
        lses = torch.stack([lse for _, lse in found.values()]).float()
        # Queries whose window no context reaches give them nothing.
        total = lses.logsumexp(dim=0)
        shares = (lses - total).nan_to_num(nan=-torch.inf).exp()
        weight = total * (self.scale * self.temperature)
        others = [lse.float() for _, lse in rest]
        if sinks is not None:
            others.append(sinks.float().view(1, -1, 1).expand_as(total))
        weights = torch.stack([weight, *others]).softmax(dim=0)[0]
        mass = (shares * weights)[..., -LAST:].sum(dim=(1, 2, 3)).to(self.mass.device)
        self.mass[list(found)] += mass
        output = torch.zeros_like(rest[0].output, dtype=torch.float32)
        for share, (part_output, _) in zip(shares, found.values(), strict=True):
            output += part_output.float() * share.unsqueeze(-1)
        return merge([Partial(output, weight), *rest], sinks, query.dtype)

    def _pieces(self) -> list[Partition]:
        """Return each context as a partition of its own."""
        contexts = self.contexts
        assert contexts is not None
        pieces, start = [], 0
        for length in self.layout.lengths:
            end = start + length
            first = self.layout.prefix_length + (start if self.layout.sequential else 0)
            pieces.append(
                Partition(
                    contexts.keys[:, :, start:end],
                    contexts.values[:, :, start:end],
                    lambda start=start, end=end: contexts.positions()[start:end],  # type: ignore
                    first,
                    first + length - 1,
                )
            )
            start = end
        return pieces


class _MeasuringCache(CompilableCache):
    """An APE cache that adds up the attention its contexts get."""

    def __init__(self, cache: APECache) -> None:
        super().__init__(cache.layers)
        self._layout = cache.layout
        self.mass = torch.zeros(len(cache.layout.lengths), dtype=torch.float32, device="cpu")

    def append(self, *args: Any) -> Any:
        """Append new tokens; return everything that they may read, context by context."""
        states = super().append(*args)[0]
        values = {f.name: getattr(states, f.name) for f in fields(PartitionedStates)}
        measured = _MeasuredStates(**values, layout=self._layout, mass=self.mass)
        return measured, measured


@torch.no_grad()
def attention_mass(
    model: PreTrainedModel, info: ModelInfo, cache: APECache, queries: Sequence[Sequence[int]]
) -> list[float]:
    """Return how much attention queries pay to a token of each context, on average.

    All layers and heads count, but only the last tokens of each query: those that are about to
    answer tell the contexts apart better than all of them. Costs a forward pass over each query,
    with all contexts loaded.

    Parameters
    ----------
    cache : APECache
        Prefix and contexts, and no tail; it has none afterwards.
    queries : sequence of token ids
        Each counts alike.

    Returns
    -------
    list of float
        One per context, in the order of the cache.
    """
    measuring = _MeasuringCache(cache)
    start = cache.layout.query_position
    for query in queries:
        ids = torch.tensor([list(query)], device=info.input_device)
        model(
            input_ids=ids,
            position_ids=torch.arange(start, start + len(query), device=ids.device)[None],
            past_key_values=measuring,
            use_cache=True,
            **last_logits_only(model),
        )
        cache.reset()
    found: list[float] = (
        measuring.mass / torch.tensor(cache.layout.lengths, device="cpu")
    ).tolist()
    return found
