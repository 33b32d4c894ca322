"""Contexts in sequence: moved keys, and a share of the tokens computed again.

Parallel encoding hides contexts from one another, so a token whose meaning depends on an earlier
context has the wrong states. Here the contexts are laid out one after the other, in the prompt's
order; all of their tokens go through the first layers again, with attention to everything before
them; and the tokens whose states this changes most go on through the whole model. What is computed
takes the place of what was cached, in a copy of the states. With all tokens chosen this is
sequential encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ape_integrations.core.attention import Partition, PartitionedStates, attend, merge
from ape_integrations.core.cache import APECache, APECacheLayer, ContextLayout
from ape_integrations.core.context_sets import Layers
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.model import ModelInfo, last_logits_only
from ape_integrations.core.rotation import KeyRotation

#: Leading tokens of a context that are always among the chosen ones.
STARTS = 4

#: Queries that attend together: only keys among their own need a mask.
_BLOCK = 256

#: Most of the layers that may be read by all tokens to find out which ones change.
_MEASURED_SHARE = 1 / 3


class _Collected(Exception):
    """All that was wanted of a forward pass is there."""


@dataclass
class _Reading:
    """Context tokens that are on their way through the model.

    Parameters
    ----------
    indices : Tensor
        Places in the sequence of all contexts, ascending, ``(length,)``, on the CPU.
    last_layer : int or None
        Stop when this layer has its states; None: at the end.
    change : Tensor, optional
        Squared change of each token's keys and values in the last layer, and the squares of what
        they were, ``(2, 2, length)``.
    """

    indices: Tensor
    last_layer: int | None = None
    change: Tensor | None = None


@dataclass(frozen=True)
class SequencedStates(PartitionedStates):
    """Keys and values of contexts in sequence, some of whose tokens are the queries.

    Parameters
    ----------
    indices : Tensor
        Places of the query tokens in the sequence of all contexts, ascending, on the CPU.
    """

    indices: Tensor = field(kw_only=True)

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what each token reads of everything before it in sequence, itself included."""
        outputs = []
        # Layers that share an earlier layer's states may ask for the last tokens alone (Gemma 4).
        places = self.indices[-query.shape[2] :]
        for start in range(0, len(places), _BLOCK):
            block = places[start : start + _BLOCK]
            rows = query[:, :, start : start + len(block)]
            partials = [
                attend(rows, part, scaling, softcap, mask)
                for part, mask in self._visible(block, sliding_window)
            ]
            outputs.append(merge(partials, sinks, query.dtype))
        return torch.cat(outputs, dim=2)

    def _visible(self, places: Tensor, window: int | None) -> list[tuple[Partition, Tensor | None]]:
        """Return partitions that tokens see, each with its mask ``(1, tokens, keys)``."""
        prefix, contexts = self.rest[0], self.contexts
        assert contexts is not None
        first, last = int(places[0]), int(places[-1])
        offset = contexts.first_position
        if window is not None and offset + last >= window:
            return self._within(places, window)
        own = _piece(contexts, first, last + 1)
        mask = None
        if last + 1 - first > len(places):
            columns = torch.arange(first, last + 1, device="cpu")
            mask = (columns <= places[:, None])[None].to(own.keys.device)
        return [
            (part, part_mask)
            for part, part_mask in (
                (prefix, None),
                (_piece(contexts, 0, first, causal=False), None),
                (own, mask),
            )
            if part.keys.shape[2]
        ]

    def _within(self, places: Tensor, window: int) -> list[tuple[Partition, Tensor | None]]:
        """Return what tokens see within a sliding window."""
        prefix, contexts = self.rest[0], self.contexts
        assert contexts is not None
        offset = contexts.first_position
        start = max(0, int(places[0]) - window + 1)
        near = _piece(contexts, start, int(places[-1]) + 1, causal=False)
        distance = places[:, None] - torch.arange(start, int(places[-1]) + 1, device="cpu")
        parts = [(near, (distance >= 0) & (distance < window))]
        distance = places[:, None] + offset - torch.arange(offset, device="cpu")
        if bool((distance < window).any()):
            parts.append((prefix, distance < window))
        return [(part, mask[None].to(part.keys.device)) for part, mask in parts]


def _piece(part: Partition, start: int, end: int, *, causal: bool = True) -> Partition:
    """Return tokens ``start`` to ``end`` of contexts in sequence."""
    first = part.first_position + start
    return Partition(
        part.keys[:, :, start:end],
        part.values[:, :, start:end],
        lambda: torch.arange(first, first + end - start, device=part.keys.device),
        first,
        first + end - start - 1,
        causal,
    )


class _SequenceLayer(APECacheLayer):
    """One layer's states of contexts in sequence, which tokens on their way through replace."""

    def __init__(
        self,
        index: int,
        reading: _Reading,
        layout: ContextLayout,
        prefix: tuple[Tensor, Tensor],
        contexts: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__(layout, prefix, contexts)
        self._index = index
        self._reading = reading

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[PartitionedStates, PartitionedStates]:
        """Put the tokens' new states in place of their old ones."""
        assert self._contexts is not None
        indices = self._reading.indices.to(key_states.device)
        measured = self._index == self._reading.last_layer
        changes, sizes = [], []
        for kept, new in (
            (self._contexts.keys, key_states),
            (self._contexts.values, value_states),
        ):
            if measured:
                old = kept[0][:, indices].float()
                changes.append((new[0].float() - old).square().sum(dim=(0, 2)))
                sizes.append(old.square().sum(dim=(0, 2)))
            kept[0][:, indices] = new[0]
        if measured:
            pair = torch.stack(changes), torch.stack(sizes)
            self._reading.change = torch.stack(pair).cpu()
            raise _Collected
        states = SequencedStates(
            [self._prefix],
            self._contexts,
            self.layout.prefix_length,
            1.0,
            1.0,
            indices=self._reading.indices,
        )
        return states, states


class SequenceArranger:
    """Turns contexts that were encoded side by side into contexts that stand in sequence.

    Parameters
    ----------
    model : PreTrainedModel
        A model that APE attention is attached to.
    info : ModelInfo
        What :func:`~ape_integrations.core.model.attach` returned.
    encoder : ContextEncoder
        The model's encoder.
    max_batch_tokens : int
        Tokens of one forward pass.

    Raises
    ------
    ConfigError
        The model's keys cannot be moved to other positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        info: ModelInfo,
        encoder: ContextEncoder,
        max_batch_tokens: int,
    ) -> None:
        self._model = model
        self._info = info
        self._max_batch_tokens = max_batch_tokens
        self._rotation = KeyRotation(model, info, encoder)
        self._forward_kwargs = last_logits_only(model)
        self.measured_layer = _measured_layer(model, len(info.layers))

    @torch.no_grad()
    def arrange(
        self,
        prefix: Layers,
        contexts: Sequence[Sequence[int]],
        layers: Layers,
        ratio: float,
    ) -> None:
        """Put contexts in sequence, in place.

        Parameters
        ----------
        prefix : list of (Tensor, Tensor)
            Per layer, states of the shared prefix ``(kv_heads, prefix_length, head_dim)``.
        contexts : sequence of token ids
            In the order of the buffer.
        layers : list of (Tensor, Tensor)
            Per layer, states of all contexts ``(kv_heads, total, head_dim)``, each encoded alone
            right behind the prefix. A copy that nobody else reads.
        ratio : float
            Share of the tokens behind the first context that is computed again; the first
            context's states are those of a sequence anyway.
        """
        lengths = tuple(map(len, contexts))
        prefix_length, first = prefix[0][0].shape[1], lengths[0]
        layout = ContextLayout(prefix_length, lengths, sequential=True)
        if first == layout.total:
            return
        cpu = torch.device("cpu")
        shared = ContextLayout(prefix_length, lengths).positions(cpu)
        self._rotation.move(
            [keys[:, first:] for keys, _ in layers], shared[first:], layout.positions(cpu)[first:]
        )
        if not ratio:
            return
        count = round(ratio * (layout.total - first))
        ids = torch.tensor([token for context in contexts for token in context], device="cpu")
        places = torch.arange(first, layout.total, device="cpu")
        if count < len(places):
            change = self._read(prefix, layout, layers, ids, places, self.measured_layer)
            if not count or self.measured_layer == len(layers) - 1:
                return
            places = places[_chosen(change, lengths, count)]
        self._read(prefix, layout, layers, ids, places)

    def _read(
        self,
        prefix: Layers,
        layout: ContextLayout,
        layers: Layers,
        ids: Tensor,
        places: Tensor,
        last_layer: int | None = None,
    ) -> Tensor:
        """Send tokens through the model up to a layer; return how much that layer's states change.

        Earlier tokens go first, so that later ones read their new states in every layer.
        """
        changes = []
        for indices in places.split(self._max_batch_tokens):
            reading = _Reading(indices, last_layer)
            cache = APECache(layout, prefix)
            cache.layers = [
                _SequenceLayer(index, reading, layout, *states)
                for index, states in enumerate(zip(prefix, layers, strict=True))
            ]
            device = self._info.input_device
            try:
                self._model(
                    input_ids=ids[indices][None].to(device),
                    position_ids=(indices + layout.prefix_length)[None].to(device),
                    past_key_values=cache,
                    use_cache=True,
                    **self._forward_kwargs,
                )
            except _Collected:
                assert reading.change is not None
                changes.append(reading.change)
        if not changes:
            return torch.empty(0, device="cpu")
        change, size = torch.cat(changes, dim=-1)
        # Keys and values count alike, however large they are.
        relative: Tensor = (change / size.mean(dim=-1, keepdim=True).clamp_min(1e-12)).sum(dim=0)
        return relative


def _measured_layer(model: Any, layers: int) -> int:
    """Return the layer whose states show which tokens other contexts change.

    It stands behind the first layer that looks back without a window, if that comes early.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = list(getattr(base.config.get_text_config(decoder=True), "layer_types", None) or ())
    first = kinds.index("full_attention") if "full_attention" in kinds else 0
    if first + 1 > layers * _MEASURED_SHARE:
        first = 0
    return min(first + 1, layers - 1)


def _chosen(change: Tensor, lengths: Sequence[int], count: int) -> Tensor:
    """Return which tokens behind the first context are computed again, ascending, ``(count,)``."""
    score = change.clone()
    start = 0
    for length in lengths[1:]:
        score[start : start + min(STARTS, length)] += change.max() + 1
        start += length
    return score.topk(count).indices.sort().values
