"""When faults are not one rollout's any more but the run's.

A broken image or a task that raises costs one rollout, which is recorded and counted. A run in which nothing else
happens would go on to its last step without learning anything, so it stops, saved, with the first error in its message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmrl.errors import EngineError, TaskError, VlmrlError
from vlmrl.types import DropReason, Group, StopReason

PATIENCE = 3
"""Steps in a row, each without one rollout that could be played: enough that a service which a task asks may be gone
for a moment, few enough that the message comes while somebody is still looking."""


@dataclass
class FaultWatch:
    """Counts the steps in a row in which every rollout was a fault or had no room for its first prompt."""

    steps: int = 0

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """After `mark_dropped`. Raises `TaskError` (`EngineError` where the engine failed) at the `PATIENCE`th step."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        unplayed = all(rollout.dropped in (DropReason.FAULT, DropReason.EMPTY) for rollout in rollouts)
        self.steps = self.steps + 1 if unplayed else 0
        if self.steps < PATIENCE:
            return
        first = rollouts[0]
        kind: type[VlmrlError] = EngineError if first.stop_reason is StopReason.ENGINE_ERROR else TaskError
        said = first.error or "the first prompt leaves no room for an answer: raise trainer.seq_len"
        raise kind(
            f"not one rollout of the last {PATIENCE} steps could be played, so there is nothing to learn from; the "
            f"first of step {step} ended as {first.stop_reason}: {said}"
        )
