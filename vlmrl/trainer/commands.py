"""The commands that rank 0's trainer sends to the learners of the other ranks.

LocalTrainer on rank 0 ── Learn(share, …) ──▶ rank r: Learn.run(follower) ─▶ follower.learner.learn(share, …)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from vlmrl.ranks.commands import Command
from vlmrl.trainer.learner import Learner, StepSettings
from vlmrl.trainer.outcome import Outcome
from vlmrl.trainer.shares import Share
from vlmrl.types import ReferenceScores, TokenMetrics


class Follower:
    """The state of a rank other than 0: the learner of the current run."""

    def __init__(self) -> None:
        self._learner: Learner | None = None

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "the first command of a run builds the learner"
        return self._learner

    def make_room(self) -> None:
        """Free what the passes of the learner may need the memory of."""

    def build(self, make: Callable[[], Learner]) -> None:
        """Replace the learner by a new one. The old one is freed first, since two models may not fit into memory."""
        self._learner = None
        self._learner = make()


@dataclass(frozen=True, eq=False)
class Learn(Command[Follower, Outcome]):
    """Take part in one optimizer step."""

    share: Share | None
    """Samples to learn from by reward; None in a supervised step."""
    demonstrations: Share | None
    step: StepSettings

    def run(self, worker: Follower) -> Outcome:
        worker.make_room()
        return worker.learner.learn(self.share, self.demonstrations, self.step)


@dataclass(frozen=True)
class Skip(Command[Follower, int]):
    """Count a step that has no samples; the answer is the peak memory in bytes."""

    supervised: bool = False

    def run(self, worker: Follower) -> int:
        return worker.learner.skip(supervised=self.supervised)


@dataclass(frozen=True, eq=False)
class ScoreTokens(Command[Follower, list[TokenMetrics]]):
    """Compute logprobs and entropies of the loss tokens of each sample of `share`."""

    share: Share

    def run(self, worker: Follower) -> list[TokenMetrics]:
        worker.make_room()
        return worker.learner.token_metrics(self.share)


@dataclass(frozen=True, eq=False)
class ScoreByReference(Command[Follower, list[ReferenceScores]]):
    """Compute the reference's scores of the loss tokens of each sample of `share`."""

    share: Share

    def run(self, worker: Follower) -> list[ReferenceScores]:
        worker.make_room()
        return worker.learner.reference_scores(self.share)


@dataclass(frozen=True)
class GiveWeights(Command[Follower, None]):
    """Take part in gathering the whole weights on rank 0."""

    def run(self, worker: Follower) -> None:
        worker.learner.give_weights()


@dataclass(frozen=True)
class Save(Command[Follower, str | None]):
    """Begin to write this rank's part of a checkpoint. The answer names a weight that is not finite ("" where only
    another rank has one), or is None; whether the writing succeeds, rank 0 learns through torch.distributed."""

    folder: str

    def run(self, worker: Follower) -> str | None:
        saved = worker.learner.save(self.folder)
        return None if isinstance(saved, Future) else saved


@dataclass(frozen=True)
class Load(Command[Follower, str | None]):
    """Load this rank's part of a checkpoint. The answer says why a rank cannot ("" where only another rank cannot), or
    is None."""

    folder: str

    def run(self, worker: Follower) -> str | None:
        return worker.learner.load(self.folder)
