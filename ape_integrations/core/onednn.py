"""Matrix products by oneDNN in fp32 on CPUs, where it is faster than torch's own choice.

torch multiplies fp32 matrices with the BLAS it was built with, which on AMD processors takes about
twice as long as oneDNN, a library that torch contains as well. Inside :func:`onednn_products` the
linear layers of a model that :func:`prepare_linears` has seen use oneDNN; everywhere else they do
what they always did.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

#: oneDNN has to be this much faster before it is used.
_MARGIN = 1.25

#: (rows, outputs, inputs) of the products that are timed. A single row takes too short a time to
#: judge by; it gains as much.
_TIMED = ((32, 1536, 576), (256, 576, 576))

#: Times that each is timed, in turn with torch's own; the best counts, as others use the CPU too.
_REPETITIONS = 9

_inside = threading.local()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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


def available() -> bool:
    """Tell whether this build of torch contains oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache(maxsize=1)
def pays() -> bool:
    """Tell whether oneDNN multiplies faster here; timed once, in a few milliseconds."""
    with torch.no_grad():
        return available() and all(_faster(*shape) for shape in _TIMED)


def _faster(rows: int, outputs: int, inputs: int) -> bool:
    x, weight = torch.rand(rows, inputs), torch.rand(outputs, inputs)

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        began = time.perf_counter()
        product(x, weight)
        return time.perf_counter() - began

    times = [(seconds(functional.linear), seconds(linear)) for _ in range(_REPETITIONS)]
    return min(own for own, _ in times) > _MARGIN * min(other for _, other in times)


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let prepared linear layers use oneDNN in this thread."""
    before = active()
    _inside.on = True
    try:
        yield
    finally:
        _inside.on = before


def active() -> bool:
    """Tell whether this thread is inside :func:`onednn_products`."""
    return getattr(_inside, "on", False)


class _Linear(nn.Linear):
    """A linear layer that can use oneDNN; otherwise the layer that it was."""

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
            return linear(input, weight, self.bias)
        return super().forward(input)

    def _get_name(self) -> str:
        return "Linear"


def prepare_linears(model: nn.Module) -> None:
    """Let the model's plain fp32 linear layers on the CPU use oneDNN, if it pays here.

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
    if layers and pays():
        for layer in layers:
            layer.__class__ = _Linear
