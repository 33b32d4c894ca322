"""Faster fp32 matrix products on CPUs, from what torch contains.

torch multiplies fp32 matrices with the BLAS it was built with. On AMD processors that takes about
twice as long as oneDNN, a library that torch contains as well (:func:`onednn_linear`). And
a single row, as decoding has it, is multiplied by one thread alone; a batched product over pieces
of the weight occupies them all, and then takes little longer than reading the weight
(:func:`in_pieces`). Each is timed once against torch's own choice and used where it pays.

Inside :func:`fast_products` the linear layers of a model that :func:`prepare_linears` has seen use
them; everywhere else they do what they always did.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ape_integrations.core.compiled import opaque

#: (rows, outputs, inputs) of the products that are timed: many rows, and one.
_MANY_ROWS = ((32, 1536, 576), (256, 576, 576))
_ONE_ROW = (1, 4096, 1024)

#: How much faster than torch's own they have to be. The weights that are timed lie in the
#: processor's caches; a single row gains more on a model's, which do not.
_MANY_ROWS_MARGIN, _ONE_ROW_MARGIN = 1.25, 1.05

#: Times that each is timed, in turn with torch's own; the best counts, as others use the CPU too.
_REPETITIONS = 9

#: Pieces of the weight for each thread.
_PIECES_PER_THREAD = 2

_inside = threading.local()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``rows @ weight.T + bias`` in the fastest way known here; no gradients.

    Parameters
    ----------
    rows : Tensor
        ``(..., inputs)``, fp32 on the CPU.
    weight : Tensor
        ``(outputs, inputs)``, contiguous.
    bias : Tensor, optional
        ``(outputs,)``.
    """
    inputs = rows.shape[-1]
    if rows.numel() == inputs and pieces_pay():
        output = _row_in_pieces(rows.view(1, inputs), weight).view(*rows.shape[:-1], -1)
        return output if bias is None else output + bias
    if onednn_pays():
        return onednn_linear(rows, weight, bias)
    return functional.linear(rows, weight, bias)


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``rows @ weight.T + bias`` with oneDNN; no gradients.

    Parameters
    ----------
    rows : Tensor
        ``(..., inputs)``, fp32 on the CPU.
    weight : Tensor
        ``(outputs, inputs)``, contiguous or the transpose of a contiguous tensor: anything else
        is multiplied correctly, but a hundred times slower.
    bias : Tensor, optional
        ``(outputs,)``.
    """
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output


def in_pieces(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiply ``rows @ weights.mT``, pieces of the weights side by side; for very few rows.

    Parameters
    ----------
    rows : Tensor
        ``(batch, count, inputs)``.
    weights : Tensor
        ``(batch, outputs, inputs)``, each contiguous.

    Returns
    -------
    Tensor
        ``(batch, count, outputs)``, any strides.
    """
    batch, outputs, inputs = weights.shape
    count, threads = rows.shape[1], torch.get_num_threads()
    pieces = math.gcd(outputs, _PIECES_PER_THREAD * threads) if weights.is_contiguous() else 1
    if batch * pieces % threads == 0:
        blocks = weights.view(batch * pieces, -1, inputs) if pieces > 1 else weights
        queries = rows.unsqueeze(1).expand(-1, pieces, -1, -1).reshape(-1, count, inputs)
        return torch.bmm(blocks, queries.mT).view(batch, outputs, count).mT
    if batch > 1:
        return torch.cat(list(map(in_pieces, rows.split(1), weights.split(1))))
    whole = outputs - outputs % threads
    if not whole or not weights.is_contiguous():
        return torch.bmm(rows, weights.mT)
    rest = torch.bmm(rows, weights[:, whole:].mT)
    return torch.cat([in_pieces(rows, weights[:, :whole]), rest], dim=2)


def _row_in_pieces(row: Tensor, weight: Tensor) -> Tensor:
    return in_pieces(row[None], weight[None])[0]


def onednn_available() -> bool:
    """Tell whether this build of torch contains oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache(maxsize=1)
def onednn_pays() -> bool:
    """Tell whether oneDNN multiplies faster here; timed once, in a few milliseconds."""
    return onednn_available() and all(
        _faster(onednn_linear, shape, _MANY_ROWS_MARGIN) for shape in _MANY_ROWS
    )


@lru_cache(maxsize=1)
def pieces_pay() -> bool:
    """Tell whether :func:`in_pieces` is faster here; timed once, in a few milliseconds."""
    return _faster(_row_in_pieces, _ONE_ROW, _ONE_ROW_MARGIN)


@torch.no_grad()
def _faster(
    candidate: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int, int], margin: float
) -> bool:
    rows, outputs, inputs = shape
    own = torch.Generator("cpu")  # nobody's random numbers change
    x, weight = (
        torch.rand(count, inputs, generator=own, dtype=torch.float32, device="cpu")
        for count in (rows, outputs)
    )

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        began = time.perf_counter()
        product(x, weight)
        return time.perf_counter() - began

    times = [(seconds(functional.linear), seconds(candidate)) for _ in range(_REPETITIONS)]
    return min(own for own, _ in times) > margin * min(other for _, other in times)


@contextmanager
def fast_products() -> Iterator[None]:
    """Let prepared linear layers use these products in this thread."""
    before = active()
    _inside.on = True
    try:
        yield
    finally:
        _inside.on = before


def active() -> bool:
    """Tell whether this thread is inside :func:`fast_products`."""
    return getattr(_inside, "on", False)


_opaque_linear = opaque(
    "linear(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    linear,
    lambda rows, weight, bias: rows.new_empty(*rows.shape[:-1], weight.shape[0]),
)


class _Linear(nn.Linear):
    """A linear layer that can use these products; otherwise the layer that it was."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            active()
            and type(weight) is nn.Parameter
            and weight.dtype == input.dtype == torch.float32
            and weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and weight.is_contiguous()
        ):
            # A compiler that looked inside would not know the product.
            product = _opaque_linear if torch.compiler.is_compiling() else linear
            return product(input, weight, self.bias)
        return super().forward(input)

    def _get_name(self) -> str:
        return "Linear"


def prepare_linears(model: nn.Module) -> None:
    """Let the model's plain fp32 linear layers on the CPU use these products, if one pays here.

    The layers stay the objects they are, with their parameters, hooks and names; only their class
    becomes a subclass of ``nn.Linear``.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    ]
    if layers and (onednn_pays() or pieces_pay()):
        for layer in layers:
            layer.__class__ = _Linear
