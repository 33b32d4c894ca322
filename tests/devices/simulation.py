"""A simulated accelerator: tensors on a device of their own, computed on the CPU.

Importing this registers device type ``sim`` with torch, for the rest of the process. As on a real
accelerator, an operation on tensors of two devices fails (CPU scalars and CPU indices are allowed,
as CUDA allows them), nothing reads a tensor's memory as NumPy, and results stay on the device.

CUDA's two fused attention operations are simulated as well, with what they demand of their
arguments and the layout of what they return.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"

_aten = torch.ops.aten

#: Operations between two devices.
_COPIES = {_aten._to_copy.default, _aten.copy_.default}

#: Operations whose indices may lie on the CPU.
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}

Simulated = Callable[..., Any]


class _Module:
    """What torch asks of ``torch.sim``."""

    is_initialized = is_available = is_bf16_supported = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = synchronize = staticmethod(lambda *_: None)
    device = staticmethod(lambda _: contextlib.nullcontext())
    get_rng_state = staticmethod(lambda *_: torch.zeros(1, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device; ``raw`` is what it holds, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> DeviceTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=device,
        )
        made.raw = raw.detach()
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.raw}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return DeviceTensor(self.raw.clone(), self.device)

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, once they lie where they may."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    devices = {str(t.device) for t in tensors if t.dim()}
    if func in _INDEXING and isinstance(args[0], DeviceTensor):
        devices.discard("cpu")
    if len(devices) > 1 and func not in _COPIES:
        raise RuntimeError(f"{func} with tensors on {' and '.join(sorted(devices))}")
    kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else dict(kwargs)
    device = _device_of_result(func, args, kwargs, ours)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    owners = {id(t.raw): t for t in ours}
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.raw if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs)
    )
    result = _SIMULATED.get(func, func)(*args, **kwargs)

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or device is None:
            return leaf
        return owners[id(leaf)] if id(leaf) in owners else DeviceTensor(leaf, device)

    return pytree.tree_map(wrap, result)


def _device_of_result(
    func: Any, args: Any, kwargs: dict[str, Any], ours: list[DeviceTensor]
) -> torch.device | None:
    """Return the simulated device on which the result lies; None: it lies on the CPU."""
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        return torch.device(NAME, wanted.index or 0) if wanted.type == NAME else None
    if func is _aten._local_scalar_dense.default:
        return None
    if func is _aten.copy_.default:
        return args[0].device if isinstance(args[0], DeviceTensor) else None
    return ours[0].device if ours else None


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between two devices; torch asks for it below Python's own dispatch."""
    raw = [t.raw if isinstance(t, DeviceTensor) else t for t in (source, target)]
    raw[1].copy_(raw[0])
    return target


def _exact(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in fp32; output in the query's dtype and LSE."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(repeats, dim=1) for t in (keys, values))
    logits = query.float() @ keys.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias.float()
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits).bool().tril(), -torch.inf)
    return (logits.softmax(-1) @ values).to(query.dtype), logits.logsumexp(-1)


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"CUDA's kernel demands {what}")


def _flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float,
) -> tuple[Any, ...]:
    """Do what ``aten::_scaled_dot_product_flash_attention`` does on CUDA."""
    _demand(query.dtype in (torch.float16, torch.bfloat16), "half precision")
    _demand(len({t.dtype for t in (query, keys, values)}) == 1, "one dtype")
    dims = {t.shape[-1] for t in (query, keys, values)}
    _demand(len(dims) == 1 and max(dims) <= 256 and max(dims) % 8 == 0, "one head_dim of 8 n")
    _demand(query.shape[1] % keys.shape[1] == 0, "query heads in groups")
    _demand(len({t.shape[0] for t in (query, keys, values)}) == 1, "one batch size")
    _demand(all(t.stride(-1) == 1 for t in (query, keys, values)), "contiguous heads")
    _demand(not causal or query.shape[2] == keys.shape[2], "causal blocks to be square")
    output, lse = _exact(query, keys, values, None, causal, scale)
    # The kernel works on (batch, length, heads, head_dim) and returns a view of it.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    length, unused = query.shape[2], torch.empty(0)
    return output, lse, unused, unused, length, keys.shape[2], unused, unused, unused


def _efficient(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[Any, ...]:
    """Do what ``aten::_scaled_dot_product_efficient_attention`` does on CUDA."""
    _demand(query.dtype in (torch.float16, torch.bfloat16, torch.float32), "at most fp32")
    _demand(query.shape[:2] == keys.shape[:2] == values.shape[:2], "as many keys' heads")
    _demand(all(t.stride(-1) == 1 for t in (query, keys, values)), "contiguous heads")
    if bias is not None:
        _demand(bias.dtype == query.dtype, "a bias of the query's dtype")
        shape = (*query.shape[:3], keys.shape[2])
        _demand(bias.shape == shape, f"a bias of shape {shape}")
        _demand(bias.stride(-1) == 1, "contiguous rows of bias")
        _demand(bias.stride(-2) * bias.element_size() % 16 == 0, "aligned rows of bias")
    output, lse = _exact(query, keys, values, bias, causal, scale)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    room = 32 * math.ceil(lse.shape[-1] / 32)
    padded = torch.nn.functional.pad(lse, (0, room - lse.shape[-1]), value=torch.inf)
    return output, padded, torch.empty(0), torch.empty(0)


_SIMULATED: dict[Any, Simulated] = {
    _aten._scaled_dot_product_flash_attention.default: _flash,
    _aten._scaled_dot_product_efficient_attention.default: _efficient,
}

_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
FIRST, SECOND = torch.device(NAME, 0), torch.device(NAME, 1)

_operations = torch.library.Library("aten", "IMPL")
_operations.impl("_copy_from", _copy_from, "PrivateUse1")
for _factory in (_aten.empty.memory_format, _aten.empty_strided.default):

    def _make(*args: Any, _factory: Any = _factory, **kwargs: Any) -> Any:
        return _run(_factory, args, kwargs)

    _operations.impl(_factory.name().removeprefix("aten::"), _make, "PrivateUse1")

_everything_else = torch.library.Library("_", "IMPL")
_everything_else.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
