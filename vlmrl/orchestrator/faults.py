"""Stop a run in which too many rollouts fail.

A broken image or a task that raises costs one rollout, which is recorded and counted. A run in which every rollout
fails would go on to its last step without learning anything, and one in which many fail learns from a part of its data
only. `FaultWatch` ends it: its checkpoint is saved, and its error message has the most frequent reason.

A rollout that was lost to our own engine (`engine_error`) is no fault of the user's, so it does not count in the rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from vlmrl.errors import EngineError, TooManyFaultsError
from vlmrl.record.faults import most_frequent
from vlmrl.types import DropReason, Group, Rollout, StopReason

WATCHED_STEPS = 3
"""Steps that a decision is based on. Enough to survive a short outage of a service that the task calls; few enough that
the message comes while somebody is still watching."""

NO_ROOM = "the first prompt leaves no room for an answer: raise trainer.seq_len"
TOO_MANY_FRAMES = (
    "the videos of the first prompt have too many frames: raise model.vlm.video.max_episode_frames, or lower "
    "model.vlm.video.fps"
)
EMPTY_BECAUSE = {StopReason.FRAMES_FULL: TOO_MANY_FRAMES}
"""Why nothing was sampled, for reasons other than `NO_ROOM`."""
NO_SCORE = (
    "every reward term abstained, as most do where a row has no answer: set task.columns.answer, or add a term that "
    "needs none, such as reward=format"
)
UNUSABLE = (DropReason.FAULT, DropReason.EMPTY, DropReason.NO_REWARD)
"""Why a rollout cannot teach anything, whatever the policy sampled."""


@dataclass
class FaultWatch:
    """Watches the rollouts of the last `WATCHED_STEPS` steps."""

    max_fault_rate: float = 1.0
    """`task.max_fault_rate`."""
    run: str = "outputs/latest"
    """The run's folder, for the command in the message."""
    watched: str = "rollout"
    """What is watched: "rollout", "demonstration" or "pair", for the message."""
    _recent: deque[list[Rollout]] = field(init=False, default_factory=lambda: deque(maxlen=WATCHED_STEPS))
    _first: int = field(init=False, default=1)
    """The first step that was counted; above 1 in a resumed run."""

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """Count `step`, from 1. Call after `mark_dropped`.

        Raises `TooManyFaultsError` (`EngineError` where the engine failed most often) if no rollout of the last
        `WATCHED_STEPS` steps could be used, or if more of them than `max_fault_rate` were faults of the user's code or
        data.
        """
        if not self._recent:
            self._first = step
        self._recent.append([rollout for group in groups for rollout in group.rollouts])
        if len(self._recent) == WATCHED_STEPS:
            self._judge()

    def finish(self) -> None:
        """Judge the last steps, also where the run had fewer than `WATCHED_STEPS`. A resumed run that took fewer does
        not know those before: it would end with an error where an undisturbed run finishes. Raises as `check`."""
        if self._recent and (self._first == 1 or len(self._recent) == WATCHED_STEPS):
            self._judge(then="start the run again")

    def check_evaluation(self, rollouts: Sequence[Rollout]) -> None:
        """Raise as `check` where none of an evaluation's rollouts could be played: its rewards say nothing then."""
        failed = [
            rollout
            for rollout in rollouts
            if rollout.stop_reason.is_fault or not rollout.turns or rollout.dropped is DropReason.NO_REWARD
        ]
        if rollouts and len(failed) == len(rollouts):
            self._raise("every rollout of the evaluation failed, so its rewards say nothing", failed, "evaluate again")

    def _judge(self, then: str = "") -> None:
        rollouts = [rollout for of_step in self._recent for rollout in of_step]
        failed = [rollout for rollout in rollouts if rollout.dropped in UNUSABLE]
        if len(failed) == len(rollouts):
            steps = f"{len(self._recent)} steps" if len(self._recent) > 1 else "step"
            text = f"every {self.watched} of the last {steps} failed, so there is nothing to learn from"
            self._raise(text, failed, then)
        of_users = [rollout for rollout in failed if _is_users_fault(rollout)]
        counted = sum(rollout.stop_reason is not StopReason.ENGINE_ERROR for rollout in rollouts)
        if counted and len(of_users) > self.max_fault_rate * counted:
            raise TooManyFaultsError(
                self._advise(
                    f"{len(of_users)} of the last {counted} {self.watched}s ({len(of_users) / counted:.0%}) were "
                    f"faults, more than task.max_fault_rate={self.max_fault_rate:g}; {_most_frequent(of_users)[1]}",
                    then,
                )
            )

    def _raise(self, text: str, failed: Sequence[Rollout], then: str) -> NoReturn:
        stop_reason, reason = _most_frequent(failed)
        if stop_reason == StopReason.ENGINE_ERROR:
            raise EngineError(f"{text}; {reason}")
        raise TooManyFaultsError(self._advise(f"{text}; {reason}", then))

    def _advise(self, text: str, then: str) -> str:
        return (
            f"{text}. List the faults with python -m vlmrl mode=faults run={self.run}, repair them, and "
            f"{then or f'continue the run with resume={self.run}'}"
        )


def _is_users_fault(rollout: Rollout) -> bool:
    return rollout.stop_reason.is_fault and rollout.stop_reason is not StopReason.ENGINE_ERROR


def _most_frequent(failed: Sequence[Rollout]) -> tuple[str, str]:
    """The stop reason that failed rollouts have most often, and a sentence about its cause."""
    stop_reason, error, count = most_frequent(
        [
            (DropReason.NO_REWARD.value, NO_SCORE)
            if rollout.dropped is DropReason.NO_REWARD
            else (rollout.stop_reason, rollout.error or EMPTY_BECAUSE.get(rollout.stop_reason, NO_ROOM))
            for rollout in failed
        ]
    )
    return stop_reason, f"most often ({count} of {len(failed)}) they ended as {stop_reason}: {error}"
