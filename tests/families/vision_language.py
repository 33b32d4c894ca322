"""Tiny random vision-language models, used with text alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

from tests.families.registry import SHAPE, WINDOW

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 48,
    "num_heads": 4,
    "intermediate_size": 32,
}
# Multimodal RoPE: three positions a token, all the same for text.
_MROPE: dict[str, Any] = {
    **SHAPE,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "rope_theta": 10000.0,
    },
}
_QWEN_IDS: dict[str, Any] = {"image_token_id": 5, "video_token_id": 6}

# Title: model class, config class, entries, what is special about it.
SERVED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "text_config": {"model_type": "llama", **SHAPE},
            "image_token_index": 5,
        },
        "Llama or another text model",
    ),
    "Gemma 3 (4B and up)": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": _VISION,
            "text_config": {
                **SHAPE,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "mm_tokens_per_image": 4,
        },
        "alternating sliding window",
    ),
    "Gemma 4": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "text_config": {
                **SHAPE,
                "sliding_window": WINDOW,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": SHAPE["vocab_size"],
                "use_bidirectional_attention": "vision",
            },
        },
        "shared KV layers, alternating sliding window",
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 4},
            "text_config": _MROPE,
            **_QWEN_IDS,
        },
        "multimodal RoPE",
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"vision_config": _QWEN_VISION, "text_config": _MROPE, **_QWEN_IDS},
        "multimodal RoPE",
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
            "text_config": _MROPE,
            **_QWEN_IDS,
        },
        "interleaved multimodal RoPE",
    ),
    "GLM-4.1V": (
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        {"vision_config": _QWEN_VISION, "text_config": _MROPE},
        "multimodal RoPE",
    ),
    "Mistral Small 3.1": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "vision_config": {"model_type": "pixtral", **_VISION},
            "text_config": {"model_type": "mistral", **SHAPE, "sliding_window": None},
            "image_token_index": 5,
        },
        "",
    ),
    "SmolVLM": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "vision_config": _VISION,
            "text_config": {"model_type": "llama", **SHAPE},
            "image_token_id": 5,
        },
        "",
    ),
    "InternVL 3": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "text_config": {"model_type": "qwen2", **SHAPE},
            "image_token_id": 5,
        },
        "",
    ),
}

REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "PaliGemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "text_config": {"model_type": "gemma", **SHAPE},
            "projection_dim": 48,
        },
        "both directions",
    ),
    "Llama 3.2 Vision": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            },
            "text_config": {**SHAPE, "cross_attention_layers": [1]},
        },
        "no key/value states in some layers",
    ),
    "Llama 4 (multimodal)": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "vision_config": {
                **_VISION,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
            "text_config": {**SHAPE, "num_local_experts": 2},
        },
        "chunks of positions",
    ),
}


@functools.cache
def build(title: str) -> Any:
    """Return a random model, the same one every time."""
    model_class, config_class, entries, _ = {**SERVED, **REFUSED}[title]
    config = getattr(transformers, config_class)(**entries)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model
