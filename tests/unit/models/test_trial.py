"""The trial finds models that the policy would compute wrong, and passes those that it computes exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vlmrl.errors import ModelError
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.models.trial import code_of, try_policy

WIDTHS = {
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

EXACT = ("llama", "gpt2", "olmo3", "deepseek_v3", "jetmoe")

REFUSED = {
    "bloom": r"KL .* nats for 24 tokens and two branches\. Most likely its layers do not call transformers' attention",
    "gptj": "computes other probabilities",
    "xglm": "computes other probabilities",
    "stablelm": "StableLmAttention calls attention without the plan of the pass",
    "gpt_oss": r"s_aux \(attention sinks\)",
    "bert": "BertSelfAttention calls attention with is_causal",
    "mpt": "MptForCausalLM does not compute in the way that the policy needs",
}


def policy_of(family: str) -> Policy:
    numbers: dict[str, Any] = {"vocab_size": 96, "num_hidden_layers": 2, "pad_token_id": 0, **WIDTHS[family]}
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **numbers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    return Policy(model, position_function("sequential"), [])


@pytest.mark.parametrize("family", EXACT)
def test_exact_architectures_pass(family: str) -> None:
    try_policy(policy_of(family))


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_others_are_refused_with_a_reason(family: str, reason: str) -> None:
    policy = policy_of(family)
    with pytest.raises(ModelError, match=reason):
        try_policy(policy)


def test_a_model_that_computes_no_numbers_is_refused() -> None:
    policy = policy_of("llama")
    policy.model.model.norm.variance_epsilon = float("nan")
    with pytest.raises(ModelError, match=r"LlamaForCausalLM computes probabilities that are no numbers \(NaN\)"):
        try_policy(policy)


def test_the_error_of_a_family_is_named() -> None:
    with pytest.raises(ModelError, match=r"dict does not compute in the way .*KeyError: 'hidden'"), code_of({}):
        raise KeyError("hidden")
