"""The trial finds models that the policy would compute wrong, and passes those that it computes exactly."""

from __future__ import annotations

import pytest

from support.text_models import EXACT, policy_of
from vlmrl.errors import ModelError
from vlmrl.models.trial import code_of, try_policy

REFUSED = {
    "bloom": r"KL .* nats for 24 tokens and two branches\. Most likely its layers do not call transformers' attention",
    "gptj": "computes other probabilities",
    "xglm": "computes other probabilities",
    "stablelm": "StableLmAttention calls attention without the plan of the pass",
    "gpt_oss": r"s_aux \(attention sinks\)",
    "bert": "BertSelfAttention calls attention with is_causal",
    "mpt": "MptForCausalLM does not compute in the way that the policy needs",
}


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
