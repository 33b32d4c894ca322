"""What APE needs to know of a model, and the refusal of models that it cannot serve."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ape_integrations.core import attention, visibility
from ape_integrations.errors import UnsupportedModelError
from ape_integrations.store.base import KVSpec, LayerSpec

_INSTEAD = (
    "Use a decoder-only model whose layers keep key/value states behind transformers' attention "
    "interface, such as Llama, Qwen, Mistral, Gemma, Phi or SmolLM."
)

#: Layer types whose keys and values a query may read in any order.
_SERVED_LAYERS = {"full_attention", "sliding_attention"}

#: Parts of the names of layer types that keep a running state instead.
_STATEFUL_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid")


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
    """Check that APE can serve ``model``, and put APE attention in front of its own.

    The model keeps working as before for everybody else: only calls with an
    :class:`~ape_integrations.core.cache.APECache` are answered by APE attention.

    Raises
    ------
    UnsupportedModelError
        The architecture cannot be served; nothing was changed then.
    """
    check_supported(model)
    with unchanged_on_failure(model):
        info = _observe(model)
        text = _base(model).config.get_text_config(decoder=True)
        # A model that was attached before is observed like any other; its own stays in front.
        _set_implementation(model, attention.register(text._attn_implementation))
    return info


def keep_attached(model: PreTrainedModel) -> None:
    """Put APE attention in front again where the user chose another implementation meanwhile."""
    text = _base(model).config.get_text_config(decoder=True)
    chosen = text._attn_implementation
    if attention.implementation_name(chosen) != chosen:
        _set_implementation(model, attention.register(chosen))


def is_training(model: PreTrainedModel) -> bool:
    """Tell whether what the model computes now is random: dropout acts in training mode."""
    return _base(model).training or any(
        module.training and isinstance(module, _DropoutNd) and module.p > 0
        for module in model.modules()
    )


def unwrapped(model: Any) -> Any:
    """Return the model inside what ``torch.compile(model)`` returns.

    That wrapper's ``generate()`` is the inner model's and does not run compiled code; a model whose
    own ``compile()`` was called needs no wrapper and does.
    """
    return getattr(model, "_orig_mod", model)


def model_name(model: PreTrainedModel) -> str:
    """Return the name or path that a model was loaded from, or its architecture."""
    return str(getattr(model.config, "_name_or_path", "") or model.config.model_type)


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
    base = _base(model)
    config, name = base.config, type(base).__name__
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model. {_INSTEAD}")
    text = config.get_text_config(decoder=True)
    _check_layers(name, text, getattr(base, "_is_stateful", False))
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(
            f"{name} adds ALiBi biases to its attention, which count the distance of tokens in a "
            f"row and not their positions. {_INSTEAD}"
        )
    if not _uses_attention_interface(base):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface, so APE attention cannot be "
            f"plugged in. {_INSTEAD}"
        )
    if any(hasattr(module, "kv_b_proj") for module in base.modules()):
        raise UnsupportedModelError(
            f"{name} has multi-head latent attention, which keeps compressed states and expands "
            f"them before its attention function. {_INSTEAD}"
        )
    if not _is_causal(base, text):
        raise UnsupportedModelError(
            f"{name} attends in both directions, so no token's states could be kept for later "
            f"ones. {_INSTEAD}"
        )
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(f"{name} takes no position ids. {_INSTEAD}")
    if _adds_virtual_tokens(model):
        raise UnsupportedModelError(
            f"{name} carries an adapter that adds virtual tokens to every prompt, which would "
            "stand in the wrong place. Use an adapter that changes weights, such as LoRA."
        )


def _check_layers(name: str, text: PretrainedConfig, stateful: bool) -> None:
    """Refuse layers that do anything but read keys and values by position."""
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    running = sorted(k for k in kinds if any(word in k for word in _STATEFUL_LAYERS))
    if running or stateful:
        detail = f" ({', '.join(running)})" if running else ""
        raise UnsupportedModelError(
            f"{name} has layers with a running state{detail}, which cannot be encoded context by "
            f"context. {_INSTEAD}"
        )
    if "chunked_attention" in kinds or getattr(text, "attention_chunk_size", None):
        raise UnsupportedModelError(
            f"{name} attends within fixed chunks of positions, which contexts that share "
            f"positions would break. {_INSTEAD}"
        )
    other = sorted(kinds - _SERVED_LAYERS)
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of a kind that APE attention does not know ({', '.join(other)}), "
            f"such as ones that choose or compress the tokens to attend to. {_INSTEAD}"
        )


def _base(model: Any) -> Any:
    """Return the transformers model inside an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _uses_attention_interface(base: Any) -> bool:
    """Whether the family declares it, or (as StableLM) does it without saying so."""
    if getattr(base, "_supports_attention_backend", False):
        return True
    return hasattr(sys.modules[type(base).__module__], "ALL_ATTENTION_FUNCTIONS")


def _is_causal(base: Any, text: PretrainedConfig) -> bool:
    """Whether every layer of the text model looks back alone; a vision tower need not."""
    layers = (
        module
        for module in base.modules()
        if getattr(module, "layer_idx", None) is not None
        and getattr(module, "config", text) is text
    )
    if any(getattr(layer, "is_causal", True) is False for layer in layers):
        return False
    return getattr(text, "is_causal", True) is not False


def _adds_virtual_tokens(model: Any) -> bool:
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict):
        return False
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values())


def _configs(base: Any) -> list[PretrainedConfig]:
    """Return every config that a part of the model reads, outer ones first."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                add(getattr(config, key, None))

    add(base.config)
    for module in base.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _set_implementation(model: Any, implementation: str) -> None:
    """Set the attention implementation of the text model, and of nothing else."""
    base = _base(model)
    config, text = base.config, base.config.get_text_config(decoder=True)
    part = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    base.set_attn_implementation(implementation if part is None else {part: implementation})


@contextmanager
def unchanged_on_failure(model: Any) -> Iterator[None]:
    """Give a model its attention and its training mode back where the body raises."""
    base = _base(model)
    implementations = [(config, config._attn_implementation) for config in _configs(base)]
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    except BaseException:
        # Setting it on an outer config sets it on the inner ones too, which then follow.
        for config, implementation in implementations:
            config._attn_implementation = implementation
        for module, mode in training:
            module.training = mode
        raise


@torch.no_grad()
def _observe(model: PreTrainedModel) -> ModelInfo:
    """Run a few tokens through the model; look at its states, and at what it wants to see."""
    base, name = _base(model), type(_base(model)).__name__
    text = base.config.get_text_config(decoder=True)
    device = _input_device(model)
    cache = DynamicCache()
    ids = torch.arange(8, device=device)[None] % embeddings(model).shape[0]
    original = text._attn_implementation
    _set_implementation(model, visibility.register(original))
    try:
        with visibility.observed() as calls:
            model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits_only(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be run with its states in an ordinary cache ({error}). {_INSTEAD}"
        ) from error
    finally:
        _set_implementation(model, original)
    visibility.check_visibility(name, calls, text, _INSTEAD)
    layers: list[LayerSpec] = []
    devices: list[torch.device] = []
    dtypes: set[torch.dtype] = set()
    cache_layers: list[Any] = cache.layers
    for layer in cache_layers:
        if getattr(layer, "keys", None) is None or layer.keys.dim() != 4:
            raise UnsupportedModelError(
                f"{name} keeps no key/value states in some layers. {_INSTEAD}"
            )
        (_, heads, _, head_dim), values = layer.keys.shape, layer.values.shape
        layers.append(LayerSpec((heads, head_dim), (values[1], values[3])))
        devices.append(layer.keys.device)
        dtypes.update((layer.keys.dtype, layer.values.dtype))
    if not layers:
        raise UnsupportedModelError(f"{name} keeps no key/value states. {_INSTEAD}")
    if len(dtypes) != 1:
        raise UnsupportedModelError(f"{name} keeps states in several dtypes. {_INSTEAD}")
    return ModelInfo(tuple(layers), tuple(devices), dtypes.pop(), max_positions(text), device)


def embeddings(model: PreTrainedModel) -> Tensor:
    """Return the weight of the input embeddings, ``(vocab_size, hidden_size)``."""
    module: Any = model.get_input_embeddings()
    weight: Tensor = module.weight
    return weight


def _input_device(model: PreTrainedModel) -> torch.device:
    device = embeddings(model).device
    if device.type != "meta":
        return device
    # Offloaded weights stand on no device between calls; a hook brings them to the one that it
    # computes on.
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def max_positions(text: PretrainedConfig) -> int | None:
    """Return how many positions a text model can serve; None where its config names no limit.

    RoPE scaling that goes by the length of a sequence (dynamic, longrope) turns all positions
    another way once the sequence is long. Stored keys must not depend on what is asked about
    them, so such models are served within the length up to which nothing changes. Contexts share
    their positions, so that this is a limit on each context, not on all of them together.
    """
    limit: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            limit = min(limit or original, original) if original else limit
        elif "dynamic" in str(kind.get("rope_type")) and limit:
            # At the limit itself, transformers keeps what a longer sequence has left behind.
            limit = limit - 1
    return limit


def last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """Return the argument that spares a forward pass all logits but the last, if there is one."""
    known = "logits_to_keep" in inspect.signature(_base(model).forward).parameters
    return {"logits_to_keep": 1} if known else {}
