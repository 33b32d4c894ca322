"""Models with random weights in the shapes of real ones, for timing without downloads."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ape_integrations.core.loading import clear_loading_errors
from ape_integrations.errors import ConfigError

#: Llama-architecture shapes by name; weights are random, so only times mean anything.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def random_model(
    shape: str, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a model of this shape and a tokenizer that only turns ids into words.

    Raises
    ------
    ConfigError
        Unknown shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"Unknown shape {shape!r}. Choose one of: {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 18, pad_token_id=0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    vocabulary = {f"t{i} ": i for i in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0 ")),
        unk_token="t0 ",
    )
    return model, tokenizer


def load_model(
    name: str | None, shape: str, dtype: str, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model by name, or make one of this shape where there is no name."""
    if name is None:
        return random_model(shape, getattr(torch, dtype), device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with clear_loading_errors(name):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        return model.to(device), AutoTokenizer.from_pretrained(name)
