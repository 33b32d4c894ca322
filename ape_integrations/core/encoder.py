"""Context token ids to KV states, each context alone behind the shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.context_sets import Layers
from ape_integrations.core.model import ModelInfo, last_logits_only, model_name
from ape_integrations.core.products import fast_products
from ape_integrations.store.base import KVStates


class ContextEncoder:
    """Encodes contexts in length-sorted, padded batches of bounded size.

    Parameters
    ----------
    model : PreTrainedModel
        A model that APE attention is attached to.
    info : ModelInfo
        What :func:`~ape_integrations.core.model.attach` returned.
    max_batch_tokens : int
        Tokens of one forward pass, padding included. A longer context is read in pieces.
    """

    def __init__(self, model: PreTrainedModel, info: ModelInfo, max_batch_tokens: int) -> None:
        self._model = model
        self._info = info
        self._max_batch_tokens = max_batch_tokens
        self._forward_kwargs = last_logits_only(model)

    @property
    def model_name(self) -> str:
        """Name or path that the model was loaded from, or its architecture."""
        return model_name(self._model)

    def encode(
        self, prefix: Layers, contexts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, KVStates]]:
        """Yield ``(index, states)`` of every context, batch by batch, shortest first.

        Parameters
        ----------
        prefix : list of (Tensor, Tensor)
            Per layer, states of the shared prefix ``(kv_heads, prefix_length, head_dim)``.
        contexts : sequence of token ids
            Each of at least one token.

        Yields
        ------
        tuple of int and KVStates
            Index into ``contexts`` and its states, on the CPU. They may be views into the batch:
            who keeps them copies them.
        """
        for batch in self._batches(contexts):
            yield from self._encode_batch(prefix, contexts, batch)

    def empty_prefix(self) -> Layers:
        """Return the states of no tokens at all."""
        return [
            (
                _no_tokens(layer.key_shape, self._info.dtype, device),
                _no_tokens(layer.value_shape, self._info.dtype, device),
            )
            for layer, device in zip(self._info.layers, self._info.devices, strict=True)
        ]

    def on_devices(self, states: KVStates) -> Layers:
        """Return keys and values of each layer where that layer computes."""
        devices = self._info.devices
        return [
            (key.to(device), value.to(device))
            for key, value, device in zip(states.keys, states.values, devices, strict=True)
        ]

    def _batches(self, contexts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Group contexts of similar length so that a padded batch stays within the limit."""
        batch: list[int] = []
        for index in sorted(range(len(contexts)), key=lambda i: len(contexts[i])):
            padded = (len(batch) + 1) * len(contexts[index])
            if batch and padded > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _encode_batch(
        self,
        prefix: Layers,
        contexts: Sequence[Sequence[int]],
        batch: list[int],
    ) -> Iterator[tuple[int, KVStates]]:
        prefix_length, longest = prefix[0][0].shape[1], len(contexts[batch[-1]])
        # Padding stands to the right, where causal attention never looks.
        ids = torch.zeros(len(batch), longest, dtype=torch.long, device="cpu")
        for row, index in enumerate(batch):
            ids[row, : len(contexts[index])] = torch.as_tensor(contexts[index], device="cpu")
        ids = ids.to(self._info.input_device)
        cache = APECache(ContextLayout(prefix_length, ()), prefix, tail_capacity=longest)
        for start in range(0, longest, self._max_batch_tokens):
            piece = ids[:, start : start + self._max_batch_tokens]
            positions = torch.arange(start, start + piece.shape[1], device=ids.device)
            with fast_products():
                self._model(
                    input_ids=piece,
                    position_ids=(positions + prefix_length).expand_as(piece),
                    past_key_values=cache,
                    use_cache=True,
                    **self._forward_kwargs,
                )
        for row, index in enumerate(batch):
            length = len(contexts[index])
            layers = [cache.tail(i, row, length) for i in range(len(cache.layers))]
            yield (
                index,
                KVStates(
                    keys=tuple(key.cpu() for key, _ in layers),
                    values=tuple(value.cpu() for _, value in layers),
                ),
            )


def _no_tokens(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    heads, head_dim = shape
    return torch.empty(heads, 0, head_dim, dtype=dtype, device=device)
