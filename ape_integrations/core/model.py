"""What APE needs to know of a model, and the refusal of models that it cannot serve."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ape_integrations.core import attention
from ape_integrations.core.errors import UnsupportedModelError
from ape_integrations.store.base import KVSpec, LayerSpec

_INSTEAD = (
    "Use a decoder-only model whose layers keep key/value states behind transformers' attention "
    "interface, such as Llama, Qwen, Mistral, Gemma, Phi or SmolLM."
)

#: Layer types whose state is no set of keys and values that a query can read in any order.
_STATEFUL_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid", "compressed")


@dataclass(frozen=True)
class ModelInfo:
    """Shapes and limits of an attached model.

    Parameters
    ----------
    layers : tuple of LayerSpec
        Heads and head dimensions of each layer's keys and values.
    devices : tuple of torch.device
        Where each layer keeps its states.
    dtype : torch.dtype
        Dtype of the states.
    max_positions : int or None
        Positions the model was made for; None where its config names no limit.
    input_device : torch.device
        Where token ids go.
    """

    layers: tuple[LayerSpec, ...]
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    max_positions: int | None
    input_device: torch.device

    def spec(self, num_tokens: int) -> KVSpec:
        """Return what a stored entry of ``num_tokens`` tokens must look like."""
        return KVSpec(num_tokens=num_tokens, dtype=self.dtype, layers=self.layers)


def attach(model: PreTrainedModel) -> ModelInfo:
    """Check that APE can serve ``model``, put APE attention in front of its own, and probe it.

    The model keeps working as before for everybody else: only calls with an
    :class:`~ape_integrations.core.cache.APECache` are answered by APE attention.

    Raises
    ------
    UnsupportedModelError
        The architecture cannot be served; nothing was changed then.
    """
    check_supported(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(attention.register(base.config._attn_implementation))
    return _probe(model)


def check_supported(model: Any) -> None:
    """Refuse what cannot work, before any work is done.

    Raises
    ------
    UnsupportedModelError
        Names the reason and what to use instead.
    """
    if not isinstance(getattr(model, "config", None), object) or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model that generates text. {_INSTEAD}"
        )
    config, name = model.config, type(model).__name__
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model. {_INSTEAD}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    stateful = sorted(k for k in kinds if any(word in k for word in _STATEFUL_LAYERS))
    if stateful or getattr(base, "_is_stateful", False):
        detail = f" ({', '.join(stateful)})" if stateful else ""
        raise UnsupportedModelError(
            f"{name} has layers with a running state{detail}, which cannot be encoded context by "
            f"context. {_INSTEAD}"
        )
    if "chunked_attention" in kinds or getattr(text, "attention_chunk_size", None):
        raise UnsupportedModelError(
            f"{name} attends within fixed chunks of positions, which contexts that share "
            f"positions would break. {_INSTEAD}"
        )
    if not getattr(base, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface, so APE attention cannot be "
            f"plugged in. {_INSTEAD}"
        )
    cached = (m for m in base.modules() if getattr(m, "layer_idx", None) is not None)
    if any(getattr(module, "is_causal", True) is False for module in cached):
        raise UnsupportedModelError(
            f"{name} attends in both directions (is_decoder is off), so no token's states could "
            f"be kept for later ones. {_INSTEAD}"
        )
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(f"{name} takes no position ids. {_INSTEAD}")


@torch.no_grad()
def _probe(model: PreTrainedModel) -> ModelInfo:
    """Run two tokens through the model and look at the states it keeps."""
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits_only(model))
    layers, devices, dtypes = [], [], set()
    for layer in cache.layers:
        if layer.keys is None or layer.keys.dim() != 4:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps no key/value states in some layers. {_INSTEAD}"
            )
        (_, heads, _, head_dim), values = layer.keys.shape, layer.values.shape
        layers.append(LayerSpec((heads, head_dim), (values[1], values[3])))
        devices.append(layer.keys.device)
        dtypes.add(layer.keys.dtype)
    if len(dtypes) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps key/value states in several dtypes. {_INSTEAD}"
        )
    text = model.config.get_text_config(decoder=True)
    return ModelInfo(
        tuple(layers),
        tuple(devices),
        dtypes.pop(),
        getattr(text, "max_position_embeddings", None),
        device,
    )


def last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """Return the argument that spares a forward pass all logits but the last, if there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = "logits_to_keep" in inspect.signature(base.forward).parameters
    return {"logits_to_keep": 1} if known else {}
