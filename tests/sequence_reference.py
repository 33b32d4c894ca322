"""Independent float64 reference of contexts in sequence, some of whose tokens are computed again.

Cached keys are moved by letting the model itself rotate them: its attention layers are given the
hidden states that each context had alone, at the positions of the sequence. The result is one
forward pass over the whole sequence, in which tokens that are not computed again have the moved
keys and values of their context alone. It shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

#: Called by every attention layer: layer, query, key, value, arguments -> keys, values, logit rule.
_STATE: dict[str, Any] = {}


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    key, value = _STATE["states"](module, key, value)
    visible: Tensor = _STATE["visible"]
    adapted: Tensor = _STATE["adapted"]
    temperature, scale = _STATE["T"], _STATE["S"]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    logits = torch.where(adapted, logits / temperature, logits)
    if kwargs.get("softcap") is not None:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    if kwargs.get("sliding_window") is not None:
        positions = _STATE["positions"]
        visible = visible & (positions[:, None] - positions[None] < kwargs["sliding_window"])
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.masked_fill(~adapted, -torch.inf).logsumexp(-1, keepdim=True)
    shift = torch.where(lse.isinf(), torch.zeros_like(lse), (scale * temperature - 1) * lse)
    logits = torch.where(adapted, logits + shift, logits)
    if kwargs.get("s_aux") is not None:
        sink = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("sequence_reference", _attention)
AttentionMaskInterface.register("sequence_reference", lambda *args, **kwargs: None)

States = dict[int, tuple[Tensor, Tensor]]


@dataclass
class SequenceReference:
    """What the brute force found.

    Parameters
    ----------
    logits : Tensor
        Float64 logits at every query token, ``(len(query), vocab_size)``.
    recomputed : list of int
        Places of the tokens computed again, in the sequence of all contexts.
    """

    logits: Tensor
    recomputed: list[int]


class _Sequence:
    """Prefix, contexts and query in one row."""

    def __init__(
        self, prefix: Sequence[int], contexts: Sequence[Sequence[int]], query: Sequence[int]
    ) -> None:
        self.prefix, self.lengths = len(prefix), [len(context) for context in contexts]
        self.ids = [*prefix, *(token for context in contexts for token in context), *query]
        self.total = sum(self.lengths)
        group = [-1] * len(prefix)
        alone = list(range(len(prefix)))
        for number, length in enumerate(self.lengths):
            group += [number] * length
            alone += range(len(prefix), len(prefix) + length)
        self.group = torch.tensor(group + [-2] * len(query))
        self.alone = torch.tensor(alone + list(range(len(alone), len(self.ids))))
        self.positions = torch.arange(len(self.ids))
        self.causal = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()
        same = self.group[:, None] == self.group[None, :]
        self.apart = self.causal & (same | (self.group[None, :] == -1))


@torch.no_grad()
def sequence_reference(
    model: Any,
    prefix: Sequence[int],
    contexts: Sequence[Sequence[int]],
    query: Sequence[int],
    temperature: float,
    scale: float,
    ratio: float = 0.0,
    measured_layer: int = 1,
    starts: int = 0,
) -> SequenceReference:
    """Read contexts in sequence.

    Parameters
    ----------
    ratio : float
        Share of the tokens behind the first context that is computed again.
    measured_layer : int
        Up to this layer all tokens are; its states say which ones change most.
    starts : int
        Leading tokens of each context that come before all others.
    """
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("sequence_reference")
    row = _Sequence(prefix, contexts, query)
    hidden: dict[Any, Tensor] = {}
    modules: list[Any] = []

    def collect(module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        modules.append(module)
        return key, value

    # Once to find the attention layers, once to see what goes into them.
    _run(twin, row, row.alone, row.apart, collect)

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        hidden[module] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def put_back(module: Any, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden[module]}
        return (hidden[module], *args[1:]), kwargs

    _run(twin, row, row.alone, row.apart, lambda _, *states: states, modules, remember)
    moved: States = {}

    def keep(states: States) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]:
        def record(module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            states[module.layer_idx] = key, value
            return key, value

        return record

    _run(twin, row, row.positions, row.apart, keep(moved), modules, put_back)
    fresh: States = {}
    _run(twin, row, row.positions, row.causal, keep(fresh))
    recomputed = _choose(row, moved, fresh, ratio, measured_layer, starts)
    exact = torch.ones(len(row.ids), dtype=torch.bool)
    exact[row.prefix + row.lengths[0] : row.prefix + row.total] = False
    exact[[row.prefix + place for place in recomputed]] = True

    def mixed(module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = module.layer_idx
        if ratio and layer <= measured_layer:
            return key, value
        choice = exact[None, None, :, None]
        old_key, old_value = moved[layer]
        return torch.where(choice, key, old_key), torch.where(choice, value, old_value)

    logits = _run(twin, row, row.positions, row.causal, mixed, T=temperature, S=scale)
    return SequenceReference(logits[0, -len(query) :], recomputed)


def _choose(
    row: _Sequence, moved: States, fresh: States, ratio: float, layer: int, starts: int
) -> list[int]:
    places = list(range(row.lengths[0], row.total))
    count = round(ratio * len(places))
    change = torch.zeros(len(row.ids), dtype=torch.float64)
    behind = slice(row.prefix + row.lengths[0], row.prefix + row.total)
    for old, new in zip(moved[layer], fresh[layer], strict=True):
        squares = (new - old).square().sum(dim=(0, 1, 3))
        change += squares / old[:, :, behind].square().mean()
    first = [
        sum(row.lengths[:number]) + i
        for number, length in enumerate(row.lengths)
        for i in range(min(starts, length))
    ]

    def rank(place: int) -> tuple[bool, float]:
        return place not in first, -float(change[row.prefix + place])

    return sorted(sorted(places, key=rank)[:count])


def _run(
    twin: Any,
    row: _Sequence,
    positions: Tensor,
    visible: Tensor,
    states: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]],
    modules: Sequence[Any] = (),
    hook: Any = None,
    **adaptation: float,
) -> Tensor:
    queries = row.group == -2
    _STATE.update(T=1.0, S=1.0, states=states, visible=visible, positions=positions)
    _STATE.update(adapted=queries[:, None] & (row.group >= 0)[None, :], **adaptation)
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        logits: Tensor = twin(
            input_ids=torch.tensor([row.ids]), position_ids=positions[None], use_cache=False
        ).logits
    finally:
        for handle in hooks:
            handle.remove()
    return logits
