"""The policy: the models that it refuses, its calls of the vision tower, and the distribution that it defines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from support.helpers import BANNED, IMAGE_PAD, PATCH_DIM, Part, image, plain_logits, prompt
from vlmrl.errors import ModelError
from vlmrl.models.attention.plan import TreePlan, plan_tree
from vlmrl.models.attention.prefix_tree import Segment, build_tree
from vlmrl.models.attention.rules import CAUSAL, AttentionRules
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import ImageItem, Prompt, mm_token_type_ids

CPU = torch.device("cpu")
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}


# transformers does not annotate its constructors.
Decoder: Any = Qwen3VLTextModel
Mistral: Any = MistralForCausalLM
Llama4: Any = Llama4ForCausalLM
PaliGemma: Any = PaliGemmaForConditionalGeneration
GptOss: Any = GptOssForCausalLM
Qwen3: Any = Qwen3ForCausalLM


def plan_of(length: int, rules: AttentionRules = CAUSAL) -> TreePlan:
    tree = build_tree([np.arange(length)])
    return plan_tree([Segment(p, np.arange(a, b), np.arange(a, b)) for p, a, b in tree.segments], CPU, rules)


def hidden_states(policy: Policy, given: Prompt, images: Sequence[ImageItem]) -> Tensor:
    """Hidden states of one prompt; `images` are encoded in this order."""
    features = policy.encode_items(images)
    length = len(given.token_ids)
    rows = [
        np.arange(features.first[p.hash], features.first[p.hash] + p.length) for p in given.placeholders if features
    ]
    with torch.no_grad():
        return policy.hidden_states(
            torch.from_numpy(given.token_ids),
            torch.from_numpy(policy.positions(length, given.placeholders, given.mm_items)),
            torch.from_numpy(mm_token_type_ids(length, given.placeholders)),
            plan_of(length, policy.rules),
            features,
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows])),
        )


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), BANNED)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


class NewerDecoder(Decoder):  # type: ignore[misc]
    """Adds the levels of features in a way that the policy does not know."""

    @property
    def _deepstack_process(self) -> Any:
        raise AttributeError


class OlderDecoder(Decoder):  # type: ignore[misc]
    """Swallows unknown arguments in **kwargs, so missing levels of features would go unnoticed."""

    def forward(self, inputs_embeds: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_a_decoder_that_places_features_in_another_way_is_refused(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    model.model.language_model.__class__ = NewerDecoder
    with pytest.raises(ModelError, match=r"NewerDecoder has no _deepstack_process.*transformers 5\.19"):
        Policy(model, position_function("mrope", 2), [])


def test_a_decoder_that_ignores_deepstack_levels_is_refused(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    model.model.language_model.__class__ = OlderDecoder
    policy = Policy(model, position_function("mrope", 2), [])
    with pytest.raises(ModelError, match=r"OlderDecoder\.forward takes no deepstack_visual_embeds, so 2 of the 3"):
        policy.encode_items([image(2, 3)])


def test_a_model_with_chunked_attention_is_refused() -> None:
    model = Llama4(Llama4TextConfig(**TINY_TEXT, num_local_experts=2, attention_chunk_size=4))
    with pytest.raises(ModelError, match="Llama4ForCausalLM's mask function failed, so the policy cannot know"):
        Policy(model, position_function("sequential"), [])


def test_a_model_whose_prompt_is_bidirectional_is_refused() -> None:
    """PaliGemma: image and prompt see each other, the answer is causal."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**TINY_TEXT, "model_type": "gemma"}
    config = PaliGemmaConfig(text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14})
    with pytest.raises(ModelError, match=r"shows token \d+ to token 0, which no window and no image explains"):
        Policy(PaliGemma(config), position_function("sequential"), [])


def test_a_model_with_attention_sinks_is_refused_at_its_first_pass() -> None:
    model = GptOss(GptOssConfig(**TINY_TEXT, num_local_experts=2, num_experts_per_tok=1, sliding_window=3))
    policy = Policy(model.eval(), position_function("sequential"), [])
    with pytest.raises(ModelError, match=r"GptOssAttention calls attention with s_aux \(attention sinks\)"):
        hidden_states(policy, Prompt(np.arange(5), (), ()), [])


def test_a_pass_that_was_planned_for_other_windows_is_refused() -> None:
    policy = Policy(Mistral(MistralConfig(**TINY_TEXT, sliding_window=4)), position_function("sequential"), [])
    ids = torch.arange(5)
    with pytest.raises(AssertionError, match="planned for another model"):
        policy.hidden_states(ids, ids.expand(4, 5), 0 * ids, plan_of(5), None, ids[:0])


# ── the forward ─────────────────────────────────────────────────────────────────────────────────────────────

CASES: list[tuple[Part, ...]] = [
    ([1, 2, 3],),
    ([1, 2], image(2, 3), [3]),
    (image(1, 2), [1], image(3, 2), [2, 3], image(1, 2), 4),
]


@pytest.mark.parametrize("parts", CASES)
def test_one_prompt_is_the_plain_forward(
    policy: Policy, tiny_model: Callable[[], Any], parts: tuple[Part, ...]
) -> None:
    given = prompt(*parts)
    types = mm_token_type_ids(len(given.token_ids), given.placeholders)
    with torch.no_grad():
        wanted = plain_logits(tiny_model(), given.token_ids, types, given.images)
    distinct = list({item.hash: item for item in given.images}.values())
    for order in (distinct, distinct[::-1]):
        found = policy.model.lm_head(hidden_states(policy, given, order))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_the_models_own_forward_still_works(policy: Policy, tiny_model: Callable[[], Any]) -> None:
    given = prompt(*CASES[-1])
    types = mm_token_type_ids(len(given.token_ids), given.placeholders)
    policy.config.get_text_config()._attn_implementation = "sdpa"
    with torch.no_grad():
        found, wanted = (plain_logits(m, given.token_ids, types, given.images) for m in (policy.model, tiny_model()))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


def test_rows_after_images_keep_their_positions(policy: Policy) -> None:
    """A reply without images after a prompt with images: its MRoPE positions are below its token indices."""
    ids, types, none = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    text = torch.arange(3).expand(4, 3)
    behind = torch.stack([torch.arange(3), *[torch.tensor([0, 1, 5])] * 3])
    with torch.no_grad():
        one, other = (policy.hidden_states(ids, p, types, plan_of(3), None, none) for p in (text, behind))
    torch.testing.assert_close(one[:2], other[:2])
    assert float((one[2] - other[2]).abs().max()) > 1e-2


def test_a_text_only_model_takes_the_same_path() -> None:
    torch.manual_seed(0)
    model = Qwen3(Qwen3Config(**TINY_TEXT)).eval()
    ids = torch.tensor([3, 1, 4, 1, 5])
    with torch.no_grad():
        wanted = model(input_ids=ids[None]).logits[0]
        policy = Policy(model, position_function("sequential"), [])
        assert policy.encode_items([]) is None
        found = model.lm_head(hidden_states(policy, Prompt(ids.numpy(), (), ()), []))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_features_are_the_images_in_order_at_every_level(policy: Policy) -> None:
    images = [image(2, 3), image(1, 1), image(3, 1)]
    with torch.no_grad():
        together = policy.encode_items(images)
        assert together is not None
        assert together.first == {images[0].hash: 0, images[1].hash: 6, images[2].hash: 7}
        assert [tuple(level.shape) for level in together.levels] == [(10, 64)] * 3, "one level and two of deepstack"
        for item in images:
            alone = policy.encode_items([item])
            assert alone is not None
            start = together.first[item.hash]
            for mine, theirs in zip(together.levels, alone.levels, strict=True):
                torch.testing.assert_close(mine[start : start + item.num_tokens], theirs, rtol=1e-5, atol=1e-5)


def test_a_wrong_number_of_features_is_refused(policy: Policy) -> None:
    broken = ImageItem("ab", np.zeros((1, 1, 3), np.uint8), dict(image(2, 3).mm_kwargs), num_tokens=5)
    with pytest.raises(ModelError, match=r"makes \[6\] features of images that stand for \[5\] tokens"):
        policy.encode_items([broken])


def test_features_of_one_image_are_not_given_to_another(policy: Policy) -> None:
    """Their sum would be right."""
    few = ImageItem("a", np.zeros((1, 1, 3), np.uint8), dict(image(2, 3).mm_kwargs), num_tokens=4)
    many = ImageItem("b", np.zeros((1, 1, 3), np.uint8), dict(image(2, 2).mm_kwargs), num_tokens=6)
    with pytest.raises(ModelError, match=r"makes \[6, 4\] features of images that stand for \[4, 6\] tokens"):
        policy.encode_items([few, many])


def test_the_vision_tower_keeps_its_own_attention(policy: Policy) -> None:
    assert policy.config.vision_config._attn_implementation == "sdpa"
    assert policy.config.vision_config.in_channels * 2 * 16 * 16 == PATCH_DIM


# ── the distribution ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [1.0, 0.25, 3.0])
def test_banned_tokens_have_probability_zero_and_the_rest_sums_to_one(policy: Policy, temperature: float) -> None:
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_probs = policy.log_probs(hidden, temperature)
    probabilities = log_probs.exp()
    assert log_probs.dtype is torch.float32
    assert bool((probabilities[:, BANNED] == 0).all())
    allowed = [i for i in range(log_probs.shape[1]) if i not in BANNED]
    assert IMAGE_PAD not in allowed
    torch.testing.assert_close(probabilities[:, allowed].sum(-1), torch.ones(5))
    logits = policy.model.lm_head(hidden)[:, allowed].double()
    torch.testing.assert_close(probabilities[:, allowed].double(), torch.softmax(logits / temperature, -1))
    log_probs[:, allowed].sum().backward()  # type: ignore[no-untyped-call]
    for gradient in (hidden.grad, policy.model.lm_head.weight.grad):
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool((gradient != 0).any())
    assert bool((policy.model.lm_head.weight.grad[BANNED] == 0).all())


def test_temperature_zero_is_the_plain_distribution(policy: Policy) -> None:
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.log_probs(hidden, 0.0), policy.log_probs(hidden, 1.0), rtol=0, atol=0)


def test_the_vision_tower_follows_the_dtype_of_the_moment(
    tiny_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the doctor switches a bfloat16 policy to float32 for a while, where flash attention does not exist."""
    shown = image(2, 3)
    expected = Policy(tiny_model(), position_function("mrope", 2), BANNED).encode_items([shown])
    monkeypatch.setattr(Policy, "_is_fused", property(lambda policy: policy.dtype is torch.bfloat16))
    policy = Policy(tiny_model(), position_function("mrope", 2), BANNED)
    policy.dtype = torch.bfloat16  # what a policy on a GPU computes in
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        policy.encode_items([shown])  # this machine has no flash attention, so it was chosen
    policy.dtype = torch.float32
    features = policy.encode_items([shown])
    assert features is not None
    assert expected is not None
    for level, expected_level in zip(features.levels, expected.levels, strict=True):
        torch.testing.assert_close(level, expected_level, rtol=0, atol=0)
