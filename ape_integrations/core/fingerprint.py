"""Identity of stored states: which model, which weights, which tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Part of every key; raise it when the meaning of stored states changes.
FORMAT_VERSION = 1

#: Elements that are read of every weight tensor. A fine-tuning step moves nearly all of them.
_SAMPLES = 64

#: Config entries that do not change what a model computes.
_NEUTRAL = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "dtype",
    "torch_dtype",
)


class ModelFingerprint:
    """Fingerprint of a model's config, weights and adapters.

    A few evenly spaced elements of every weight are hashed, so that a large checkpoint costs
    milliseconds and equal weights give equal fingerprints in every process and on every machine.
    It is computed again when weights were changed in place or adapters were loaded, switched or
    merged.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._signature: object = None
        self._digest = ""

    def digest(self) -> str:
        """Return the fingerprint, 64 hexadecimal digits."""
        signature = self._current_signature()
        if signature != self._signature:
            self._digest = model_fingerprint(self._model)
            self._signature = signature
        return self._digest

    def _current_signature(self) -> tuple[object, ...]:
        weights = tuple(
            (id(p), -1 if p.is_inference() else p._version) for p in self._model.parameters()
        )
        return (hash(weights), json.dumps(_adapters(self._model), sort_keys=True))


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash config, weights and adapters of ``model``; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    digest.update(_config_json(model.config).encode())
    digest.update(json.dumps(_adapters(model), sort_keys=True).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _config_json(config: Any) -> str:
    values = {k: v for k, v in config.to_dict().items() if k not in _NEUTRAL}
    return json.dumps(values, sort_keys=True, default=str)


def _adapters(model: Any) -> list[object]:
    """Describe which adapters are active and merged, in the order of the modules."""
    state: list[object] = []
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", {})
            state.append(
                [
                    name,
                    list(module.active_adapters),
                    list(module.merged_adapters),
                    bool(getattr(module, "disable_adapters", False)),
                    sorted((str(k), float(v)) for k, v in dict(scaling).items()),
                ]
            )
    return state


def _sample(tensor: Tensor) -> bytes:
    """Return evenly spaced elements as bytes."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    step = max(1, flat.numel() // _SAMPLES)
    picked = flat[::step].cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes()


def entry_key(
    fingerprint: str, dtype: torch.dtype, prefix_ids: Sequence[int], token_ids: Sequence[int]
) -> str:
    """Return the key of the states of ``token_ids`` behind ``prefix_ids``.

    Returns
    -------
    str
        SHA-256 over format version, model fingerprint, dtype, prefix and tokens; 64 hexadecimal
        digits. The text itself cannot be read from it.
    """
    digest = hashlib.sha256(f"ape-kv|{FORMAT_VERSION}|{fingerprint}|{dtype}|".encode())
    for ids in (prefix_ids, token_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()
