"""Tiny random models of many families, and what is expected of each.

Every model has three layers or so, sliding windows of six tokens (shorter than the tests'
contexts), and weights large enough for peaked attention, so that T, S and masks matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.models import VOCAB

WINDOW = 6

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

_MOE: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

_MLA: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **_MOE,
}

_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Parameters
    ----------
    title : str
        Name that users know.
    config : str
        Config class.
    changes : dict
        Differences from :data:`SHAPE`; None takes an entry away.
    special : str
        What its attention has beyond Llama's, for the support matrix.
    refused : str
        Part of the message of a refusal; empty for a family that is served.
    seed : int
        Of the random weights.
    model : str
        Model class; empty for the config's causal language model.
    """

    title: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    special: str = ""
    refused: str = ""
    seed: int = 0
    model: str = ""

    def build(self, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
        """Return a new random model."""
        entries = {**SHAPE, **self.changes, **more}
        entries = {name: value for name, value in entries.items() if value is not None}
        config = getattr(transformers, self.config)(**entries)
        config._experts_implementation = "eager"
        torch.manual_seed(self.seed)
        if self.model:
            model = getattr(transformers, self.model)(config).to(dtype).eval()
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        # Sinks and the like start at zero or uninitialised.
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and ("sink" in name or name.endswith("bias")):
                torch.nn.init.normal_(weight, std=0.5)
        return model


_SERVED = [
    Family("Llama 2, 3.x", "LlamaConfig", special="GQA"),
    Family("Arcee", "ArceeConfig", special="GQA"),
    Family("Apertus", "ApertusConfig", special="query/key norm"),
    Family("Mistral", "MistralConfig", {"sliding_window": WINDOW}, "sliding window"),
    Family(
        "Ministral",
        "MinistralConfig",
        {"sliding_window": WINDOW, "layer_types": _ALTERNATING},
        "alternating sliding window",
    ),
    Family("Ministral 3", "Ministral3Config", {"sliding_window": None}, "yarn, scaled queries"),
    Family("Mixtral", "MixtralConfig", {"num_local_experts": 4, "sliding_window": None}, "MoE"),
    Family("Qwen2, 2.5", "Qwen2Config", special="biases"),
    Family(
        "Qwen2 with sliding window",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "sliding window from some layer on",
    ),
    Family("Qwen2-MoE", "Qwen2MoeConfig", {"num_experts": 4, **_MOE}, "MoE"),
    Family("Qwen3", "Qwen3Config", special="query/key norm"),
    Family("Qwen3-MoE", "Qwen3MoeConfig", {"num_experts": 4, **_MOE}, "MoE, query/key norm"),
    Family("Gemma", "GemmaConfig", {"num_key_value_heads": 1}, "MQA"),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "logit softcap, alternating sliding window",
    ),
    Family(
        "Gemma 3 (text)",
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 8},
        "alternating sliding window, two RoPE bases, query/key norm",
    ),
    Family(
        "Gemma 4 (text)",
        "Gemma4TextConfig",
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        "shared KV layers, head dimension by layer, alternating sliding window",
    ),
    Family(
        "Gemma 3n (text)",
        "Gemma3nTextConfig",
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [96] * 4,
        },
        "shared KV layers, alternating sliding window",
    ),
    Family("VaultGemma", "VaultGemmaConfig", {"sliding_window": WINDOW}, "softcap, sliding window"),
    Family("Phi 1, 2", "PhiConfig", {"partial_rotary_factor": 0.5}, "partial rotary, biases"),
    Family("Phi-3", "Phi3Config", {"sliding_window": WINDOW}, "sliding window, fused QKV"),
    Family(
        "Phi-4-mini",
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [4.0, 8.0],
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
        },
        "longrope, partial rotary",
    ),
    Family(
        "Phi-3.5-MoE",
        "PhimoeConfig",
        {"num_local_experts": 4, "sliding_window": None, "num_experts_per_tok": 2},
        "MoE",
    ),
    Family("OLMo", "OlmoConfig", {"clip_qkv": 1.0}, "clipped queries, keys and values"),
    Family("OLMo 2", "Olmo2Config", special="query/key norm over all heads"),
    Family(
        "OLMo 3",
        "Olmo3Config",
        {"sliding_window": WINDOW, "layer_types": _ALTERNATING},
        "alternating sliding window",
    ),
    Family("OLMoE", "OlmoeConfig", {"num_experts": 4, **_MOE}, "MoE"),
    Family("Granite 3", "GraniteConfig", {"attention_multiplier": 0.3}, "own attention scale"),
    Family(
        "Granite 3 MoE",
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3},
        "MoE",
    ),
    Family("SmolLM3", "SmolLM3Config", {"no_rope_layer_interval": 2}, "layers without positions"),
    Family("StableLM", "StableLmConfig", {"qk_layernorm": True}, "partial rotary, query/key norm"),
    Family("StarCoder 2", "Starcoder2Config", {"sliding_window": WINDOW}, "sliding window, biases"),
    Family("GLM-4 (2024)", "GlmConfig", {"partial_rotary_factor": 0.5}, "partial rotary"),
    Family("GLM-4 (0414)", "Glm4Config", {"partial_rotary_factor": 0.5}, "partial rotary"),
    Family(
        "GLM-4.5",
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "use_qk_norm": True, **_MOE},
        "MoE, partial rotary, query/key norm",
    ),
    Family("Command-R", "CohereConfig", {"use_qk_norm": True}, "query/key norm"),
    Family(
        "Command-R7B, Command A",
        "Cohere2Config",
        {"sliding_window": WINDOW, "layer_types": _ALTERNATING},
        "sliding window with, full attention without positions",
    ),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        "attention sinks, alternating sliding window, yarn, MoE",
    ),
    Family(
        "MiMo-V2-Flash",
        "MiMoV2FlashConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            **_MOE,
        },
        "KV heads by layer, sinks, values of another size, sliding window",
    ),
    Family("GPT-NeoX, Pythia", "GPTNeoXConfig", special="partial rotary"),
    Family("GPT-2", "GPT2Config", special="learned absolute positions"),
    Family("OPT", "OPTConfig", {"word_embed_proj_dim": 48}, "learned absolute positions"),
    Family("GPT-BigCode, StarCoder", "GPTBigCodeConfig", special="MQA, learned positions"),
    Family("Nemotron", "NemotronConfig", {"initializer_range": 0.2}, "partial rotary"),
    Family(
        "EXAONE 4",
        "Exaone4Config",
        {"sliding_window": WINDOW, "layer_types": _ALTERNATING},
        "sliding window with, full attention without positions",
    ),
    Family("ERNIE 4.5", "Ernie4_5Config", special="interleaved rotary"),
    Family(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, **_MOE},
        "MoE, interleaved rotary",
    ),
    Family("HunYuan", "HunYuanDenseV1Config", special="query/key norm after rotary"),
    Family("Seed-OSS", "SeedOssConfig", special="biases"),
    Family("Helium", "HeliumConfig"),
    Family("Persimmon", "PersimmonConfig", special="partial rotary, query/key norm"),
    Family("MiniMax-M2", "MiniMaxM2Config", {"num_local_experts": 4, **_MOE}, "MoE"),
    Family("BitNet", "BitNetConfig", special="sub-layer norms"),
]

_LINEAR = "running state"
_NO_INTERFACE = "attention interface"

_REFUSED = [
    Family("MPT", "MptConfig", refused=_NO_INTERFACE),
    Family("BLOOM", "BloomConfig", refused=_NO_INTERFACE),
    Family("Falcon", "FalconConfig", {"head_dim": None}, refused=_NO_INTERFACE),
    Family("Falcon with ALiBi", "FalconConfig", {"head_dim": None, "alibi": True}, refused="ALiBi"),
    Family("GPT-J", "GPTJConfig", {"rotary_dim": 4}, refused=_NO_INTERFACE),
    Family("Mamba", "MambaConfig", refused=_LINEAR),
    Family(
        "Mamba 2",
        "Mamba2Config",
        {"num_heads": 12, "head_dim": 8, "expand": 2, "n_groups": 1},
        refused=_LINEAR,
    ),
    Family("Falcon-Mamba", "FalconMambaConfig", refused=_LINEAR),
    Family("Jamba", "JambaConfig", {"num_experts": 2}, refused=_LINEAR),
    Family(
        "Bamba",
        "BambaConfig",
        {"mamba_n_heads": 12, "mamba_d_head": 8, "attn_layer_indices": [1]},
        refused=_LINEAR,
    ),
    Family(
        "Granite 4 (hybrid)",
        "GraniteMoeHybridConfig",
        {
            "mamba_n_heads": 12,
            "mamba_d_head": 8,
            "num_local_experts": 4,
            "layer_types": ["mamba", "attention", "mamba"],
        },
        refused=_LINEAR,
    ),
    Family("Falcon-H1", "FalconH1Config", refused=_LINEAR),
    Family("RecurrentGemma", "RecurrentGemmaConfig", refused=_LINEAR),
    Family("RWKV", "RwkvConfig", refused=_LINEAR),
    Family("Qwen3-Next", "Qwen3NextConfig", {"num_experts": 4, **_MOE}, refused=_LINEAR),
    Family("Qwen3.5", "Qwen3_5TextConfig", refused=_LINEAR),
    Family(
        "LFM2", "Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}, refused=_LINEAR
    ),
    Family("MiniMax-Text-01", "MiniMaxConfig", {"num_local_experts": 4}, refused=_LINEAR),
    Family("Nemotron-H", "NemotronHConfig", refused=_LINEAR),
    Family("Kimi-Linear", "KimiLinearConfig", {"num_experts": 4, **_MOE}, refused=_LINEAR),
    Family("Llama 4", "Llama4TextConfig", {"num_local_experts": 2}, refused="chunks of positions"),
    Family("DeepSeek-V2", "DeepseekV2Config", {**_MLA}, refused="latent attention"),
    Family("DeepSeek-V3, R1", "DeepseekV3Config", {**_MLA}, refused="latent attention"),
    Family("MiniCPM 3", "MiniCPM3Config", {**_MLA}, refused="latent attention"),
    Family("GLM-4.7-Flash", "Glm4MoeLiteConfig", {**_MLA}, refused="latent attention"),
    Family("DeepSeek-V3.2", "DeepseekV32Config", {**_MLA}, refused="does not know"),
    Family("Doge", "DogeConfig", refused="another rule"),
    Family("DiffLlama", "DiffLlamaConfig", refused="does more with its keys and values"),
    Family("JetMoE", "JetMoeConfig", refused="does more with its keys and values"),
    Family(
        "Phi-3.5-MoE with a sliding window",
        "PhimoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        refused="another rule",
    ),
    Family(
        "T5",
        "T5Config",
        {"d_model": 48},
        refused="encoder-decoder",
        model="T5ForConditionalGeneration",
    ),
    Family(
        "BART",
        "BartConfig",
        {"head_dim": None},
        refused="encoder-decoder",
        model="BartForConditionalGeneration",
    ),
    Family("BERT", "BertConfig", refused="both directions"),
]

SERVED = {family.title: family for family in _SERVED}
REFUSED = {family.title: family for family in _REFUSED}


@functools.cache
def model_of(title: str) -> Any:
    """Return a served family's random model in fp32, the same one every time."""
    return SERVED[title].build()
