"""Independent float64 reference of APE: one sequence, explicit mask and positions, brute force.

Every token of prefix, contexts and query (and of what was generated) stands in one sequence; each
layer computes all logits at once, with masks and positions written out. It shares no code with the
package: attention here is one softmax over reweighted logits, not a merge of partial results.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface


class _Plan:
    """Roles, positions and visibility of every token of one prompt."""

    def __init__(
        self, prefix: Sequence[int], contexts: Sequence[Sequence[int]], query: Sequence[int]
    ) -> None:
        start = len(prefix)
        offset = start + max((len(c) for c in contexts), default=0)
        self.ids = [*prefix, *(t for c in contexts for t in c), *query]
        self.positions = [
            *range(start),
            *(start + i for c in contexts for i in range(len(c))),
            *range(offset, offset + len(query)),
        ]
        group = [-1] * start
        for number, context in enumerate(contexts):
            group += [number] * len(context)
        group += [-2] * len(query)
        self.group = torch.tensor(group)
        n = len(group)
        self.visible = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(i + 1):
                if group[i] >= 0:
                    self.visible[i, j] = group[j] == -1 or group[j] == group[i]
                else:
                    self.visible[i, j] = True


_STATE: dict[str, Any] = {}


def _reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    plan, temperature, scale = _STATE["plan"], _STATE["T"], _STATE["S"]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, dim=1)
    value = value.repeat_interleave(repeats, dim=1)
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    is_query = plan.group == -2
    is_context = plan.group >= 0
    adapted = is_query[:, None] & is_context[None, :]
    logits = torch.where(adapted, logits / temperature, logits)
    if kwargs.get("softcap") is not None:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    visible = plan.visible
    if kwargs.get("sliding_window") is not None:
        positions = torch.tensor(plan.positions)
        near = positions[:, None] - positions[None, :] < kwargs["sliding_window"]
        visible = visible & near
    logits = logits.masked_fill(~visible, -torch.inf)
    # Multiplying the contexts' LSE by S*T is the same as adding (S*T - 1) * LSE to their logits.
    lse = logits.masked_fill(~adapted, -torch.inf).logsumexp(-1, keepdim=True)
    shift = torch.where(lse.isinf(), torch.zeros_like(lse), (scale * temperature - 1) * lse)
    logits = torch.where(adapted, logits + shift, logits)
    if kwargs.get("s_aux") is not None:
        sink = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    _STATE.setdefault("weights", []).append(weights)
    output = torch.einsum("bhij,bhjd->bhid", weights, value)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("reference", _reference_attention)
AttentionMaskInterface.register("reference", lambda *args, **kwargs: None)


def reference_logits(
    model: Any,
    prefix: Sequence[int],
    contexts: Sequence[Sequence[int]],
    query: Sequence[int],
    temperature: float,
    scale: float,
) -> Tensor:
    """Return float64 logits at every query token, ``(len(query), vocab_size)``."""
    twin = _twin(model)
    plan = _Plan(prefix, contexts, query)
    _STATE.update(plan=plan, T=temperature, S=scale)
    with torch.no_grad():
        logits = twin(
            input_ids=torch.tensor([plan.ids]),
            position_ids=torch.tensor([plan.positions]),
            use_cache=False,
        ).logits
    return logits[0, -len(query) :]


def reference_mass(
    model: Any,
    prefix: Sequence[int],
    contexts: Sequence[Sequence[int]],
    query: Sequence[int],
    temperature: float,
    scale: float,
    last: int,
) -> list[float]:
    """Return the attention of the last query tokens, all heads and layers, to each context."""
    _STATE["weights"] = []
    reference_logits(model, prefix, contexts, query, temperature, scale)
    group = _STATE["plan"].group
    weights = sum(layer[0].sum(dim=0) for layer in _STATE.pop("weights"))[group == -2][-last:]
    return [float(weights[:, group == number].sum()) for number in range(len(contexts))]


def reference_greedy(
    model: Any,
    prefix: Sequence[int],
    contexts: Sequence[Sequence[int]],
    query: Sequence[int],
    temperature: float,
    scale: float,
    steps: int,
) -> tuple[list[int], Tensor]:
    """Decode greedily, everything computed anew at every step; ids and the logits of each step."""
    tokens, rows = list(query), []
    for _ in range(steps):
        row = reference_logits(model, prefix, contexts, tokens, temperature, scale)[-1]
        rows.append(row)
        tokens.append(int(row.argmax()))
    return tokens[len(query) :], torch.stack(rows)


def _twin(model: Any) -> Any:
    twins = _STATE.setdefault("twins", {})
    if id(model) not in twins:
        twin = copy.deepcopy(model).double()
        twin.set_attn_implementation("reference")
        twins[id(model)] = (model, twin)
    return twins[id(model)][1]
