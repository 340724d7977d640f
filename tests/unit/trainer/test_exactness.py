"""Packed samples give the same loss, logprobs and gradients as the same samples one by one through plain transformers.

The samples form random trees: conversations with several images of different sizes, which fork in the middle of an
answer, at its end, or in the reply after it, in micro-batches of several sizes. The same is tested for every model
family that is packed, for layers that are recomputed in the backward pass, and for compiled layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from support.helpers import Part, Sampled, image, plain_logits, plain_tokens, sample, with_supports
from vlmrl.config.algorithm import AlgorithmConfig, Loss
from vlmrl.config.trainer import Packing
from vlmrl.models import blocks, compiling
from vlmrl.models.blocks import checkpoint_blocks, compile_blocks
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.trainer.forward import loss_logprobs, policy_scores, scores_without_gradient
from vlmrl.trainer.loss import BatchTotals, LossTokens
from vlmrl.trainer.objective import policy_loss
from vlmrl.trainer.packing import pack
from vlmrl.types import TrainingSample

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative error of float32 results."""
ALGORITHM = AlgorithmConfig(entropy_coef=0.2)
"""With a bonus, so that the gradient of the entropies is compared as well as that of the logprobs."""

SYSTEM = list(range(40, 70))
IMAGES = [image(1, 1), image(2, 3), image(3, 1), image(4, 2), image(2, 3, seed=1)]


@st.composite
def conversations(draw: st.DrawFn) -> list[TrainingSample]:
    """One or two groups of siblings: an opening with images, answers from a small alphabet, replies with images."""
    answers = st.lists(st.integers(100, 102), min_size=1, max_size=5)
    replies = st.lists(st.sampled_from(IMAGES) | st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=2)
    samples: list[TrainingSample] = []
    for group in range(draw(st.integers(1, 2))):
        opening: list[Part] = [[group], *draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=3)), 5]
        reply = draw(replies)
        for _ in range(draw(st.integers(2, 4))):
            parts: list[Part] = [SYSTEM, *opening, Sampled(draw(answers))]
            if draw(st.booleans()):
                parts += [*(reply if draw(st.booleans()) else draw(replies)), 6, Sampled(draw(answers))]
            samples.append(sample(f"{group}/{len(samples)}", *parts, seed=len(samples)))
    return samples


class Numbers:
    """The results of one way to compute the samples."""

    def __init__(self, model: Any, logprobs: list[Tensor], loss: Tensor) -> None:
        self.logprobs, self.loss = logprobs, loss
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()


def totals_of(samples: Sequence[TrainingSample]) -> BatchTotals:
    return BatchTotals(int(sum(s.loss_mask.sum() for s in samples)), len(samples), max_new_tokens=8)


def logits_of(model: Any, each: TrainingSample) -> Tensor:
    return plain_logits(model, each.token_ids, each.mm_token_type_ids, each.mm_items)


def one_by_one(model: Any, samples: Sequence[TrainingSample]) -> Numbers:
    """Results of plain transformers, with its own attention and positions, and pixels as its own input."""
    losses, found = [], []
    for index, each in enumerate(samples):
        logprobs, entropies = plain_tokens(logits_of(model, each), each)
        mask = torch.from_numpy(each.loss_mask)
        tokens = LossTokens(
            logprobs,
            torch.from_numpy(each.inference_logprobs)[mask],
            torch.from_numpy(each.advantages)[mask],
            torch.full((len(logprobs),), index),
            entropies,
        )
        loss = policy_loss(tokens, totals_of(samples), ALGORITHM).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        found.append(logprobs.detach())
    return Numbers(model, found, torch.stack(losses).sum())


def packed(
    policy: Policy,
    samples: Sequence[TrainingSample],
    packing: Packing,
    budget: int,
    algorithm: AlgorithmConfig = ALGORITHM,
) -> Numbers:
    losses, found = [], [torch.empty(0)] * len(samples)
    for batch in pack(
        samples, packing, budget, policy.positions, CPU, kernel=policy.kernel(shared=True), rules=policy.rules
    ):
        logprobs, entropies = loss_logprobs(policy, batch, 1.0)
        tokens = LossTokens(logprobs, batch.inference_logprobs, batch.advantages, batch.sample_index, entropies)
        loss = policy_loss(tokens, totals_of(samples), algorithm).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        for index in set(batch.sample_index.tolist()):
            found[index] = logprobs.detach()[batch.sample_index == index]
    return Numbers(policy.model, found, torch.stack(losses).sum())


def assert_same(mine: Numbers, theirs: Numbers, tolerance: float = TOLERANCE) -> None:
    for ours, reference in zip(mine.logprobs, theirs.logprobs, strict=True):
        assert float(((ours - reference) / reference).abs().max()) <= tolerance
    size = max(float(x.norm()) for x in theirs.gradients.values())
    assert mine.gradients.keys() == theirs.gradients.keys()
    for name, reference in theirs.gradients.items():
        # A gradient whose terms cancel can only be as exact as those terms.
        error = float((mine.gradients[name] - reference).norm())
        assert error <= tolerance * max(float(reference.norm()), 1e-3 * size), f"gradient of {name}: {error}"
    assert float((mine.loss - theirs.loss).abs()) <= tolerance * max(1e-1, float(theirs.loss.abs()))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(loaded_tiny_model: Any) -> Any:
    """The tiny model with the attention of transformers."""
    assert loaded_tiny_model.config.get_text_config()._attn_implementation == "sdpa"
    return loaded_tiny_model


@settings(max_examples=15)
@given(samples=conversations(), budget=st.sampled_from([60, 200, 16384]), packing=st.sampled_from(Packing))
def test_random_trees(
    tiny_policy: Policy, reference: Any, samples: list[TrainingSample], budget: int, packing: Packing
) -> None:
    assert_same(packed(tiny_policy, samples, packing, budget), one_by_one(reference, samples))


@pytest.fixture(scope="module")
def tiny_policy(loaded_tiny_model: Any) -> Policy:
    return Policy(copy.deepcopy(loaded_tiny_model), position_function("mrope", 2), [])


FORKS: list[tuple[Part, ...]] = [
    (SYSTEM, image(2, 3), image(1, 1), Sampled([100, 101, 102]), [5], image(3, 1), Sampled([100, 101])),
    (SYSTEM, image(2, 3), image(1, 1), Sampled([100, 101, 102]), [5], image(3, 1), Sampled([100, 102])),
    (SYSTEM, image(2, 3), image(1, 1), Sampled([100, 102])),
    (SYSTEM, image(2, 3), image(1, 1), Sampled([100, 101, 102]), [5], image(2, 3), Sampled([101])),
]


def forks() -> list[TrainingSample]:
    return [sample(str(i), *parts, seed=i) for i, parts in enumerate(FORKS)]


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("loss", Loss)
def test_branches_that_are_there_twice_change_no_gradient(tiny_policy: Policy, loss: Loss, packing: Packing) -> None:
    """Losses are means, over tokens or samples: what is there twice as often weighs the same."""
    algorithm = AlgorithmConfig(loss=loss)
    twice = [*forks(), *(replace(each, rollout_id=f"{each.rollout_id}/again") for each in forks())]
    once = packed(tiny_policy, forks(), packing, 16384, algorithm)
    found = packed(tiny_policy, twice, packing, 16384, algorithm)
    once.logprobs *= 2
    assert_same(found, once)


@pytest.mark.parametrize("packing", Packing)
def test_siblings_of_different_supports(tiny_policy: Policy, reference: Any, packing: Packing) -> None:
    """Siblings share rows, and each token's distribution is over its own support."""
    samples = [with_supports(each, seed) for seed, each in enumerate(forks())]
    samples.append(replace(with_supports(samples[0], 7), rollout_id="again"))
    assert_same(packed(tiny_policy, samples, packing, 16384), one_by_one(reference, samples))


def test_the_top_tokens_of_a_teacher_are_of_the_whole_distribution(tiny_policy: Policy) -> None:
    """Supports change the logprobs of what was sampled, and not the divergence from a teacher."""
    samples = [with_supports(each, seed) for seed, each in enumerate(forks())]
    (batch,) = pack(samples, Packing.tree, 16384, tiny_policy.positions, CPU)
    whole = replace(batch, supports=None)
    with torch.no_grad():
        found, likely = scores_without_gradient(tiny_policy, batch, 1.0, 3)
        wanted = scores_without_gradient(tiny_policy, whole, 1.0, 3)[1]
        assert likely is not None
        assert wanted is not None
        ids = likely[0]
        expected = loss_logprobs(tiny_policy, batch, 1.0)
        of_whole, _ = loss_logprobs(tiny_policy, whole, 1.0)
        learned = policy_scores(tiny_policy, replace(batch, reference_top_ids=ids), 1.0, with_values=False)
    assert torch.equal(ids, wanted[0])
    torch.testing.assert_close(learned.top_logprobs, wanted[1][batch.entry])
    torch.testing.assert_close(found, expected[0])
    torch.testing.assert_close((learned.logprobs, learned.entropies), expected)
    assert float((expected[0] - of_whole).abs().max()) > 0.1


def test_layers_that_are_recomputed(tiny_model: Callable[[], Any], reference: Any) -> None:
    policy = Policy(tiny_model(), position_function("mrope", 2), [])
    checkpoint_blocks(policy.model)
    runs = []
    for layer in (policy.model.model.visual.blocks[0], policy.model.model.language_model.layers[1]):
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same(packed(policy, forks(), Packing.tree, 16384), one_by_one(reference, forks()))
    assert len(runs) == 4, "both layers ran twice"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_layers_that_are_compiled(
    tiny_model: Callable[[], Any], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph serves all sizes. Layers are traced and differentiated; the minute of code generation is skipped."""
    monkeypatch.setattr(compiling, "COMPILER", {"backend": "aot_eager"})
    monkeypatch.setattr(blocks, "SHORT_PASS_ROWS", 0)
    counters = torch._dynamo.utils.counters
    counters.clear()
    policy = Policy(tiny_model(), position_function("mrope", 2), [])
    compile_blocks(policy.model)
    wanted = one_by_one(reference, forks())
    assert_same(packed(policy, forks(), Packing.tree, 16384), wanted)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert_same(packed(policy, forks(), Packing.tree, 130), wanted)
    assert counters["stats"]["unique_graphs"] <= graphs + 2, "other sizes reuse the same graphs"


TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def test_a_text_only_model() -> None:
    torch.manual_seed(0)
    auto: Any = Qwen3ForCausalLM
    model, other = (auto(Qwen3Config(**TEXT)).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    parts: list[list[Part]] = [[SYSTEM, Sampled([1, 2, 3]), [4], Sampled([5])], [SYSTEM, Sampled([1, 2, 9])]]
    samples = [sample(str(i), *each, seed=i) for i, each in enumerate(parts)]

    def plain(model: Any, each: TrainingSample) -> Tensor:
        ids = torch.from_numpy(each.token_ids)
        logits: Tensor = model(input_ids=ids[None]).logits[0]
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "logits_of", plain)
        wanted = one_by_one(other, samples)
    assert_same(packed(Policy(model, position_function("sequential"), []), samples, Packing.tree, 4096), wanted)


def test_a_mixture_of_experts(tiny_model: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    dense = tiny_model().config
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    config = Qwen3VLMoeConfig(
        text_config={**dense.text_config.to_dict(), **moe, "model_type": "qwen3_vl_moe_text"},
        vision_config={**dense.vision_config.to_dict(), "model_type": "qwen3_vl_moe_vision"},
        image_token_id=dense.image_token_id,
        video_token_id=dense.video_token_id,
        vision_start_token_id=dense.vision_start_token_id,
        vision_end_token_id=dense.vision_end_token_id,
    )
    auto: Any = Qwen3VLMoeForConditionalGeneration
    model, other = (auto(copy.deepcopy(config)).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    policy = Policy(model, position_function("mrope", 2), [])
    assert_same(packed(policy, forks(), Packing.tree, 16384), one_by_one(other, forks()))


def test_a_family_with_layers_that_carry_a_state(tiny_model: Callable[[], Any]) -> None:
    """Qwen3.5: three of four layers are linear attention, whose state after a prefix is where its branches start."""
    torch.manual_seed(0)
    ids = tiny_model().config
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True, "mrope_section": [1, 1, 0]}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = Qwen3_5Config(
        text_config={
            **TEXT,
            **linear,
            "num_hidden_layers": 4,
            "initializer_range": 0.1,
            "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
        },
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
        vision_end_token_id=ids.vision_end_token_id,
    )
    auto: Any = Qwen3_5ForConditionalGeneration
    model, other = (auto(copy.deepcopy(config)).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    policy = Policy(model, position_function("mrope", 2), [])
    assert policy.is_recurrent
    wanted = one_by_one(other, forks())
    for packing in Packing:
        # The decay's gradients cancel in float32; tests/unit/models/attention/test_recurrent.py compares in float64.
        assert_same(packed(policy, forks(), packing, 16384), wanted, tolerance=1e-4)
