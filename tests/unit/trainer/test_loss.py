"""Each loss equals a loop that restates its equation, token by token, in numpy float64.

A reference takes log π and, separately, the log π that has no gradient in the equation (`frozen`). Its finite
differences in the first are the gradient that autograd must return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmrl.config.algorithm import AlgorithmConfig, ImportanceCorrection, KLConfig, KLEstimator, Loss
from vlmrl.trainer import loss as loss_module
from vlmrl.trainer.loss import (
    LOSSES,
    BatchTotals,
    LossOutput,
    LossTokens,
    grpo,
    gspo,
)
from vlmrl.trainer.objective import loss_metrics, mismatch_kl, policy_loss, reference_kl, supervised

Array: TypeAlias = NDArray[np.float64]
Reference: TypeAlias = Callable[[Array, Array, Array, Array, NDArray[np.int64], BatchTotals], float]

CONFIG = AlgorithmConfig(clip_low=0.2, clip_high=0.28)


def clipped_term(ratio: float, advantage: float) -> float:
    bounded = min(max(ratio, 1 - CONFIG.clip_low), 1 + CONFIG.clip_high)
    return float(min(ratio * advantage, bounded * advantage))


def grpo_reference(
    logp: Array, frozen: Array, mu: Array, adv: Array, sample: NDArray[np.int64], totals: BatchTotals
) -> float:
    return -sum(clipped_term(np.exp(logp[t] - mu[t]), adv[t]) for t in range(len(logp))) / totals.tokens


def dr_grpo_reference(
    logp: Array, frozen: Array, mu: Array, adv: Array, sample: NDArray[np.int64], totals: BatchTotals
) -> float:
    terms = sum(clipped_term(np.exp(logp[t] - mu[t]), adv[t]) for t in range(len(logp)))
    return -terms / totals.samples / totals.max_new_tokens


def rloo_reference(
    logp: Array, frozen: Array, mu: Array, adv: Array, sample: NDArray[np.int64], totals: BatchTotals
) -> float:
    return -float(sum(np.exp(frozen[t] - mu[t]) * adv[t] * logp[t] for t in range(len(logp)))) / totals.samples


def gspo_reference(
    logp: Array, frozen: Array, mu: Array, adv: Array, sample: NDArray[np.int64], totals: BatchTotals
) -> float:
    loss = 0.0
    for i in set(sample.tolist()):
        mine = np.flatnonzero(sample == i)
        sequence = np.exp(np.mean([frozen[t] - mu[t] for t in mine]))
        terms = [clipped_term(sequence * np.exp(logp[t]) / np.exp(frozen[t]), adv[t]) for t in mine]
        loss -= sum(terms) / len(mine) / totals.samples
    return loss


def cispo_reference(
    logp: Array, frozen: Array, mu: Array, adv: Array, sample: NDArray[np.int64], totals: BatchTotals
) -> float:
    loss = 0.0
    for t in range(len(logp)):
        weight = min(max(np.exp(frozen[t] - mu[t]), 1 - CONFIG.clip_low), 1 + CONFIG.clip_high)
        loss -= weight * adv[t] * logp[t] / totals.tokens
    return loss


REFERENCES: dict[Loss, Reference] = {
    Loss.grpo: grpo_reference,
    Loss.ppo: grpo_reference,
    Loss.dr_grpo: dr_grpo_reference,
    Loss.dapo: grpo_reference,
    Loss.rloo: rloo_reference,
    Loss.gspo: gspo_reference,
    Loss.cispo: cispo_reference,
}


def random_tokens(seed: int, *, per_token_advantages: bool = True) -> LossTokens:
    """Five samples of 1 to 9 tokens, interleaved, with ratios on both sides of both clips."""
    rng = np.random.default_rng(seed)
    sample = rng.permutation(np.repeat([3, 4, 7, 8, 9], rng.integers(1, 10, 5)))
    n = len(sample)
    mu = -rng.exponential(1.5, n)
    advantages = rng.normal(size=n) if per_token_advantages else rng.normal(size=10)[sample]
    return LossTokens(
        logprobs=torch.tensor(mu + rng.normal(0.0, 0.5, n), dtype=torch.float64, requires_grad=True),
        inference_logprobs=torch.tensor(mu, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sample_index=torch.tensor(sample),
        entropies=torch.tensor(rng.exponential(1.0, n), requires_grad=True),
        reference_logprobs=torch.tensor(mu + rng.normal(0.0, 0.7, n), dtype=torch.float64),
        reference_top_ids=torch.tensor([[4, 2]] * n),
        reference_top_logprobs=torch.tensor(np.log(rng.dirichlet(np.ones(3), n))),
        top_logprobs=torch.tensor(np.log(rng.dirichlet(np.ones(3), n)), requires_grad=True),
    )


def totals_of(tokens: LossTokens) -> BatchTotals:
    samples = len(set(tokens.sample_index.tolist()))
    return BatchTotals(tokens=len(tokens.logprobs), samples=samples, max_new_tokens=6)


def numpy_of(tokens: LossTokens) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    logp, mu, adv = tokens.logprobs.detach().numpy(), tokens.inference_logprobs.numpy(), tokens.advantages.numpy()
    return logp, mu, adv, tokens.sample_index.numpy()


def finite_differences(function: Callable[[Array], float], at: Array, h: float = 1e-6) -> Array:
    steps = np.eye(len(at)) * h
    return np.array([(function(at + step) - function(at - step)) / (2 * h) for step in steps])


def gradient(output: LossOutput, tokens: LossTokens) -> Array:
    (found,) = torch.autograd.grad(output.loss, tokens.logprobs)
    return found.numpy()


def part(tokens: LossTokens, keep: torch.Tensor) -> LossTokens:
    found: dict[str, Any] = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    chosen: dict[str, Any] = {name: None if each is None else each[keep] for name, each in found.items()}
    return LossTokens(**chosen)


def test_every_loss_of_the_config_has_its_function() -> None:
    assert set(LOSSES) == set(Loss) == set(REFERENCES)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_are_those_of_the_reference(loss: Loss, seed: int) -> None:
    tokens = random_tokens(seed)
    totals, reference = totals_of(tokens), REFERENCES[loss]
    logp, mu, adv, sample = numpy_of(tokens)

    output = LOSSES[loss](tokens, totals, CONFIG)

    np.testing.assert_allclose(output.loss.item(), reference(logp, logp, mu, adv, sample, totals), rtol=1e-12)
    expected = finite_differences(lambda x: reference(x, logp, mu, adv, sample, totals), logp)
    np.testing.assert_allclose(gradient(output, tokens), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up_to_the_batch(loss: Loss, seed: int) -> None:
    tokens = random_tokens(seed)
    totals = totals_of(tokens)
    first = torch.isin(tokens.sample_index, torch.tensor([3, 8]))

    whole = LOSSES[loss](tokens, totals, CONFIG)
    parts = [LOSSES[loss](part(tokens, keep), totals, CONFIG) for keep in (first, ~first)]

    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    np.testing.assert_allclose(sum(gradient(p, tokens) for p in parts), gradient(whole, tokens), rtol=1e-12)
    for key, value in whole.sums.items():
        assert parts[0].sums[key] + parts[1].sums[key] == pytest.approx(value)
    for key, value in whole.maxima.items():
        assert max(p.maxima[key] for p in parts) == pytest.approx(value)


@pytest.mark.parametrize("loss", Loss)
def test_metrics_equal_those_of_a_loop(loss: Loss) -> None:
    tokens = random_tokens(0)
    logp, mu, adv, sample = numpy_of(tokens)
    ratio = np.exp(logp - mu)
    if loss is Loss.gspo:
        ratio = np.array([np.exp(np.mean((logp - mu)[sample == i])) for i in sample])
    above, below = ratio > 1 + CONFIG.clip_high, ratio < 1 - CONFIG.clip_low
    clipped = {Loss.cispo: above | below, Loss.rloo: np.zeros_like(above)}.get(
        loss, (above & (adv > 0)) | (below & (adv < 0))
    )

    output = LOSSES[loss](tokens, totals_of(tokens), CONFIG)

    assert output.sums["clip_fraction"] == clipped.sum()
    assert output.sums["ratio/mean"] == pytest.approx(ratio.sum())
    assert output.maxima["ratio/max"] == pytest.approx(ratio.max())
    assert loss is Loss.rloo or clipped.any()


@pytest.mark.parametrize("loss", Loss)
def test_on_policy_every_loss_is_the_policy_gradient_of_its_normalization(loss: Loss) -> None:
    tokens = random_tokens(1)
    on_policy = replace(tokens, inference_logprobs=tokens.logprobs.detach())
    totals = totals_of(tokens)
    sample = tokens.sample_index.numpy()
    lengths = np.array([(sample == i).sum() for i in sample])
    divisor = {
        Loss.grpo: totals.tokens,
        Loss.ppo: totals.tokens,
        Loss.dapo: totals.tokens,
        Loss.cispo: totals.tokens,
        Loss.dr_grpo: totals.samples * totals.max_new_tokens,
        Loss.rloo: totals.samples,
        Loss.gspo: totals.samples * lengths,
    }[loss]

    output = LOSSES[loss](on_policy, totals, CONFIG)

    np.testing.assert_allclose(gradient(output, on_policy), -tokens.advantages.numpy() / divisor, rtol=1e-12)
    assert output.sums["clip_fraction"] == 0
    assert output.maxima["ratio/max"] == 1


# ── importance correction ───────────────────────────────────────────────────────────────────────────────────

CORRECTIONS = [c for c in ImportanceCorrection if c is not ImportanceCorrection.own]
CAP = 1.5


def weight_reference(ratio: float, correction: ImportanceCorrection) -> float:
    return {
        ImportanceCorrection.truncated: min(ratio, CAP),
        ImportanceCorrection.masked: ratio if 1 / CAP <= ratio <= CAP else 0.0,
        ImportanceCorrection.none: 1.0,
    }[correction]


def corrected(loss: Loss, correction: ImportanceCorrection) -> AlgorithmConfig:
    return replace(CONFIG, loss=loss, importance_correction=correction, importance_cap=CAP)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction_weighs_the_on_policy_gradient(loss: Loss, correction: ImportanceCorrection) -> None:
    tokens = random_tokens(2)
    logp, mu, _, _ = numpy_of(tokens)
    totals = totals_of(tokens)
    ratio = np.exp(logp - mu)
    weight = np.array([weight_reference(r, correction) for r in ratio])
    on_policy = replace(tokens, inference_logprobs=tokens.logprobs.detach())

    output = policy_loss(tokens, totals, corrected(loss, correction))

    plain = gradient(LOSSES[loss](on_policy, totals, CONFIG), on_policy)
    np.testing.assert_allclose(gradient(output, tokens), plain * weight, rtol=1e-12)
    sums, maxima = ({k: float(v) for k, v in part.items()} for part in (output.sums, output.maxima))
    metrics = loss_metrics(sums, maxima, len(weight))
    assert metrics["importance/cut_fraction"] == pytest.approx(np.mean(weight != ratio))
    assert metrics["importance/weight_mean"] == pytest.approx(weight.mean())
    assert metrics["importance/ess"] == pytest.approx(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))
    assert (metrics["ratio/mean"], metrics["ratio/max"]) == pytest.approx((ratio.mean(), ratio.max()))
    assert np.mean(weight != ratio) > 0, "no weight is cut, so the test shows nothing"


def decoupled_reference(logp: Array, old: Array, mu: Array, adv: Array, correction: ImportanceCorrection) -> float:
    """Decoupled PPO (arXiv 2110.00641, eq. 12), token by token, with the weights of the table in objective.py."""
    terms = [
        clipped_term(np.exp(logp[t] - old[t]), weight_reference(np.exp(old[t] - mu[t]), correction) * adv[t])
        for t in range(len(logp))
    ]
    return -sum(terms) / len(logp)


def assert_decoupled(correction: ImportanceCorrection) -> None:
    tokens = random_tokens(4)
    old = tokens.inference_logprobs + torch.tensor(np.random.default_rng(4).normal(0, 0.4, len(tokens.logprobs)))
    tokens, config = replace(tokens, recorded_logprobs=old), corrected(Loss.grpo, correction)
    logp, mu, adv, _ = numpy_of(tokens)

    output = policy_loss(tokens, totals_of(tokens), config)

    wanted = decoupled_reference(logp, old.numpy(), mu, adv, correction)
    np.testing.assert_allclose(output.loss.item(), wanted, rtol=1e-12)
    slope = finite_differences(lambda x: decoupled_reference(x, old.numpy(), mu, adv, correction), logp)
    np.testing.assert_allclose(gradient(output, tokens), slope, rtol=1e-5, atol=1e-8)
    ratio = np.exp(logp - old.numpy())
    weight = np.array([weight_reference(m, correction) for m in np.exp(old.numpy() - mu)])
    clipped = ((ratio > 1 + CONFIG.clip_high) & (weight * adv > 0)) | (
        (ratio < 1 - CONFIG.clip_low) & (weight * adv < 0)
    )
    assert output.sums["clip_fraction"] == clipped.sum() > 0
    assert output.sums["importance/weight_mean"] == pytest.approx(weight.sum())
    assert output.sums["ratio/mean"] == pytest.approx(np.exp(logp - mu).sum())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_after_the_first_optimizer_step_a_correction_is_decoupled_ppo(correction: ImportanceCorrection) -> None:
    assert_decoupled(correction)


DECOUPLED_MISTAKES: dict[str, Callable[[LossTokens], torch.Tensor]] = {
    "the sampler": lambda tokens: tokens.inference_logprobs,
    "the policy itself": lambda tokens: tokens.logprobs.detach(),
    "a token late": lambda tokens: torch.roll(tokens.recorded_logprobs, 1),  # type: ignore[arg-type]
    "sign": lambda tokens: -tokens.recorded_logprobs,  # type: ignore[operator]
}


@pytest.mark.parametrize("mistake", DECOUPLED_MISTAKES)
def test_a_wrong_old_policy_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossTokens, "old_logprobs", property(DECOUPLED_MISTAKES[mistake]))
    with pytest.raises(AssertionError):
        assert_decoupled(ImportanceCorrection.truncated)


def dual_clip_reference(ratio: float, advantage: float, c: float) -> float:
    """arXiv 1912.09729, eq. 5, for A < 0; PPO's objective elsewhere."""
    plain = clipped_term(ratio, advantage)
    return max(plain, c * advantage) if advantage < 0 else plain


def assert_dual_clip(loss: Loss) -> None:
    config = replace(CONFIG, loss=loss, clip_dual=1.5)
    tokens = random_tokens(1)
    totals = totals_of(tokens)
    logp, mu, adv, sample = numpy_of(tokens)

    def reference(x: Array) -> float:
        found = 0.0
        for t in range(len(x)):
            mine = np.flatnonzero(sample == sample[t])
            sequence = np.exp(np.mean((logp - mu)[mine])) * np.exp(x[t] - logp[t])
            ratio = sequence if loss is Loss.gspo else np.exp(x[t] - mu[t])
            divisor = {
                Loss.gspo: len(mine) * totals.samples,
                Loss.dr_grpo: totals.samples * totals.max_new_tokens,
            }.get(loss, totals.tokens)
            found -= dual_clip_reference(ratio, adv[t], 1.5) / divisor
        return found

    output, plain = policy_loss(tokens, totals, config), policy_loss(tokens, totals, replace(config, clip_dual=None))
    np.testing.assert_allclose(output.loss.item(), reference(logp), rtol=1e-12)
    np.testing.assert_allclose(gradient(output, tokens), finite_differences(reference, logp), rtol=1e-5, atol=1e-8)
    assert (output.sums["clip_fraction"] > plain.sums["clip_fraction"]) == (output.loss.item() != plain.loss.item())
    assert loss is Loss.gspo or output.loss.item() < plain.loss.item()


@pytest.mark.parametrize("loss", [Loss.grpo, Loss.dapo, Loss.dr_grpo, Loss.gspo])
def test_dual_clip_bounds_what_a_negative_advantage_costs(loss: Loss) -> None:
    assert_dual_clip(loss)


def with_dual(bound: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, everywhere: bool = False) -> Any:
    """The clipped objective with a wrong dual clip."""
    right = loss_module._clipped_objective

    def wrong(
        ratio: torch.Tensor, advantages: torch.Tensor, config: AlgorithmConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        objective, clipped = right(ratio, advantages, replace(config, clip_dual=None))
        if config.clip_dual is None:
            return objective, clipped
        applies = (advantages < 0) | everywhere
        return torch.where(applies, torch.maximum(objective, bound(advantages, ratio)), objective), clipped

    return wrong


DUAL_MISTAKES = {
    "sign": with_dual(lambda advantages, ratio: -1.5 * advantages),
    "of the ratio": with_dual(lambda advantages, ratio: 1.5 * ratio * advantages),
    "of all advantages": with_dual(lambda advantages, ratio: 1.5 * advantages, everywhere=True),
    "of the clip": with_dual(lambda advantages, ratio: 1.28 * advantages),
}


@pytest.mark.parametrize("mistake", DUAL_MISTAKES)
def test_a_mistake_in_dual_clip_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_clipped_objective", DUAL_MISTAKES[mistake])
    with pytest.raises(AssertionError):
        assert_dual_clip(Loss.grpo)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_on_policy_every_correction_is_the_loss_itself(loss: Loss, correction: ImportanceCorrection) -> None:
    tokens = random_tokens(1)
    on_policy = replace(tokens, inference_logprobs=tokens.logprobs.detach())
    totals = totals_of(tokens)

    own, other = (
        policy_loss(on_policy, totals, corrected(loss, each)) for each in (ImportanceCorrection.own, correction)
    )

    assert (gradient(own, on_policy) == gradient(other, on_policy)).all()
    assert other.sums["importance/cut_fraction"] == 0


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_metrics_of_a_correction_add_up_over_micro_batches(correction: ImportanceCorrection) -> None:
    tokens = random_tokens(0)
    totals, config = totals_of(tokens), corrected(Loss.grpo, correction)
    first = torch.isin(tokens.sample_index, torch.tensor([3, 8]))

    whole = policy_loss(tokens, totals, config)
    parts = [policy_loss(part(tokens, keep), totals, config) for keep in (first, ~first)]

    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    for key, value in whole.sums.items():
        assert parts[0].sums[key] + parts[1].sums[key] == pytest.approx(value)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("correction", ImportanceCorrection)
def test_the_entropy_bonus_is_a_mean_over_the_batch_whatever_the_loss(
    loss: Loss, correction: ImportanceCorrection
) -> None:
    tokens = random_tokens(3)
    totals, config = totals_of(tokens), corrected(loss, correction)
    without, with_bonus = (policy_loss(tokens, totals, replace(config, entropy_coef=coef)) for coef in (0.0, 0.3))
    entropies = tokens.entropies.detach().numpy()
    assert with_bonus.loss.item() == pytest.approx(without.loss.item() - 0.3 * entropies.mean(), rel=1e-12)
    (found,) = torch.autograd.grad(with_bonus.loss, tokens.entropies, retain_graph=True)
    np.testing.assert_allclose(found.numpy(), -0.3 / len(entropies), rtol=1e-12)
    assert (gradient(with_bonus, tokens) == gradient(without, tokens)).all()
    assert with_bonus.sums.keys() == without.sums.keys()
    first = torch.isin(tokens.sample_index, torch.tensor([3, 8]))
    parts = [policy_loss(part(tokens, keep), totals, replace(config, entropy_coef=0.3)) for keep in (first, ~first)]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, with_bonus.loss)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_ratio_that_overflows_does_not_break_a_correction(correction: ImportanceCorrection) -> None:
    logprobs = torch.tensor([-0.1, -1.0], requires_grad=True)
    tokens = LossTokens(logprobs, torch.tensor([-200.0, -1.0]), torch.ones(2), torch.zeros(2).long(), torch.ones(2))
    output = policy_loss(tokens, BatchTotals(tokens=2, samples=1, max_new_tokens=2), corrected(Loss.grpo, correction))
    assert np.isfinite(gradient(output, tokens)).all()


def test_clipping_is_asymmetric_and_takes_the_gradient_of_the_advantages_own_side_only() -> None:
    ratios = torch.tensor([1.27, 1.29, 0.81, 0.79, 1.29, 0.79], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    logprobs = (ratios.log() - 2.0).requires_grad_()
    before = torch.full((6,), -2.0, dtype=torch.float64)
    tokens = LossTokens(logprobs, before, advantages, torch.zeros(6).long(), torch.ones(6))

    output = grpo(tokens, BatchTotals(tokens=6, samples=1, max_new_tokens=6), CONFIG)

    assert (gradient(output, tokens) != 0).tolist() == [True, False, True, False, True, True]
    assert output.sums["clip_fraction"] == 2


def test_gspo_with_one_advantage_per_sample_is_the_sequence_form() -> None:
    tokens = random_tokens(2, per_token_advantages=False)
    totals = totals_of(tokens)
    logp, mu, adv, sample = numpy_of(tokens)

    def sequence_form(x: Array) -> float:
        loss = 0.0
        for i in set(sample.tolist()):
            ratio = np.exp(np.mean((x - mu)[sample == i]))
            loss -= clipped_term(ratio, adv[sample == i][0]) / totals.samples
        return loss

    output = gspo(tokens, totals, CONFIG)

    assert output.loss.item() == pytest.approx(sequence_form(logp), rel=1e-12)
    np.testing.assert_allclose(gradient(output, tokens), finite_differences(sequence_form, logp), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", Loss)
def test_float32_stays_float32(loss: Loss) -> None:
    tokens = random_tokens(3)
    single = LossTokens(
        tokens.logprobs.detach().float().requires_grad_(),
        tokens.inference_logprobs.float(),
        tokens.advantages.float(),
        tokens.sample_index,
        tokens.entropies.float(),
    )
    output = LOSSES[loss](single, totals_of(tokens), CONFIG)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(LOSSES[loss](tokens, totals_of(tokens), CONFIG).loss.item(), rel=1e-5)


def test_supervised_is_the_mean_negative_log_likelihood_of_the_batch() -> None:
    logprobs = -torch.rand(11, dtype=torch.float64)
    expected = -float(np.mean(logprobs.numpy()))
    assert supervised(logprobs, 11).item() == pytest.approx(expected)
    assert (supervised(logprobs[:4], 11) + supervised(logprobs[4:], 11)).item() == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20))
def test_mismatch_kl_is_never_negative_and_that_of_a_loop(pairs: list[tuple[float, float]]) -> None:
    trainer, inference = np.array(pairs, np.float64).T
    k3 = np.exp(trainer - inference) - (trainer - inference) - 1

    total, largest = mismatch_kl(torch.tensor(trainer), torch.tensor(inference))

    assert 0 <= largest <= total
    assert total == pytest.approx(k3.sum(), rel=1e-9, abs=1e-13)
    assert largest == pytest.approx(k3.max(), rel=1e-9, abs=1e-13)


def test_mismatch_kl_of_a_float32_rounding_is_not_lost_in_subtraction() -> None:
    """k3(d) ≈ d²/2 for small d. Adjacent float32 numbers at −1 differ by 1.2e-7, so k3 is 7e-15; in float32 it is 0."""
    inference = torch.tensor([-1.0])
    trainer = torch.nextafter(inference, torch.tensor([0.0]))
    step = float(trainer.double() - inference.double())

    total, largest = mismatch_kl(trainer, inference)

    assert total == largest == pytest.approx(step**2 / 2, rel=1e-6)


# ── the distance to a reference ─────────────────────────────────────────────────────────────────────────────


def distance_reference(logp: Array, ref: Array, estimator: KLEstimator, totals: BatchTotals) -> float:
    """Mean over the tokens of the estimators in Schulman, "Approximating KL Divergence", of KL(π ‖ reference)."""
    total = 0.0
    for p, q in zip(np.exp(logp), np.exp(ref), strict=True):
        r = q / p
        total += {"k1": -np.log(r), "k2": 0.5 * np.log(r) ** 2, "k3": (r - 1) - np.log(r)}[estimator.value]
    return total / totals.tokens


def assert_distance(loss: Callable[[LossTokens, BatchTotals, AlgorithmConfig], LossOutput], each: KLEstimator) -> None:
    """The loss with the term is the loss without it, plus the factor times the reference."""
    for seed in range(3):
        tokens = random_tokens(seed)
        totals, (logp, _, _, _) = totals_of(tokens), numpy_of(tokens)
        assert tokens.reference_logprobs is not None
        ref = tokens.reference_logprobs.numpy()
        config = replace(CONFIG, kl=KLConfig(loss=0.3, estimator=each))
        found, without = loss(tokens, totals, config), policy_loss(tokens, totals, CONFIG)
        wanted = 0.3 * distance_reference(logp, ref, each, totals)
        np.testing.assert_allclose((found.loss - without.loss).item(), wanted, rtol=1e-9, atol=1e-12)
        slope = finite_differences(lambda x: 0.3 * distance_reference(x, ref, each, totals), logp)  # noqa: B023
        np.testing.assert_allclose(gradient(found, tokens) - gradient(without, tokens), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", KLEstimator)
def test_the_distance_to_the_reference_is_its_formula(estimator: KLEstimator) -> None:
    assert_distance(policy_loss, estimator)


MISTAKES: dict[str, Callable[[torch.Tensor, torch.Tensor, KLEstimator], torch.Tensor]] = {
    "sign": lambda p, q, each: -reference_kl(p, q, each),
    "the other way round": lambda p, q, each: reference_kl(q, p, each),
    "a token late": lambda p, q, each: reference_kl(p, q.roll(1), each),
    "wrong divisor": lambda p, q, each: reference_kl(p, q, each) * len(p) / 5,
}


NO_MISTAKES = {("the other way round", KLEstimator.k2), ("a token late", KLEstimator.k1)}
"""A square has no direction, and a sum of differences no order."""


@pytest.mark.parametrize(
    ("mistake", "estimator"),
    [(mistake, each) for mistake in MISTAKES for each in KLEstimator if (mistake, each) not in NO_MISTAKES],
)
def test_a_mistake_in_the_distance_is_found(
    mistake: str, estimator: KLEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmrl.trainer.objective.reference_kl", MISTAKES[mistake])
    with pytest.raises(AssertionError):
        assert_distance(policy_loss, estimator)


def test_the_expected_gradient_of_each_estimator_is_what_the_config_says() -> None:
    """Exactly, over all tokens of a small vocabulary: k1 none, k2 KL(π ‖ reference), k3 KL(reference ‖ π)."""
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=6), requires_grad=True)
    reference = torch.log_softmax(torch.tensor(random.normal(size=6)), 0)

    def slope(value: torch.Tensor) -> Array:
        (found,) = torch.autograd.grad(value, logits)
        return found.numpy()

    def policy() -> torch.Tensor:
        return torch.log_softmax(logits, 0)

    def expected(estimator: KLEstimator) -> Array:
        """Σ_v π(v) ∇ k(v): tokens are sampled from π, without gradient through the sampling."""
        return slope((policy().detach().exp() * reference_kl(policy(), reference, estimator)).sum())

    forward = slope((reference.exp() * (reference - policy())).sum())
    backward = slope((policy().exp() * (policy() - reference)).sum())
    np.testing.assert_allclose(expected(KLEstimator.k1), 0.0, atol=1e-15)
    np.testing.assert_allclose(expected(KLEstimator.k2), backward, rtol=1e-12)
    np.testing.assert_allclose(expected(KLEstimator.k3), forward, rtol=1e-12)
    assert np.abs(forward - backward).max() > 0.01


def test_the_values_of_k1_and_k3_are_unbiased() -> None:
    random = np.random.default_rng(1)
    policy, reference = (torch.log_softmax(torch.tensor(random.normal(size=6)), 0) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in (KLEstimator.k1, KLEstimator.k3):
        value = float((policy.exp() * reference_kl(policy, reference, estimator)).sum())
        assert value == pytest.approx(exact, rel=1e-12)
