"""The metrics of an RL step, from the outcomes of its optimizer steps on all ranks.

    one Outcome per rank and optimizer step ─▶ OptimizerStep ─▶ step_metrics ─▶ StepResult.metrics

Metrics of the policy (entropy, mismatch, distance to the reference) are those before the first optimizer step. Metrics
of the loss are of the first pass over the batch; with several passes, those of the last are `last_epoch/<key>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlmrl.config.algorithm import AlgorithmConfig, KLEstimator
from vlmrl.trainer.critic import value_metrics
from vlmrl.trainer.loss import BatchTotals
from vlmrl.trainer.objective import loss_metrics, mismatch_kl, reference_kl
from vlmrl.trainer.outcome import Outcome
from vlmrl.types import BoolArray, FloatArray, IntArray, TokenMetrics, TrainingSample


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """One optimizer step: made, or computed and left out because the policy had moved too far."""

    epoch: int
    """The pass over the batch, from 0."""
    samples: Sequence[TrainingSample]
    """Its minibatch."""
    totals: BatchTotals
    """Sizes of its minibatch."""
    outcomes: Sequence[Outcome]
    """By rank."""

    @property
    def is_made(self) -> bool:
        return not self.outcomes[0].moved_too_far


def step_metrics(
    samples: Sequence[TrainingSample],
    steps: Sequence[OptimizerStep],
    before: Sequence[TokenMetrics] | None,
    staleness: IntArray,
    learning_rate: float,
) -> dict[str, float]:
    """The metrics of the RL step on the batch `samples`. `before`: of each sample, under the weights before the step;
    None where the first pass is one optimizer step, whose outcomes say the same. `staleness` is int64 [loss tokens of
    the batch]."""
    first = [step for step in steps if step.epoch == 0]
    outcomes = [outcome for step in steps for outcome in step.outcomes]
    images: dict[str, float] = {}
    for outcome in outcomes:
        for key, value in outcome.images.items():
            images[key] = images.get(key, 0.0) + value
    return {
        "loss": _mean(sum(outcome.loss for outcome in step.outcomes) for step in first),
        "grad_norm": _mean(step.outcomes[0].grad_norm for step in steps if step.is_made),
        "learning_rate": learning_rate,
        "demonstration_loss": _mean(sum(outcome.demonstration_loss for outcome in step.outcomes) for step in first),
        **(_before_in_outcomes(first[0]) if before is None else _before(samples, before)),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
        "tokens/trained": float(len(staleness)),
        "tokens/packed": float(sum(outcome.rows for outcome in outcomes)),
        "tokens/unpacked": float(sum(len(sample.token_ids) for step in steps for sample in step.samples)),
        **images,
        "micro_batches": float(sum(outcome.micro_batches for outcome in outcomes)),
        "memory/peak_bytes": float(max(outcome.peak_bytes for outcome in outcomes)),
        "loss_scale": float(steps[-1].outcomes[0].loss_scale),
        **value_metrics(samples),
        **_loss_metrics(first),
    }


def after_update_metrics(
    samples: Sequence[TrainingSample], before: Sequence[TokenMetrics], version: int
) -> dict[str, float]:
    """`mismatch_kl/after_update`: over the loss tokens that the weights of `version` sampled in completions which older
    weights began. Empty where there are none. `before`: of each sample, under the weights of `version`."""
    late = [_after_update(sample, version) for sample in samples]
    if not any(mask.any() for mask in late):
        return {}
    trainer = np.concatenate([each.trainer_logprobs[mask] for each, mask in zip(before, late, strict=True)])
    inference = np.concatenate(
        [sample.inference_logprobs[sample.loss_mask][mask] for sample, mask in zip(samples, late, strict=True)]
    )
    total, _ = mismatch_kl(torch.from_numpy(trainer).double(), torch.from_numpy(inference).double())
    return {"mismatch_kl/after_update": float(total) / len(trainer)}


def _after_update(sample: TrainingSample, version: int) -> BoolArray:
    """bool [loss tokens]: True for those of `version` behind an older token of the same completion. Loss tokens that
    follow each other are of one completion."""
    places = np.flatnonzero(sample.loss_mask)
    versions = sample.versions[places]
    begins = np.diff(places, prepend=-2) > 1
    first = versions[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    later: BoolArray = (versions == version) & (first < version)
    return later


def epoch_metrics(steps: Sequence[OptimizerStep], algorithm: AlgorithmConfig) -> dict[str, float]:
    """What only a batch with several optimizer steps has. Empty where the algorithm makes one per batch."""
    if algorithm.epochs == algorithm.minibatches == 1:
        return {}
    last, made = steps[-1], sum(step.is_made for step in steps)
    in_an_epoch = max(1, sum(step.epoch == 0 for step in steps))
    kls = [outcome.policy_kl for outcome in last.outcomes if outcome.policy_kl is not None]
    of_last_epoch = _loss_metrics([step for step in steps if step.epoch == last.epoch]) if last.epoch else {}
    return {
        "optimizer_steps": float(made),
        "epochs": made / in_an_epoch,
        "policy_kl/mean": sum(kls) / last.totals.tokens,
        **{f"last_epoch/{key}": value for key, value in of_last_epoch.items()},
    }


def _mean(values: Iterable[float]) -> float:
    """0.0 where there are none."""
    found = list(values)
    return sum(found) / max(1, len(found))


def _before_in_outcomes(step: OptimizerStep) -> dict[str, float]:
    """The policy's metrics on the batch from the optimizer step that saw all of it first."""
    tokens, outcomes = step.totals.tokens, step.outcomes
    distances = [outcome.reference_kl for outcome in outcomes if outcome.reference_kl is not None]
    return {
        "entropy": sum(outcome.entropy for outcome in outcomes) / tokens,
        "mismatch_kl/mean": sum(outcome.kl_sum for outcome in outcomes) / tokens,
        "mismatch_kl/max": max(outcome.kl_max for outcome in outcomes),
        **({"reference_kl/mean": sum(distances) / tokens} if distances else {}),
    }


def _before(samples: Sequence[TrainingSample], before: Sequence[TokenMetrics]) -> dict[str, float]:
    """The same from the pass that recorded π_old."""

    def joined(arrays: Iterable[FloatArray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).double()

    policy = joined(each.trainer_logprobs for each in before)
    total, largest = mismatch_kl(policy, joined(each.inference_logprobs[each.loss_mask] for each in samples))
    referred = [each.reference_logprobs[each.loss_mask] for each in samples if each.reference_logprobs is not None]
    found = {
        "entropy": float(joined(each.entropies for each in before).mean()),
        "mismatch_kl/mean": float(total) / len(policy),
        "mismatch_kl/max": float(largest),
    }
    if len(referred) == len(samples):
        distance = reference_kl(policy, joined(referred), KLEstimator.k3).clamp_min(0.0)
        found["reference_kl/mean"] = float(distance.mean())
    return found


def _loss_metrics(steps: Sequence[OptimizerStep]) -> dict[str, float]:
    """The metrics of `LossOutput`, over the loss tokens of these optimizer steps."""
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for outcome in (outcome for step in steps for outcome in step.outcomes):
        for key, value in outcome.sums.items():
            sums[key] = sums.get(key, 0.0) + value
        for key, value in outcome.maxima.items():
            maxima[key] = max(maxima.get(key, value), value)
    return loss_metrics(sums, maxima, sum(step.totals.tokens for step in steps))
