"""APE attention: partitions of the keys, fused kernels that return the LSE, one merge in fp32.

Queries read up to three kinds of keys: *contexts* (every key visible, logits divided by the
attention temperature T), the *earlier rest* (prefix and what was read or generated before) and
the *current block* (causal). Each partition yields an output and the log-sum-exp (LSE) of its
logits; the outputs are merged with ``softmax([S * T * lse_contexts, lse_rest, ...])`` (sections 4.2
and 4.3 of arXiv 2502.05431). Attention sinks count as one more logit of the rest, softcap applies
after T, and sliding windows mask by position.

The function plugs into transformers through ``AttentionInterface``; no model class is patched.
Calls whose cache is no :class:`~ape_integrations.core.cache.APECache` go to the implementation
that the model used before.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ape_integrations.core import products
from ape_integrations.core.compiled import Appending
from ape_integrations.errors import UnsupportedModelError

#: Pieces into which keys are split for a query of at most so many rows, from so many keys on.
SPLITS, SPLIT_ROWS, SPLIT_FROM = 16, 32, 1024

#: Keys from which on plain matrix products are used. So many logits at a time stay in the caches;
#: but fewer rows than so many would be slow to multiply.
PRODUCTS_FROM, PRODUCTS_LOGITS, PRODUCTS_ROWS = 512, 1 << 20, 80

#: Rows up to which products only take the time to read the states, and keys from which on oneDNN is
#: the faster one for such rows' weights and values. It compiles a kernel for each number of keys,
#: which is a loss where that number grows with every token.
PRODUCTS_FEW_ROWS, PRODUCTS_LONG = 4, 4096

#: Keys from which the LSE is read, and the smallest weight that tells it.
LSE_KEYS, LSE_SMALLEST = 64, 1e-30

#: Keys that the plain implementation upcasts at a time; bounds its memory.
PLAIN_BLOCK = 4096


@dataclass(frozen=True)
class Partition:
    """Keys and values that are read by one rule.

    Parameters
    ----------
    keys, values : Tensor
        ``(1 or batch, kv_heads, length, head_dim)``, any strides with a contiguous last
        dimension. A batch of 1 is shared by all queries.
    positions : Callable
        Returns the keys' positions, ``(length,)``; called for sliding-window layers alone.
    first_position, last_position : int
        Smallest and largest of the positions.
    causal : bool
        The keys belong to the query tokens themselves: row i sees columns up to i.
    visible : Tensor, optional
        Keys that are no padding, ``(batch, length)``; all where it is None.
    """

    keys: Tensor
    values: Tensor
    positions: Callable[[], Tensor]
    first_position: int
    last_position: int
    causal: bool = False
    visible: Tensor | None = None

    def to(self, device: torch.device) -> Partition:
        """Return the same keys and values on another device."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            positions=lambda: self.positions().to(device),
            visible=None if self.visible is None else self.visible.to(device),
        )


@dataclass(frozen=True)
class PartitionedStates:
    """What an APE cache layer hands to the attention function instead of two tensors.

    Parameters
    ----------
    rest : list of Partition
        Prefix, earlier tokens and current block.
    contexts : Partition or None
        All contexts, one after the other.
    query_position : int
        Position of the first query token.
    temperature, scale : float
        T and S.
    padding : Tensor, optional
        Padding tokens before each batch item's first query token, ``(batch,)``, by which its
        positions are smaller.
    """

    rest: list[Partition]
    contexts: Partition | None
    query_position: int
    temperature: float
    scale: float
    padding: Tensor | None = None

    def to(self, device: torch.device, **_: Any) -> PartitionedStates:
        """Return the same on another device, where a layer that shares these states may lie.

        Parameters
        ----------
        device : torch.device
            Of that layer. Further arguments of :meth:`torch.Tensor.to` are ignored.
        """
        if self.rest[0].keys.device == torch.device(device):
            return self
        return replace(
            self,
            rest=[part.to(device) for part in self.rest],
            contexts=self.contexts and self.contexts.to(device),
            padding=None if self.padding is None else self.padding.to(device),
        )

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what the query reads; see :func:`partitioned_attention`."""
        return partitioned_attention(
            query,
            self,
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            sinks=sinks,
        )


class Partial(NamedTuple):
    """Attention over one partition: output ``(batch, heads, length, head_dim)`` and LSE."""

    output: Tensor
    lse: Tensor


def implementation_name(original: str) -> str:
    """Return the name under which APE attention in front of ``original`` is registered."""
    return original if original.startswith("ape_") else f"ape_{original}"


def register(original: str) -> str:
    """Register APE attention in front of attention implementation ``original``.

    Returns
    -------
    str
        The name to put in a config's ``_attn_implementation``.
    """
    name = implementation_name(original)
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        original = name.removeprefix("ape_")
        AttentionInterface.register(name, partial(ape_attention_forward, fallback=original))
        mask = partial(_fallback_mask, fallback=ALL_MASK_ATTENTION_FUNCTIONS[original])
        AttentionMaskInterface.register(name, mask)
    return name


def ape_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PartitionedStates,
    value: Tensor | PartitionedStates,
    attention_mask: Tensor | None,
    *,
    fallback: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' ``AttentionInterface``.

    Parameters
    ----------
    query : Tensor
        ``(batch, heads, length, head_dim)``.
    key, value : PartitionedStates or Tensor
        From an APE cache, or ordinary states, which ``fallback`` then reads.
    attention_mask : Tensor or None
        Used by ``fallback`` alone: partitions say themselves what is visible.

    Returns
    -------
    tuple of Tensor and None
        Output ``(batch, length, heads, head_dim)``; no attention weights.
    """
    if not isinstance(key, (PartitionedStates, Appending)):
        forward = fallback_forward(module, fallback)
        return forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            "This model adds a position bias to its attention logits, which APE cannot place for "
            "contexts that share positions. Use a model with rotary position embeddings."
        )
    scaling = kwargs.get("scaling")
    output = key.attend(
        query,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sliding_window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


def _fallback_mask(*args: Any, fallback: Callable[..., Any], **kwargs: Any) -> Any:
    """Build the mask that the model would use without APE attention."""
    if getattr(kwargs.get("config"), "num_kv_shared_layers", 0):
        # Gemma 4 leaves out queries only where it knows that its masks are not left to `is_causal`.
        kwargs["allow_is_causal_skip"] = False
    return fallback(*args, **kwargs)


def fallback_forward(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the attention function that ``module`` would use under implementation ``name``."""
    # transformers keeps each family's eager function in the family's own modeling file.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    forward = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return forward


def partitioned_attention(
    query: Tensor,
    states: PartitionedStates,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to all partitions and merge by LSE.

    Parameters
    ----------
    query : Tensor
        ``(batch, heads, length, head_dim)``.
    states : PartitionedStates
        Partitions, T and S.
    scaling : float
        Factor on the logits, usually ``head_dim ** -0.5``.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), after T.
    sliding_window : int, optional
        A query sees keys whose position is less than this many tokens before its own.
    sinks : Tensor, optional
        One logit per head, ``(heads,)``, that takes attention and gives nothing (GPT-OSS).

    Returns
    -------
    Tensor
        ``(batch, heads, length, head_dim)`` in the query's dtype.
    """
    partials: list[Partial] = []
    for part in (states.contexts, *states.rest):
        if part is None:
            continue
        is_context = part is states.contexts
        temperature = states.temperature if is_context else 1.0
        seen = attend_partition(query, states, part, scaling / temperature, softcap, sliding_window)
        if seen is not None:
            output, lse = seen
            lse = lse * (states.scale * states.temperature) if is_context else lse
            partials.append(Partial(output, lse))
    return merge(partials, sinks, query.dtype)


def attend_partition(
    query: Tensor,
    states: PartitionedStates,
    part: Partition,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Partial | None:
    """Attend to what a query sees of one partition, logits times ``scale``; None: to nothing."""
    if part.keys.shape[2] == 0:
        return None
    # Layers that share an earlier layer's states may ask for the last tokens alone (Gemma 4).
    last = states.rest[-1].last_position
    first = last - query.shape[2] + 1
    mask = None
    if sliding_window is not None and last - part.first_position >= sliding_window:
        if states.padding is None and first - part.last_position >= sliding_window:
            return None
        mask = _window_mask(part, states, first, last, sliding_window)
    elif part.causal and 1 < query.shape[2] < part.keys.shape[2]:
        mask = _window_mask(part, states, first, last, last + 1)
    if part.visible is not None:
        mask = _padding_mask(part, mask, last - first + 1)
    return attend(query, part, scale, softcap, mask)


def merge(partials: Sequence[Partial], sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Merge outputs by the softmax of their LSEs, in fp32.

    Parameters
    ----------
    partials : sequence of Partial
        At least one; equal shapes.
    sinks : Tensor, optional
        One logit per head, ``(heads,)``, that takes attention and gives nothing.
    dtype : torch.dtype
        Of the result.
    """
    if len(partials) == 1 and sinks is None:
        return partials[0].output.to(dtype)
    lses = [lse for _, lse in partials]
    if sinks is not None:
        lses.append(sinks.float().view(1, -1, 1).expand_as(lses[0]))
    if len(partials) == len(lses) == 2:
        # The softmax of two is a sigmoid.
        (first, _), (second, _) = partials
        weight = (lses[1] - lses[0]).sigmoid().unsqueeze(-1)
        return torch.lerp(first.to(weight.dtype), second.to(weight.dtype), weight).to(dtype)
    weights = torch.stack(lses).softmax(dim=0)
    merged = partials[0].output.to(weights.dtype) * weights[0].unsqueeze(-1)
    for (output, _), weight in zip(partials[1:], weights[1:], strict=False):
        merged = torch.addcmul(merged, output.to(weights.dtype), weight.unsqueeze(-1))
    return merged.to(dtype)


def _window_mask(
    part: Partition, states: PartitionedStates, first: int, last: int, window: int
) -> Tensor:
    """Return which keys each query sees by position, ``(1 or batch, length, keys)``."""
    keys = part.positions()
    distance = torch.arange(first, last + 1, device=keys.device)[:, None] - keys[None, :]
    distance = distance[None]
    if states.padding is not None and part.visible is None:
        # Padding moves queries against prefix and contexts, but not against the tail.
        distance = distance - states.padding[:, None, None]
    visible = distance < window
    return visible & (distance >= 0) if part.causal else visible


def _padding_mask(part: Partition, mask: Tensor | None, length: int) -> Tensor:
    """Take padding out of what queries see, ``(batch, length, keys)``."""
    assert part.visible is not None
    visible = part.visible[:, None, :].expand(-1, length, -1)
    if part.causal and length > 1:
        keys = visible.shape[-1]
        itself = torch.eye(keys, dtype=torch.bool, device=visible.device)
        # Padding must see something, itself, or its states would be undefined.
        visible = (visible & torch.ones_like(itself).tril()[-length:]) | itself[-length:]
    return visible if mask is None else visible & mask


def attend(
    query: Tensor, part: Partition, scale: float, softcap: float | None, mask: Tensor | None
) -> Partial:
    """Attend to one partition under ``mask`` ``(1 or batch, rows, keys)``; KV heads not repeated.

    Without a causal block, rows are independent: the query heads that share a KV head, and the
    batch items that share a partition of batch 1, are laid out as further rows of one query.
    """
    batch, heads, length, head_dim = query.shape
    keys, values = part.keys, part.values
    kv_heads = keys.shape[1]
    if part.causal and mask is None and length > 1:
        return _causal(query, keys, values, scale, softcap)
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    share = keys.shape[0] == 1 and batch > 1
    if share:
        rows = rows.transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
    if mask is not None:
        mask = mask.repeat(1, heads // kv_heads, 1)
        if share:
            mask = mask.expand(batch, -1, -1).reshape(1, -1, mask.shape[-1])
    output, lse = _kernel(rows, keys, values, scale, softcap, mask)
    if share:
        output = output.view(kv_heads, batch, -1, output.shape[-1]).transpose(0, 1)
        lse = lse.view(kv_heads, batch, -1).transpose(0, 1)
    return Partial(
        output.reshape(batch, heads, length, values.shape[-1]), lse.reshape(batch, heads, length)
    )


def _causal(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
) -> Partial:
    """Attend causally to the query tokens' own keys."""
    batch, heads, length, head_dim = query.shape
    grouped = heads != keys.shape[1]
    kernel = _fused_kernel(query, values, softcap, masked=False, grouped=grouped)
    if kernel is not None:
        return kernel(query, keys, values, scale, None, True)
    kv_heads = keys.shape[1]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    mask = torch.ones(1, length, length, dtype=torch.bool, device=query.device).tril()
    mask = mask.repeat(1, heads // kv_heads, 1)
    output, lse = _plain(rows, keys, values, scale, softcap, mask)
    return Partial(output.reshape(batch, heads, length, -1), lse.reshape(batch, heads, length))


def _kernel(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    mask: Tensor | None,
) -> Partial:
    """Attend without causality; ``rows`` has as many heads as ``keys``."""
    kernel = _fused_kernel(rows, values, softcap, masked=mask is not None, grouped=False)
    if kernel is None:
        return _plain(rows, keys, values, scale, softcap, mask)
    if kernel is _flash_cpu and mask is None:
        if _products_pay(rows, keys, values):
            return _products_cpu(rows, keys, values, scale)
        if _few_rows(rows, keys):
            return _split_keys(rows, keys, values, scale)
    output, lse = kernel(rows, keys, values, scale, mask, False)
    if mask is not None:
        # Fused kernels leave rows that see nothing undefined.
        empty = ~mask.any(dim=-1)
        output = output.masked_fill(empty[:, None, :, None], 0.0)
        lse = lse.masked_fill(empty[:, None], -torch.inf)
    return Partial(output, lse)


Kernel = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, bool], Partial]


def _fused_kernel(
    query: Tensor, values: Tensor, softcap: float | None, *, masked: bool, grouped: bool
) -> Kernel | None:
    """Choose a fused kernel that can do what is asked, or None.

    Parameters
    ----------
    masked : bool
        A mask is needed.
    grouped : bool
        The query has more heads than the keys.
    """
    head_dim = query.shape[-1]
    if softcap is not None or values.shape[-1] != head_dim:
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cpu":
        return _flash_cpu if half or query.dtype == torch.float32 else None
    generation = _cuda_generation(query.device)
    if generation is not None:
        if half and generation >= 8 and not masked and head_dim <= 256 and head_dim % 8 == 0:
            return _flash_cuda
        if (half or query.dtype == torch.float32) and not grouped and head_dim % 8 == 0:
            return _efficient_cuda
    return None


def _cuda_generation(device: torch.device) -> int | None:
    """Return the major compute capability of a CUDA device; None of any other."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def _products_pay(rows: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Say whether matrix products by oneDNN beat the fused CPU kernel, which uses the BLAS."""
    return (
        rows.dtype == torch.float32
        and keys.shape[2] >= PRODUCTS_FROM
        and not torch.is_grad_enabled()
        and keys[0, 0].is_contiguous()
        and values[0, 0].is_contiguous()
        and products.onednn_pays()
    )


def _products_cpu(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Attend head by head with two matrix products, some rows at a time to stay in the caches."""
    batch, heads, length, _ = rows.shape
    if length <= PRODUCTS_FEW_ROWS and products.pieces_pay():
        return _few_rows_cpu(rows, keys, values, scale)
    output = rows.new_empty(batch, heads, length, values.shape[-1])
    lse = rows.new_empty(batch, heads, length)
    blocks = math.ceil(length / max(PRODUCTS_ROWS, PRODUCTS_LOGITS // keys.shape[2]))
    step = math.ceil(length / blocks)
    scaled = rows * scale
    for item, head in itertools.product(range(batch), range(heads)):
        shared = item if keys.shape[0] > 1 else 0
        head_keys, head_values = keys[shared, head], values[shared, head].t()
        for start in range(0, length, step):
            block = (item, head, slice(start, start + step))
            logits = products.onednn_linear(scaled[block], head_keys)
            weights = logits.softmax(dim=-1)
            output[block] = products.onednn_linear(weights, head_values)
            lse[block] = _lse(logits, weights)
    return Partial(output, lse)


def _few_rows_cpu(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Attend with products whose time is that of reading the states, as decoding needs it."""
    outputs, lses = [], []
    scaled = rows * scale
    for item in range(rows.shape[0]):
        shared = item if keys.shape[0] > 1 else 0
        logits = products.in_pieces(scaled[item], keys[shared]).contiguous()
        weights = logits.softmax(dim=-1)
        if keys.shape[2] < PRODUCTS_LONG:
            output = torch.bmm(weights, values[shared])
        else:
            heads = zip(weights, values[shared].mT, strict=True)
            output = torch.stack([products.onednn_linear(*head) for head in heads])
        outputs.append(output)
        lses.append(_lse(logits, weights))
    return Partial(torch.stack(outputs), torch.stack(lses))


def _lse(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the LSE of logits from their softmax: a weight is ``exp(logit - lse)``.

    Any key tells it whose weight is no underflow, so that few are looked at, where they do.
    """
    some = slice(LSE_KEYS)
    largest = weights[..., some].amax(dim=-1)
    if bool((largest < LSE_SMALLEST).any()):
        some = slice(None)
        largest = weights.amax(dim=-1)
    return logits[..., some].amax(dim=-1) - largest.log()


def _few_rows(rows: Tensor, keys: Tensor) -> bool:
    """Say whether a query has so few rows that the CPU kernel's threads would go idle."""
    return keys.shape[0] == 1 and rows.shape[2] <= SPLIT_ROWS and keys.shape[2] >= SPLIT_FROM


def _split_keys(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Attend to pieces of the keys side by side, and merge them by LSE.

    The CPU kernel shares out work by heads and query rows alone; decoding has few of both.
    """
    length = keys.shape[2] // SPLITS
    whole = SPLITS * length

    def pieces(states: Tensor) -> Tensor:
        split: Tensor = states[0, :, :whole].unflatten(1, (SPLITS, length))  # type: ignore
        return split.transpose(0, 1)

    partials = [
        _flash_cpu(
            rows.expand(SPLITS, -1, -1, -1), pieces(keys), pieces(values), scale, None, False
        )
    ]
    if whole < keys.shape[2]:
        rest = (keys[:, :, whole:], values[:, :, whole:])
        partials.append(_flash_cpu(rows, *rest, scale, None, False))
    lse = torch.cat([part.lse for part in partials])
    output = torch.cat([part.output for part in partials])
    total = lse.logsumexp(dim=0, keepdim=True)
    weights = (lse - total).exp().unsqueeze(-1)
    return Partial((output * weights).sum(dim=0, keepdim=True), total)


def _flash_cpu(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Partial:
    bias = None if mask is None else _additive(mask, query)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=bias, scale=scale
    )
    return Partial(output, lse)


def _flash_cuda(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Partial:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, scale=scale
    )
    return Partial(output, lse[..., : query.shape[2]])


def _efficient_cuda(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Partial:
    bias = None
    if mask is not None:
        # The kernel wants rows of bias that start at multiples of 16 bytes.
        columns = mask.shape[-1]
        padded = torch.nn.functional.pad(_additive(mask, query), (0, -columns % 8))
        bias = padded[..., :columns].expand(query.shape[0], query.shape[1], -1, -1)
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, bias, True, 0.0, causal, scale=scale
    )
    return Partial(output, lse[..., : query.shape[2]])


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """Turn a mask ``(1 or batch, rows, keys)`` into a bias ``(1 or batch, 1, rows, keys)``."""
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~mask, -torch.inf)[:, None]


def _plain(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    mask: Tensor | None,
) -> Partial:
    """Attend with ordinary operations, in fp32 (fp64 stays fp64), block by block of keys."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    query = rows.to(dtype) * scale
    length = keys.shape[2]
    shape = query.shape[:-1]
    output = query.new_zeros(*shape, values.shape[-1])
    lse = query.new_full(shape, -torch.inf)
    for start in range(0, length, PLAIN_BLOCK):
        block = slice(start, min(start + PLAIN_BLOCK, length))
        logits = query @ keys[:, :, block].to(dtype).transpose(-1, -2)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, :, block], -torch.inf)
        block_lse = logits.logsumexp(dim=-1)
        total = torch.logaddexp(lse, block_lse)
        # A row that has seen nothing yet has no weight to share out.
        safe = total.masked_fill(total == -torch.inf, 0.0)
        output = output * (lse - safe).exp().unsqueeze(-1)
        output += (logits - safe.unsqueeze(-1)).exp() @ values[:, :, block].to(dtype)
        lse = total
    return Partial(output, lse)
