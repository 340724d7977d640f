"""Tiny random text models of architectures that no file of conf/model/vlm names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy

VOCABULARY = 96

WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},  # learned positions
    "olmo3": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
    "deepseek_v3": {  # latent attention: keys and values of two widths
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "jetmoe": {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "kv_channels": 16},
    "gemma2": {  # windows, soft caps
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 24,
    },
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},  # rotates a part of each head
    "kimi_linear": {  # states, and latent attention without positions
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 8,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "diffllama": {  # two calls of attention in each layer
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},  # ALiBi
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},  # rotates by itself
    "xglm": {"d_model": 32, "attention_heads": 4, "ffn_dim": 48, "num_layers": 2},
    "stablelm": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
    "gpt_oss": {  # attention sinks
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},  # looks ahead
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}

EXACT = ("llama", "gpt2", "olmo3", "deepseek_v3", "jetmoe", "gemma2", "phi", "kimi_linear", "diffllama")
"""Those that the policy computes."""


def policy_of(family: str) -> Policy:
    numbers: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0, **WIDTHS[family]}
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **numbers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    return Policy(model, position_function("sequential"), [])
