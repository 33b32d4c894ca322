"""APE in models that were compiled with ``torch.compile``.

A compiler that looks into an APE cache would compile anew for every set of contexts and every
layer. So it sees one opaque operation per layer instead, *attend*, which takes new states to the
cache and reads what the cache holds. Everything around it (projections, norms, rotary embeddings,
MLPs) is compiled as it would be without APE.

The cache is found by its number, a tensor, so that one compiled graph serves all caches.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from ape_integrations.core.attention import PartitionedStates

_caches: weakref.WeakValueDictionary[int, CompilableCache] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_operations = torch.library.Library("ape_integrations", "DEF")


def opaque(
    schema: str, function: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return ``function`` as an operation that a compiler does not look into; no gradients.

    Parameters
    ----------
    schema : str
        Name, arguments and result, as :class:`torch.library.Library` takes them.
    function : Callable
        What it does.
    shape : Callable
        Takes the same arguments and returns an empty tensor of the result's shape.
    """
    name = schema.partition("(")[0]
    # A CUDA graph would not repeat what happens outside of torch.
    _operations.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    _operations.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ape_integrations::{name}", shape, lib=_operations)
    operation: Callable[..., Tensor] = getattr(torch.ops.ape_integrations, name).default
    return operation


class CompilableCache(Cache):
    """A cache whose layers return :class:`~ape_integrations.core.attention.PartitionedStates`.

    Parameters
    ----------
    layers : list
        Cache layers, as :class:`transformers.cache_utils.Cache` takes them.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        number = next(_numbers)
        _caches[number] = self
        self._number = torch.tensor(number, device="cpu")
        #: Layer -> what it returned last, for other layers that share its states.
        self.appended: dict[int, PartitionedStates] = {}

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append new tokens to a layer and return everything that they may read.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``(batch, kv_heads, length, head_dim)``.
        """
        if torch.compiler.is_compiling():
            pending = Appending(self._number, key_states, value_states, layer_idx)
            return pending, pending
        return self.append(key_states, value_states, layer_idx)

    def append(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int
    ) -> tuple[PartitionedStates, PartitionedStates]:
        """Append new tokens to a layer, outside of compiled code."""
        layer: Any = self.layers[layer_idx]
        states: tuple[PartitionedStates, PartitionedStates]
        states = layer.update(key_states, value_states)
        return states


@dataclass
class Appending:
    """What a cache hands to the attention function while a model is being compiled.

    Parameters
    ----------
    number : Tensor
        Of the cache.
    keys, values : Tensor
        New states, ``(batch, kv_heads, length, head_dim)``, which the first query to attend
        appends.
    layer_idx : int
        Layer of the cache.
    """

    number: Tensor
    keys: Tensor
    values: Tensor
    layer_idx: int
    _first: Tensor | None = None

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what the query reads, ``(batch, heads, length, value_dim)``."""
        appended = self._first is not None
        output = _attend(
            query,
            self.number,
            None if appended else self.keys,
            None if appended else self.values,
            self._first,  # so that it comes after the one that appended
            self.layer_idx,
            self.values.shape[-1],
            scaling,
            softcap,
            sliding_window,
            sinks,
        )
        if not appended:
            self._first = output
        return output.transpose(1, 2)


def _append_and_attend(
    query: Tensor,
    number: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    first: Tensor | None,
    layer_idx: int,
    value_dim: int,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    cache = _caches[int(number)]
    if keys is not None and values is not None:
        cache.appended[layer_idx], _ = cache.append(keys, values, layer_idx)
    output = cache.appended[layer_idx].attend(
        query, scaling=scaling, softcap=softcap, sliding_window=sliding_window, sinks=sinks
    )
    # Compiled code takes for granted how it lies in memory.
    return output.transpose(1, 2).contiguous()


def _attended(query: Tensor, *arguments: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, arguments[5])


_attend = opaque(
    "attend(Tensor query, Tensor number, Tensor? keys, Tensor? values, Tensor? first, "
    "int layer_idx, SymInt value_dim, float scaling, float? softcap, int? sliding_window, "
    "Tensor? sinks) -> Tensor",
    _append_and_attend,
    _attended,
)
