"""Stop a run whose rollouts all fail.

A broken image or a task that raises costs one rollout, which is recorded and counted. A run in which every rollout
fails would go on to its last step without learning anything. `FaultWatch` ends it instead: its checkpoint is saved and
its error message quotes the first rollout's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmrl.errors import EngineError, TaskError, VlmrlError
from vlmrl.types import DropReason, Group, StopReason

MAX_FAILED_STEPS = 3
"""Steps in a row without a usable rollout that end the run. Enough to survive a short outage of a service that the task
calls; few enough that the message comes while somebody is still watching."""


@dataclass
class FaultWatch:
    """Counts the steps in a row in which every rollout was a fault or had no room for its first prompt."""

    failed_steps: int = 0

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """Count `step`. Call after `mark_dropped`.

        Raises `TaskError` (`EngineError` where the engine failed) at the `MAX_FAILED_STEPS`th failed step in a row.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failed = all(rollout.dropped in (DropReason.FAULT, DropReason.EMPTY) for rollout in rollouts)
        self.failed_steps = self.failed_steps + 1 if failed else 0
        if self.failed_steps < MAX_FAILED_STEPS:
            return
        first = rollouts[0]
        kind: type[VlmrlError] = EngineError if first.stop_reason is StopReason.ENGINE_ERROR else TaskError
        cause = first.error or "the first prompt leaves no room for an answer: raise trainer.seq_len"
        raise kind(
            f"every rollout of the last {MAX_FAILED_STEPS} steps failed, so there is nothing to learn from; the "
            f"first of step {step} ended as {first.stop_reason}: {cause}"
        )
