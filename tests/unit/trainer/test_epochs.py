"""Several optimizer steps on a batch: which samples each one has, what it learns from them, and when it is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support import learning
from support.helpers import plain_logits, plain_tokens
from support.learning import batch, demonstrations
from vlmrl.config.algorithm import AlgorithmConfig, ImportanceCorrection
from vlmrl.config.trainer import Packing, SFTConfig, TrainerConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.trainer.epochs import Part, first_prompt, optimizer_steps, shuffled_parts
from vlmrl.trainer.objective import mismatch_kl
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TokenMetrics, TrainingSample

Make = Callable[[], Any]

CONFIG = TrainerConfig(max_steps=10, learning_rate=1e-2, eps=1e-2, weight_decay=0.1, max_grad_norm=0.5)
FOUR = AlgorithmConfig(epochs=2, minibatches=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer_of(model: Any, algorithm: AlgorithmConfig = FOUR, config: TrainerConfig = CONFIG) -> LocalTrainer:
    policy = Policy(model, position_function("mrope", 2), [])
    return LocalTrainer(policy, config, algorithm, temperature=1.0, max_new_tokens=4)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ── which samples ───────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_every_sample_is_in_one_part_and_siblings_are_divided_only_where_they_must(
    groups: list[int], count: int, seed: int
) -> None:
    count = min(count, len(groups))
    parts = shuffled_parts(groups, count, np.random.default_rng(seed))
    assert sorted(index for part in parts for index in part) == list(range(len(groups)))
    assert len(parts) == count
    assert all(parts)
    parts_of = {group: {n for n, part in enumerate(parts) for i in part if groups[i] == group} for group in groups}
    if len(parts_of) >= count:
        assert all(len(found) == 1 for found in parts_of.values())
        largest = max(Counter(groups).values())
        assert max(map(len, parts)) - len(groups) / count <= largest
    else:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_is_new_in_each_pass_and_each_step_and_the_same_again() -> None:
    algorithm, samples = AlgorithmConfig(epochs=3, minibatches=4), batch()

    def order(seed: int, version: int) -> list[tuple[int, ...]]:
        return [part.samples for part in optimizer_steps(samples, 0, algorithm, seed=seed, version=version)]

    orders = [order(0, 0)[:4], order(0, 0)[4:8], order(0, 0)[8:], order(0, 1)[:4], order(1, 0)[:4]]
    assert len({tuple(each) for each in orders}) == 5
    assert order(0, 0) == order(0, 0)
    steps = optimizer_steps(samples, 3, algorithm, seed=0, version=0)
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4 + [2] * 4
    assert [step.is_last for step in steps] == [False] * 11 + [True]
    assert sorted(i for step in steps[:4] for i in step.demonstrations) == [0, 1, 2]
    assert optimizer_steps(samples, 2, AlgorithmConfig(), seed=5, version=5) == [
        Part(0, tuple(range(len(samples))), (0, 1), is_last=True)
    ]


def test_siblings_have_their_prompt_in_common() -> None:
    """The image counts too: the two groups differ in it."""
    prompts = [first_prompt(sample) for sample in batch()]
    assert len(set(prompts[:3])) == len(set(prompts[3:6])) == 1
    assert len({*prompts}) == 3, "two groups, and one sample that has no image"
    other = replace(batch()[0].images[0], hash="another")
    places = (replace(batch()[0].placeholders[0], hash="another"), *batch()[0].placeholders[1:])
    changed = replace(batch()[0], mm_items=(other, *batch()[0].images[1:]), placeholders=places)
    assert first_prompt(changed) != prompts[0]


# ── what is learned ─────────────────────────────────────────────────────────────────────────────────────────


def logprobs_of(model: Any, samples: Sequence[TrainingSample]) -> list[Tensor]:
    return [plain_tokens(plain_logits(model, s.token_ids, s.mm_token_type_ids, s.mm_items), s)[0] for s in samples]


def reference_steps(model: Any, samples: list[TrainingSample], parts: list[Part], algorithm: AlgorithmConfig) -> float:
    """AdamW on PPO's clipped objective of the samples one by one, minibatch by minibatch (arXiv 1707.06347, algorithm
    1 and eq. 7; decoupled: arXiv 2110.00641, eq. 12) → the share of tokens that are clipped in the last pass."""
    c = CONFIG
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=c.betas, eps=c.eps)
    with torch.no_grad():
        old = [each.double() for each in logprobs_of(model, samples)]
    clipped, last = [], parts[-1].epoch
    for part in parts:
        chosen = [samples[i] for i in part.samples]
        policy = torch.cat(logprobs_of(model, chosen)).double()
        before = torch.cat([old[i] for i in part.samples])
        sampler = torch.cat([torch.from_numpy(s.inference_logprobs[s.loss_mask]) for s in chosen]).double()
        advantages = torch.cat([torch.from_numpy(s.advantages[s.loss_mask]) for s in chosen]).double()
        ratio = (policy - sampler).exp()
        if algorithm.importance_correction is ImportanceCorrection.truncated:
            ratio = (policy - before).exp()
            advantages = advantages * (before - sampler).exp().clamp_max(algorithm.importance_cap)
        low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
        optimizer.step()
        if part.epoch == last:
            cut = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
            clipped += cut.tolist()
    return float(np.mean(clipped))


@pytest.mark.parametrize("correction", [ImportanceCorrection.own, ImportanceCorrection.truncated])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_batch_is_learned_as_by_a_plain_loop(
    correction: ImportanceCorrection, minibatches: int, tiny_model: Make
) -> None:
    algorithm = AlgorithmConfig(epochs=2, minibatches=minibatches, importance_correction=correction)
    plain, model = tiny_model(), tiny_model()
    # Sampled by nearly the same policy, so that the clip acts on some tokens and not on all.
    near = [replace(s, inference_logprobs=s.inference_logprobs.copy()) for s in batch()]
    for sample, logprobs in zip(near, trainer_of(tiny_model()).logprobs(near), strict=True):
        noise = np.random.default_rng(len(sample.token_ids)).normal(0, 0.2, len(logprobs))
        sample.inference_logprobs[sample.loss_mask] = logprobs + noise
    parts = optimizer_steps(near, 0, algorithm, seed=0, version=0)
    clipped = reference_steps(plain, near, parts, algorithm)
    trainer = trainer_of(model, algorithm)
    result = trainer.train_step(near)
    assert distance(weights(model), weights(tiny_model())) > 1e-2
    assert distance(weights(model), weights(plain)) <= 1e-5
    assert result.metrics["last_epoch/clip_fraction"] == pytest.approx(clipped)
    assert clipped > 0
    assert result.version == trainer.version == 1
    assert (result.metrics["optimizer_steps"], result.metrics["epochs"]) == (2 * minibatches, 2)


@pytest.mark.parametrize("packing", [Packing.varlen, Packing.none])
def test_it_is_the_same_under_every_packing(packing: Packing, tiny_model: Make) -> None:
    found = []
    for each in (Packing.tree, packing):
        model = tiny_model()
        config = replace(CONFIG, packing=each, micro_batch_tokens=60)
        found.append((trainer_of(model, FOUR, config).train_step(batch()).metrics, weights(model)))
    assert distance(found[0][1], found[1][1]) <= 1e-5
    packed = {"tokens/packed", "images/encoded", "micro_batches", "memory/peak_bytes"}
    for key in found[0][0].keys() - packed:
        assert found[0][0][key] == pytest.approx(found[1][0][key], rel=1e-4, abs=1e-6), key


def test_what_is_measured_before_the_step_is_that_of_one_optimizer_step(tiny_model: Make) -> None:
    """Entropy, mismatch and tokens of the batch, whoever computes them; and KL(π_old ‖ π) of the last minibatch."""
    referred = [replace(s, reference_logprobs=s.inference_logprobs * 0.9) for s in batch()]
    one, four = (trainer_of(tiny_model(), each).train_step(referred) for each in (AlgorithmConfig(), FOUR))
    for key in ("entropy", "mismatch_kl/mean", "mismatch_kl/max", "reference_kl/mean", "tokens/trained"):
        assert four.metrics[key] == pytest.approx(one.metrics[key], rel=1e-5), key
    for mine, theirs in zip(four.tokens, one.tokens, strict=True):
        np.testing.assert_allclose(mine.trainer_logprobs, theirs.trainer_logprobs, rtol=1e-5)
        np.testing.assert_allclose(mine.entropies, theirs.entropies, rtol=1e-5)
    assert not {"policy_kl/mean", "optimizer_steps", "epochs"} & one.metrics.keys()
    assert four.metrics["tokens/unpacked"] == 2 * one.metrics["tokens/unpacked"]
    parts = optimizer_steps(referred, 0, FOUR, seed=0, version=0)
    plain = tiny_model()
    before = logprobs_of(tiny_model(), referred)
    reference_steps(plain, referred, parts[:-1], FOUR)
    last = [referred[i] for i in parts[-1].samples]
    after, old = torch.cat(logprobs_of(plain, last)).detach(), torch.cat([before[i] for i in parts[-1].samples])
    log_ratio = (after - old.detach()).double()
    wanted = float((log_ratio.exp() - 1 - log_ratio).mean())
    assert four.metrics["policy_kl/mean"] == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1e-3


def forward_passes(tiny_model: Make, algorithm: AlgorithmConfig) -> int:
    trainer = trainer_of(tiny_model(), algorithm)
    policy = trainer._learner.policy
    with patch.object(policy, "hidden_states", wraps=policy.hidden_states) as calls:
        trainer.train_step(batch())
    return calls.call_count


def test_the_old_logprobs_cost_a_forward_pass_only_where_no_other_has_them(tiny_model: Make) -> None:
    assert forward_passes(tiny_model, AlgorithmConfig()) == 1
    assert forward_passes(tiny_model, AlgorithmConfig(epochs=3)) == 3
    assert forward_passes(tiny_model, AlgorithmConfig(minibatches=3)) == 1 + 3


def test_demonstrations_are_divided_like_the_batch(tiny_model: Make) -> None:
    """Each optimizer step has its own; with all of them in every step, other weights come out."""
    config = replace(CONFIG, warmup=SFTConfig(rl_weight=0.3))
    with_them, without = tiny_model(), tiny_model()
    result = trainer_of(with_them, FOUR, config).train_step(batch(), demonstrations())
    trainer_of(without, FOUR, config).train_step(batch())
    assert result.metrics["demonstration_loss"] > 0
    assert distance(weights(with_them), weights(without)) > 1e-3


def test_the_tree_shares_as_much_in_minibatches_as_in_the_batch(tiny_model: Make) -> None:
    """With the samples shuffled one by one, prompts are computed in several minibatches."""
    samples = batch()[:6]

    def packed(minibatches: int) -> float:
        metrics = trainer_of(tiny_model(), AlgorithmConfig(minibatches=minibatches)).train_step(samples).metrics
        return metrics["tokens/packed"]

    whole, together = packed(1), packed(2)
    with patch("vlmrl.trainer.epochs.first_prompt", side_effect=range(6)):
        alone = packed(2)
    assert together <= whole + len(learning.SYSTEM) + 1 < alone, "two groups have the system prompt in common"


# ── when it ends early ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_rest_is_left_out_where_the_policy_has_moved_too_far(minibatches: int, tiny_model: Make) -> None:
    """Then the weights are those of the optimizer steps before, and the step counts as any other."""
    algorithm = AlgorithmConfig(epochs=4, minibatches=minibatches, target_kl=1e-6)
    model, other = tiny_model(), tiny_model()
    trainer = trainer_of(model, algorithm)
    result = trainer.train_step(batch())
    parts = optimizer_steps(batch(), 0, algorithm, seed=0, version=0)
    reference_steps(other, batch(), parts[:1], algorithm)
    assert distance(weights(model), weights(other)) <= 1e-5
    assert (result.metrics["optimizer_steps"], result.metrics["epochs"]) == (1, 1 / minibatches)
    assert result.metrics["policy_kl/mean"] > 1e-6
    assert result.version == trainer.version == 1
    assert trainer.is_between_steps
    assert np.isfinite(list(result.metrics.values())).all()
    far = trainer_of(tiny_model(), replace(algorithm, target_kl=1e5)).train_step(batch())
    assert far.metrics["optimizer_steps"] == 4 * minibatches


def test_a_later_optimizer_step_that_is_not_finite_leaves_no_weights_to_save(tiny_model: Make) -> None:
    """The first one leaves the weights as they were; after it, they contain a part of the batch."""
    samples = batch()
    parts = optimizer_steps(samples, 0, FOUR, seed=0, version=0)
    for number, is_whole in ((0, True), (1, False)):
        broken, model = batch(), tiny_model()
        trainer, index = trainer_of(model), parts[number].samples[0]
        advantages = np.where(broken[index].loss_mask, np.nan, 0).astype(np.float32)
        broken[index] = replace(broken[index], advantages=advantages)
        reason = "were not changed" if is_whole else "contain a part of the batch and are not saved"
        place = r"version 0, so" if is_whole else r"version 0, in optimizer step 2 of its batch, so"
        with pytest.raises(NonFiniteLossError, match=rf"{place} the weights {reason}.*: {broken[index].rollout_id}$"):
            trainer.train_step(broken)
        assert trainer.version == 0
        assert trainer.is_between_steps is is_whole
        assert (distance(weights(model), weights(tiny_model())) == 0) is is_whole


def test_a_run_that_stopped_goes_on_bit_for_bit(tiny_folder: Path, tmp_path: Path) -> None:
    never_stopped, again = (
        learning.continued(learning.learner(str(tiny_folder), "epochs", None), "epochs", str(tmp_path))
        for _ in range(2)
    )
    for key, value in never_stopped.items():
        if "memory/" not in key:
            np.testing.assert_array_equal(again[key], value, err_msg=key)


# ── planted mistakes ────────────────────────────────────────────────────────────────────────────────────────


def shifted(sample: TrainingSample, before: TokenMetrics) -> TrainingSample:
    return replace(sample, before=replace(before, trainer_logprobs=np.roll(before.trainer_logprobs, 1)))


def of_the_sampler(sample: TrainingSample, before: TokenMetrics) -> TrainingSample:
    sampled = sample.inference_logprobs[sample.loss_mask]
    return replace(sample, before=replace(before, trainer_logprobs=sampled))


MISTAKES: dict[str, tuple[str, Any]] = {
    "old logprobs a token late": ("vlmrl.trainer.trainer.replace", shifted),
    "old logprobs of the sampler": ("vlmrl.trainer.trainer.replace", of_the_sampler),
    "old logprobs of the step itself": ("vlmrl.trainer.trainer.replace", lambda sample, before: sample),
    "normalized by the batch": ("vlmrl.trainer.trainer._loss_tokens", lambda samples: 26),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_optimizer_steps_is_found(mistake: str, tiny_model: Make) -> None:
    with patch(*MISTAKES[mistake]), pytest.raises((AssertionError, KeyError)):
        test_a_batch_is_learned_as_by_a_plain_loop(ImportanceCorrection.truncated, 2, tiny_model)


def test_a_kl_with_the_wrong_sign_is_found(tiny_model: Make) -> None:
    with (
        patch("vlmrl.trainer.outcome.mismatch_kl", lambda new, old: mismatch_kl(old, new)),
        pytest.raises(AssertionError),
    ):
        test_what_is_measured_before_the_step_is_that_of_one_optimizer_step(tiny_model)
