"""The trainer of a run: divides a batch over the ranks and combines what they return.

    samples ─▶ divide ─▶ one Share per rank ─▶ Learner.learn on all ranks at once ─▶ one Outcome per rank ─▶ StepResult

A batch has one optimizer step or several (epochs.py), each of a part of it that is divided like this. The number of
ranks does not change what is learned, since losses are normalized by the sizes of the whole batch and
gradients are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import CheckpointError, NonFiniteLossError
from vlmrl.models.compiling import functions_given_up
from vlmrl.models.policy import Policy
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup
from vlmrl.trainer.commands import Follower, GiveWeights, Learn, Load, Save, ScoreByReference, ScoreTokens, Skip
from vlmrl.trainer.epochs import optimizer_steps
from vlmrl.trainer.learner import Learner, StepSettings
from vlmrl.trainer.loss import BatchTotals
from vlmrl.trainer.optimizer import learning_rate
from vlmrl.trainer.outcome import Outcome
from vlmrl.trainer.reference import Reference
from vlmrl.trainer.shares import Share, divide, without_pictures
from vlmrl.trainer.step_metrics import OptimizerStep, after_update_metrics, epoch_metrics, step_metrics
from vlmrl.types import FloatArray, ReferenceScores, StepResult, TokenMetrics, TrainingSample

AnswerT = TypeVar("AnswerT")
OwnT = TypeVar("OwnT")
T = TypeVar("T")

EMPTY_STEP = (
    "loss",
    "grad_norm",
    "entropy",
    "mismatch_kl/mean",
    "mismatch_kl/max",
    "staleness/mean",
    "staleness/max",
    "tokens/trained",
    "tokens/packed",
)
"""Metrics of a step that had no samples; all are 0.0. Such a step also has `memory/peak_bytes`."""

MOST_NAMES_IN_ERROR = 8
"""How many samples an error message names."""


class LocalTrainer:
    """Implements `vlmrl.types.Trainer`. Its methods are called one at a time, on rank 0."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        max_new_tokens: int,
        rank_group: RankGroup | None = None,
        reference: Reference | None = None,
        seed: int = 0,
    ) -> None:
        """The other ranks of `rank_group` must build their learners at the same time (`Follower.build`). `seed`: of the
        order in which the optimizer steps on a batch take its samples."""
        self.is_between_steps = True
        """False while the optimizer steps on a batch are made, and after one of them failed that had changed
        weights or followed one that had: such weights must not be saved."""
        self._given_up_before = functions_given_up()  # by others of this process
        self._seed = seed
        self._algorithm = algorithm
        self._rank_group = rank_group
        self._config = config
        self._ranks = 1 if rank_group is None else rank_group.size
        self._learner = Learner(
            policy,
            config,
            algorithm,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            ranks=self._ranks,
            reference=reference,
        )

    @property
    def version(self) -> int:
        """RL steps contained in the weights; supervised steps do not count."""
        return self._learner.version

    @property
    def ranks(self) -> int:
        """How many ranks train together."""
        return self._ranks

    @property
    def supervised_steps(self) -> int:
        """Supervised steps contained in the weights."""
        return self._learner.supervised_steps

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by their names in a checkpoint. A head that is tied to the embedding is listed once.

        They are the tensors that the forward pass computes with, not copies, where this process holds all of them; the
        tensors of a sharded model are gathered one after the other.
        """
        whole, _ = self._together([GiveWeights()] * (self._ranks - 1), self._learner.whole_weights)
        return whole

    def train_step(
        self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        """One RL step on `samples`, with the loss of `demonstrations` added at its weight. The learning rate decays
        over `steps`, by default `trainer.max_steps`.

        Raises `NonFiniteLossError` before the optimizer step that is not finite touches the weights; where others were
        made on the batch before it, `is_between_steps` stays False. Without samples (every rollout was dropped) the
        weights stay as they are and the step still counts.
        """
        if not samples:
            own, others = self._together([Skip()] * (self._ranks - 1), self._learner.skip)
            peak = float(max([own, *others]))
            return StepResult(self.version, dict.fromkeys(EMPTY_STEP, 0.0) | {"memory/peak_bytes": peak})
        rate, version = learning_rate(self._config, self.version, steps), self.version
        staleness = version - np.concatenate([sample.versions[sample.loss_mask] for sample in samples])
        parts = optimizer_steps(samples, len(demonstrations), self._algorithm, seed=self._seed, version=version)
        # Where the first optimizer step has the whole batch, its own forward pass records π_old.
        found = [each.before for each in samples if each.before is not None]
        recorded = found if len(found) == len(samples) else None
        if recorded is None and len(parts[0].samples) < len(samples):
            recorded = self.token_metrics(samples)
        before, made = recorded, list[OptimizerStep]()
        for part in parts:
            chosen = [samples[i] for i in part.samples]
            if before is not None:
                chosen = [replace(samples[i], before=before[i]) for i in part.samples]
            demonstrated = [demonstrations[i] for i in part.demonstrations]
            totals = BatchTotals(_loss_tokens(chosen), len(chosen), self._learner.max_new_tokens)
            step = StepSettings(
                totals=totals,
                demonstrated_tokens=_loss_tokens(demonstrated),
                demonstration_weight=self._config.warmup.rl_weight * rate / self._config.learning_rate,
                learning_rate=rate,
                largest_kl=self._algorithm.target_kl if made else None,
                ends_batch=part.is_last,
                learns_values=all(sample.returns is not None for sample in chosen),
            )
            shares = self._divide(chosen)
            outcomes = self._learn(shares, self._divide(demonstrated), step, chosen, earlier=len(made))
            made.append(OptimizerStep(part.epoch, chosen, totals, outcomes))
            before = before or _in_batch_order(shares, [outcome.tokens for outcome in outcomes])
            if not made[-1].is_made:
                break
        metrics = step_metrics(samples, made, recorded, staleness, rate) | epoch_metrics(made, self._algorithm)
        metrics |= after_update_metrics(samples, before or (), version)
        if given_up := functions_given_up() - self._given_up_before:
            metrics["compile/given_up"] = float(given_up)
        return StepResult(self.version, metrics, before or ())

    def supervised_step(self, samples: list[TrainingSample], lr: float) -> dict[str, float]:
        """One step on the mean negative log-likelihood of the samples' loss tokens → `loss` (nats per token),
        `grad_norm`, `learning_rate`, and sizes of the packed samples. It does not count as a policy version. Without
        samples (every demonstration was left out) the weights stay as they are and the step still counts. Raises
        `NonFiniteLossError`."""
        if not samples:
            self._together([Skip(supervised=True)] * (self._ranks - 1), lambda: self._learner.skip(supervised=True))
            return {"loss": 0.0, "grad_norm": 0.0, "learning_rate": lr}
        step = StepSettings(
            totals=None,
            demonstrated_tokens=_loss_tokens(samples),
            demonstration_weight=1.0,
            learning_rate=lr,
        )
        outcomes = self._learn([], self._divide(samples), step, samples)
        loss = sum(outcome.demonstration_loss for outcome in outcomes)
        return {
            "loss": loss,
            "grad_norm": outcomes[0].grad_norm,
            "learning_rate": lr,
            "tokens/trained": float(step.demonstrated_tokens),
            "tokens/packed": float(sum(outcome.demonstration_rows for outcome in outcomes)),
            "tokens/unpacked": float(sum(len(sample.token_ids) for sample in samples)),
            "micro_batches": float(sum(outcome.demonstration_passes for outcome in outcomes)),
        }

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """See `vlmrl.types.Trainer.logprobs`."""
        return [tokens.trainer_logprobs for tokens in self.token_metrics(samples)]

    def token_metrics(self, samples: Sequence[TrainingSample]) -> list[TokenMetrics]:
        """See `vlmrl.types.Trainer.token_metrics`."""
        if not samples:
            return []
        shares = self._divide(samples)
        own, others = self._together(
            [ScoreTokens(without_pictures(share)) for share in shares[1:]],
            lambda: self._learner.token_metrics(shares[0]),
        )
        return _in_batch_order(shares, [own, *others])

    def reference_scores(self, samples: Sequence[TrainingSample]) -> list[ReferenceScores]:
        """See `vlmrl.types.Trainer.reference_scores`."""
        if not samples:
            return []
        shares = self._divide(samples)
        own, others = self._together(
            [ScoreByReference(without_pictures(share)) for share in shares[1:]],
            lambda: self._learner.reference_scores(shares[0]),
        )
        return _in_batch_order(shares, [own, *others])

    def save(self, folder: str) -> Future[None]:
        """See `vlmrl.types.Trainer.save`."""
        own, others = self._together([Save(folder)] * (self._ranks - 1), lambda: self._learner.save(folder))
        if isinstance(own, Future):
            return own
        name = next(name for name in [own, *others] if name)
        raise NonFiniteLossError(
            f"{name} holds values that are not finite, so this policy is not saved: continue from the previous "
            "checkpoint with a lower trainer.learning_rate."
        )

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`."""
        own, others = self._together([Load(folder)] * (self._ranks - 1), lambda: self._learner.load(folder))
        if own is not None:
            raise CheckpointError(next(reason for reason in [own, *others] if reason))

    # ── all ranks ───────────────────────────────────────────────────────────────────────────────────────────

    def _divide(self, samples: Sequence[TrainingSample]) -> list[Share]:
        """One share per rank; an empty list where there are no samples."""
        if not samples:
            return []
        return divide(
            samples,
            self._config.packing,
            self._config.micro_batch_tokens,
            ranks=self._ranks,
            tower_waits=self._ranks > 1 and self._learner.policy.tower_learns,
        )

    def _learn(
        self,
        shares: list[Share],
        demonstrations: list[Share],
        step: StepSettings,
        samples: Sequence[TrainingSample],
        earlier: int = 0,
    ) -> list[Outcome]:
        """Make one optimizer step on all ranks, after `earlier` ones on the same batch → their outcomes by rank. Raises
        `NonFiniteLossError`."""
        nothing: list[Share | None] = [None] * self._ranks
        (share, demonstrated), *others = zip(shares or nothing, demonstrations or nothing, strict=True)
        self.is_between_steps = False
        own, answers = self._together(
            [Learn(_to_send(share), _to_send(demonstrated), step) for share, demonstrated in others],
            lambda: self._learner.learn(share, demonstrated, step),
        )
        if own.stepped or own.moved_too_far:
            self.is_between_steps = step.ends_batch or own.moved_too_far
            return [own, *answers]
        self.is_between_steps = not earlier  # no rank has changed its weights in this optimizer step
        raise _not_finite([own, *answers], samples, self.version, earlier)

    def sample(self, commands: Sequence[Command[Any, AnswerT]], own: Callable[[], OwnT]) -> tuple[OwnT, list[AnswerT]]:
        """Run `commands`, which sample with `Learner.sample`, on the other ranks, and `own` here with whole weights →
        its result, and the answers by rank."""
        return self._together(commands, lambda: self._learner.sample(own))

    def _together(
        self, commands: Sequence[Command[Follower, AnswerT]], own: Callable[[], OwnT]
    ) -> tuple[OwnT, list[AnswerT]]:
        """Run `commands` on the other ranks, one on each, and `own` here → its result, and the answers by rank."""
        return (own(), []) if self._rank_group is None else self._rank_group.together(commands, own)


def _not_finite(
    outcomes: Sequence[Outcome], samples: Sequence[TrainingSample], version: int, earlier: int
) -> NonFiniteLossError:
    """The error of an optimizer step that no rank has made, after `earlier` ones on its batch."""
    place = f"at version {version}" + (f", in optimizer step {earlier + 1} of its batch" if earlier else "")
    consequence = "so the weights were not changed"
    if earlier:
        consequence = "so the weights contain a part of the batch and are not saved"
    broken = next((outcome.broken_loss for outcome in outcomes if outcome.broken_loss is not None), None)
    if broken is None:
        return NonFiniteLossError(
            f"The gradient norm is {outcomes[0].grad_norm} {place}, {consequence}. Samples of the batch: "
            f"{_listed([sample.rollout_id for sample in samples])}"
        )
    exact = any(outcome.names_are_exact for outcome in outcomes)
    named = [name for outcome in outcomes if outcome.names_are_exact is exact for name in outcome.broken]
    return NonFiniteLossError(
        f"The loss is {broken} {place}, {consequence}. Samples "
        f"{'with a logprob or advantage that is not finite' if exact else 'of the micro-batch'}: {_listed(named)}"
    )


def _to_send(share: Share | None) -> Share | None:
    return None if share is None else without_pictures(share)


def _loss_tokens(samples: Sequence[TrainingSample]) -> int:
    return int(sum(sample.loss_mask.sum() for sample in samples))


def _in_batch_order(shares: Sequence[Share], by_rank: Sequence[Sequence[T]]) -> list[T]:
    """Sort one result per sample of each share back into the order of the batch."""
    found = {
        index: result
        for share, results in zip(shares, by_rank, strict=True)
        for index, result in zip(share.index, results, strict=True)
    }
    return [found[index] for index in range(len(found))]


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["0/0", "0/1"])
    '0/0, 0/1'
    """
    more = len(names) - MOST_NAMES_IN_ERROR
    return ", ".join(names[:MOST_NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")
