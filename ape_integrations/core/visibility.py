"""Which keys a model wants its queries to see, found out without computing any attention.

APE attention says itself what is visible: everything before a token, or the part of it within a
layer's sliding window. A model that wants anything else (fixed chunks, blocks, a prefix seen in
both directions, a window that its attention function never hears of) would be answered wrongly,
most of it only beyond the lengths that a quick numerical check can afford. So the rules themselves
are read: every mask that the model builds comes from a function of two positions, which can be
asked about any of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ape_integrations.core.attention import fallback_forward
from ape_integrations.errors import UnsupportedModelError

#: Arguments of attention functions that APE attention heeds.
_HEEDED = {"scaling", "softcap", "sliding_window", "s_aux"}

#: Arguments that do not change what a token sees while text is generated.
_NEUTRAL = {
    "attention_mask",
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "past_key_values",
    "logits_to_keep",
    "layer_idx",
    "return_dict",
    "deterministic",
    "target_dtype",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
}

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class LayerCall:
    """One call of a layer's attention function.

    Parameters
    ----------
    layer : int or None
        Index of the layer, where the module knows it.
    window : int or None
        Sliding window that the attention function was told.
    rule : Callable or None
        Visibility of a key position to a query position, as the mask has it; None: no mask.
    mask : Tensor or None
        A mask that comes from no known rule.
    both_directions : bool
        The layer asks for attention to later tokens as well.
    unknown : tuple of str
        Further arguments, unknown to APE attention.
    """

    layer: int | None
    window: int | None
    rule: MaskFunction | None
    mask: Tensor | None
    both_directions: bool
    unknown: tuple[str, ...]


@dataclass
class _Observation:
    calls: list[LayerCall] = field(default_factory=list)
    rules: list[tuple[Tensor, MaskFunction]] = field(default_factory=list)

    def rule_of(self, mask: Tensor | None) -> MaskFunction | None:
        """Return the rule behind a mask or a view of it."""
        return next((rule for known, rule in self.rules if _same_memory(known, mask)), None)


class _FollowMasks(TorchFunctionMode):
    """Recognise masks again on the other devices of a model that is spread over several."""

    def __init__(self, observation: _Observation) -> None:
        super().__init__()
        self._observation = observation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.to:
            rule = self._observation.rule_of(args[0])
            if rule is not None:
                self._observation.rules.append((result, rule))
        return result


_current: ContextVar[_Observation | None] = ContextVar("ape_observation", default=None)


def register(original: str) -> str:
    """Register functions that observe, in front of attention implementation ``original``.

    Returns
    -------
    str
        The name to put in a config's ``_attn_implementation``.
    """
    name = f"observed_{original}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        masks = ALL_MASK_ATTENTION_FUNCTIONS[original]
        AttentionInterface.register(name, functools.partial(_observe_attention, fallback=original))
        AttentionMaskInterface.register(name, functools.partial(_observe_mask, fallback=masks))
    return name


def _observe_mask(*args: Any, fallback: Callable[..., Any], **kwargs: Any) -> Any:
    """Build a mask and remember the rule behind it."""
    observation = _current.get()
    if observation is None:
        return fallback(*args, **kwargs)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = cast(Tensor, sdpa_mask(*args, **kwargs))
    observation.rules.append((mask, kwargs.get("mask_function", causal_mask_function)))
    return mask


def _observe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fallback: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Remember how a layer asks for attention; give nothing."""
    observation = _current.get()
    if observation is None:
        forward = fallback_forward(module, fallback)
        return forward(module, query, key, value, attention_mask, **kwargs)
    rule = observation.rule_of(attention_mask)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    given = {name for name, argument in kwargs.items() if argument is not None}
    observation.calls.append(
        LayerCall(
            layer=getattr(module, "layer_idx", None),
            window=kwargs.get("sliding_window"),
            rule=rule,
            mask=None if rule is not None else attention_mask,
            both_directions=attention_mask is None and causal is False,
            unknown=tuple(sorted(given - _HEEDED - _NEUTRAL)),
        )
    )
    batch, heads, length, _ = query.shape
    return query.new_zeros(batch, length, heads, value.shape[-1]), None


def _same_memory(mask: Tensor, other: Tensor | None) -> bool:
    """Whether ``other`` is the mask or a view of it."""
    if not isinstance(other, Tensor):
        return False
    return mask.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@contextmanager
def observed() -> Iterator[list[LayerCall]]:
    """Collect the attention calls of models that run observed in this thread."""
    observation = _Observation()
    token = _current.set(observation)
    try:
        with _FollowMasks(observation):
            yield observation.calls
    finally:
        _current.reset(token)


def check_visibility(
    name: str, calls: list[LayerCall], config: PretrainedConfig, instead: str
) -> None:
    """Refuse a model that wants tokens to see something else than APE attention shows them.

    Parameters
    ----------
    name : str
        The model's class.
    calls : list of LayerCall
        One forward pass.
    config : PretrainedConfig
        Of the text model.
    instead : str
        What to use instead, for the message.

    Raises
    ------
    UnsupportedModelError
        Names what the model wants.
    """
    if not calls:
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface, so APE attention cannot be "
            f"plugged in. {instead}"
        )
    longest = getattr(config, "max_position_embeddings", None) or 1 << 20
    for call in calls:
        if call.unknown:
            raise UnsupportedModelError(
                f"{name} gives its attention function {', '.join(call.unknown)}, which APE "
                f"attention does not know and must not ignore. {instead}"
            )
        if call.both_directions or not _as_expected(call, longest):
            rule = (
                "every earlier token" if call.window is None else f"the last {call.window} tokens"
            )
            raise UnsupportedModelError(
                f"{name} masks attention by another rule than its attention function is told "
                f"(layer {call.layer}: {rule}), for example in chunks, in both directions or "
                f"within a window, so contexts would be read wrongly. {instead}"
            )


def _as_expected(call: LayerCall, longest: int) -> bool:
    """Whether the mask shows earlier tokens alone, and all within the window."""
    if call.mask is not None:
        visible = call.mask if call.mask.dtype == torch.bool else call.mask == 0
        size = visible.shape[-1]
        causal = torch.ones(size, size, dtype=torch.bool, device=visible.device).tril()
        return bool((visible == causal[-visible.shape[-2] :]).all())
    if call.rule is None:
        return call.window is None or call.window >= longest
    queries, keys = _positions(call.window, longest)
    zero = torch.zeros_like(queries)
    try:
        visible = torch.as_tensor(_ask(call.rule, zero, zero, queries, keys), device="cpu")
    except (IndexError, RuntimeError):  # a rule that looks at the tokens, not at their positions
        return False
    expected = keys <= queries
    if call.window is not None:
        expected &= keys > queries - call.window
    return bool((visible == expected).all())


def _ask(rule: MaskFunction, *indices: Tensor) -> Tensor:
    """Ask a rule, leaving out blocks of picture tokens where a text has none.

    Such blocks are kept by token, so that they cannot be asked about positions that the text does
    not have; the rules that they are combined with can.
    """
    name, inner = rule.__qualname__, inspect.getclosurevars(rule).nonlocals
    if name.startswith(("or_masks.", "and_masks.")):
        answers = [_ask(each, *indices) for each in inner["mask_functions"]]
        combine = torch.logical_or if name.startswith("or_") else torch.logical_and
        return functools.reduce(combine, map(torch.as_tensor, answers))
    if name.startswith("blockwise_overlay.") and bool((inner["block_sequence_ids"] < 0).all()):
        return torch.zeros_like(indices[-1], dtype=torch.bool)
    return rule(*indices)


def _positions(window: int | None, longest: int) -> tuple[Tensor, Tensor]:
    """Return pairs of query and key positions that tell rules apart."""
    edges = {1 << power for power in range(2, 21)} | {longest - 1, window or 0}
    ends = {edge + step for edge in edges for step in (-1, 0, 1)}
    pairs = []
    for query in sorted(end for end in ends if 0 <= end < longest):
        back = {0, 1, 2, query // 2, query - 1, query, (window or 1) - 1, window or 1}
        pairs += [(query, query - step) for step in back if step <= query]
        pairs.append((query, query + 1))
    positions = torch.tensor(pairs, device="cpu")
    return positions[:, 0], positions[:, 1]
