"""The trainer as the run knows it: divides a batch over the ranks, and adds up what they found.

    samples ─▶ divide ─▶ a share for each rank ─▶ Learner.learn, on all of them at once ─▶ one StepResult

One process or many: what is learned does not depend on it, since losses are normalized by figures of the whole batch
and gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from torch import Tensor

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.models.policy import Policy
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup
from vlmrl.trainer.commands import Follower, GiveWeights, Learn, Load, Logprobs, Save, Skip
from vlmrl.trainer.learner import Learner, Outcome, Step
from vlmrl.trainer.loss import BatchTotals, loss_metrics
from vlmrl.trainer.optimizer import learning_rate
from vlmrl.trainer.shares import Share, divide, without_pictures
from vlmrl.types import FloatArray, StepResult, TokenMetrics, TrainingSample

AnswerT = TypeVar("AnswerT")
OwnT = TypeVar("OwnT")

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
"""Figures of a step that had nothing to learn from, 0.0 all of them; beside them there is `memory/peak_bytes`."""

NAMES = 8
"""Of samples, in an error's message."""


class LocalTrainer:
    """See `vlmrl.types.Trainer`. Its methods are called one at a time."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        max_new_tokens: int,
        rank_group: RankGroup | None = None,
    ) -> None:
        """The other ranks of `rank_group` must build their learners at the same time (`Follower.build`)."""
        self._rank_group = rank_group
        self._config = config
        self._ranks = 1 if rank_group is None else rank_group.size
        self._learner = Learner(
            policy, config, algorithm, temperature=temperature, max_new_tokens=max_new_tokens, ranks=self._ranks
        )

    @property
    def version(self) -> int:
        """RL steps contained in the weights; supervised steps do not count."""
        return self._learner.version

    @property
    def supervised_steps(self) -> int:
        """Supervised steps contained in the weights."""
        return self._learner.supervised_steps

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by their names in a checkpoint, each once: a head that is the embedding is not a second
        one. They are the ones that are computed with, not copies, where this process holds all of them; of a sharded
        model they are gathered, one after the other."""
        whole, _ = self._together([GiveWeights()] * (self._ranks - 1), self._learner.whole_weights)
        return whole

    def train_step(self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = ()) -> StepResult:
        """One RL step on `samples`, with `demonstrations` at their weight.

        Raises `NonFiniteLossError` before the weights are touched. Without samples (every rollout was dropped) the
        weights stay as they are and the step still counts.
        """
        if not samples:
            peak, peaks = self._together([Skip()] * (self._ranks - 1), self._learner.skip)
            peak = max([peak, *peaks])
            return StepResult(self.version, dict.fromkeys(EMPTY_STEP, 0.0) | {"memory/peak_bytes": float(peak)})
        before = self.version
        rate = learning_rate(self._config, before)
        masks = [sample.loss_mask for sample in samples]
        totals = BatchTotals(
            tokens=int(sum(mask.sum() for mask in masks)),
            samples=len(samples),
            max_new_tokens=self._learner.max_new_tokens,
        )
        step = Step(
            totals=totals,
            demonstrated_tokens=int(sum(sample.loss_mask.sum() for sample in demonstrations)),
            demonstration_weight=self._config.warmup.rl_weight * rate / self._config.learning_rate,
            learning_rate=rate,
        )
        shares = self._divide(samples)
        outcomes = self._learn(shares, self._divide(demonstrations), step, samples)
        tokens: list[TokenMetrics | None] = [None] * len(samples)
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        images: dict[str, float] = {}
        for share, outcome in zip(shares, outcomes, strict=True):
            for place, figures in zip(share.index, outcome.tokens, strict=True):
                tokens[place] = figures
            for key, value in outcome.sums.items():
                sums[key] = sums.get(key, 0.0) + value
            for key, value in outcome.maxima.items():
                maxima[key] = max(maxima.get(key, value), value)
            for key, value in outcome.images.items():
                images[key] = images.get(key, 0.0) + value
        staleness = before - np.concatenate([s.versions[mask] for s, mask in zip(samples, masks, strict=True)])
        return StepResult(
            version=self.version,
            metrics={
                "loss": sum(outcome.loss for outcome in outcomes),
                "grad_norm": outcomes[0].grad_norm,
                "learning_rate": rate,
                "demonstration_loss": sum(outcome.demonstration_loss for outcome in outcomes),
                "entropy": sum(outcome.entropy for outcome in outcomes) / totals.tokens,
                "mismatch_kl/mean": sum(outcome.kl_sum for outcome in outcomes) / totals.tokens,
                "mismatch_kl/max": max(outcome.kl_max for outcome in outcomes),
                "staleness/mean": float(staleness.mean()),
                "staleness/max": float(staleness.max()),
                "tokens/trained": float(totals.tokens),
                "tokens/packed": float(sum(outcome.rows for outcome in outcomes)),
                "tokens/unpacked": float(sum(len(sample.token_ids) for sample in samples)),
                **images,
                "micro_batches": float(sum(outcome.micro_batches for outcome in outcomes)),
                "memory/peak_bytes": float(max(outcome.peak_bytes for outcome in outcomes)),
                "loss_scale": float(outcomes[0].loss_scale),
                **loss_metrics(sums, maxima, totals.tokens),
            },
            tokens=[figures for figures in tokens if figures is not None],
        )

    def supervised_step(self, samples: list[TrainingSample], lr: float) -> dict[str, float]:
        """One step of next-token likelihood on the samples' loss tokens. Does not count as a policy version."""
        step = Step(
            totals=None,
            demonstrated_tokens=int(sum(sample.loss_mask.sum() for sample in samples)),
            demonstration_weight=1.0,
            learning_rate=lr,
        )
        outcomes = self._learn([], self._divide(samples), step, samples)
        loss = sum(outcome.demonstration_loss for outcome in outcomes)
        return {"loss": loss, "grad_norm": outcomes[0].grad_norm, "learning_rate": lr}

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """See `vlmrl.types.Trainer.logprobs`."""
        shares = self._divide(samples)
        found = [np.empty(0, np.float32)] * len(samples)
        if shares:
            own, others = self._together(
                [Logprobs(without_pictures(share)) for share in shares[1:]], lambda: self._learner.logprobs(shares[0])
            )
            for share, logprobs in zip(shares, [own, *others], strict=True):
                for place, each in zip(share.index, logprobs, strict=True):
                    found[place] = each
        return found

    def save(self, folder: str) -> Future[None]:
        """See `vlmrl.types.Trainer.save`."""
        own, others = self._together([Save(folder)] * (self._ranks - 1), lambda: self._learner.save(folder))
        if isinstance(own, Future):
            return own
        name = next(name for name in [own, *others] if name)
        raise NonFiniteLossError(
            f"{name} holds values that are not finite, so this policy is not saved: continue from the "
            "checkpoint before it, with a lower trainer.learning_rate"
        )

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`."""
        self._together([Load(folder)] * (self._ranks - 1), lambda: self._learner.load(folder))

    # ── all ranks ───────────────────────────────────────────────────────────────────────────────────────────

    def _divide(self, samples: Sequence[TrainingSample]) -> list[Share]:
        """A share for each rank; none where there are no samples."""
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
        self, shares: list[Share], demonstrations: list[Share], step: Step, samples: Sequence[TrainingSample]
    ) -> list[Outcome]:
        """Raises `NonFiniteLossError`."""
        nothing: list[Share | None] = [None] * self._ranks
        (share, demonstrated), *others = zip(shares or nothing, demonstrations or nothing, strict=True)
        own, answers = self._together(
            [Learn(_sent(share), _sent(demonstrated), step) for share, demonstrated in others],
            lambda: self._learner.learn(share, demonstrated, step),
        )
        outcomes = [own, *answers]
        broken = next((outcome.broken_loss for outcome in outcomes if outcome.broken_loss is not None), None)
        if broken is not None:
            exact = any(outcome.names_are_exact for outcome in outcomes)
            named = [name for outcome in outcomes if outcome.names_are_exact is exact for name in outcome.broken]
            raise NonFiniteLossError(
                f"loss is {broken} at version {self.version}: nothing was changed; "
                f"samples {'with a logprob or advantage that is not finite' if exact else 'of the micro-batch'}: "
                f"{_listed(named)}"
            )
        if not outcomes[0].stepped:
            raise NonFiniteLossError(
                f"gradient norm is {outcomes[0].grad_norm} at version {self.version}: nothing was changed; samples of "
                f"the batch: {_listed([sample.rollout_id for sample in samples])}"
            )
        return outcomes

    def _together(
        self, commands: Sequence[Command[Follower, AnswerT]], own: Callable[[], OwnT]
    ) -> tuple[OwnT, list[AnswerT]]:
        """Run `commands` on the other ranks, one on each, and `own` here → its result, and the answers by rank."""
        return (own(), []) if self._rank_group is None else self._rank_group.together(commands, own)


def _sent(share: Share | None) -> Share | None:
    return None if share is None else without_pictures(share)


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["0/0", "0/1"])
    '0/0, 0/1'
    """
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
