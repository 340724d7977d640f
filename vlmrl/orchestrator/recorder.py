"""The interface through which the loop reports metrics and rollouts.

`monitor.Monitor` implements it. The loop itself writes no files and prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vlmrl.record.bad_rows import BadRowRecord
from vlmrl.record.faults import FaultRecord
from vlmrl.record.splits import RecordedSplit
from vlmrl.types import Group, Rollout


class Recorder(Protocol):
    """Receives the metrics and rollouts of a run. Called from one thread; rollouts must not change after the call."""

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Record one optimizer step (1, 2, …): its metrics under their keys in metrics.jsonl, its rollouts and their
        faults."""
        ...

    @property
    def ends_blind(self) -> bool:
        """Whether the run ends because its reward rises although the policy ignores its images
        (`monitor.blind_guard=stop`), by the steps that are recorded."""
        ...

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Record only the rollouts of a step that failed, so that an error message can refer to them."""
        ...

    def evaluation(
        self, step: int, metrics: Mapping[str, float], rollouts: Mapping[RecordedSplit, Sequence[Rollout]]
    ) -> None:
        """Record an evaluation of the weights after `step`: `eval/…` metrics, and rollouts by the split under which
        they are recorded (`eval_sampled`, `eval_<set>_greedy`, …) with their faults."""
        ...

    def faults(self, faults: Sequence[FaultRecord]) -> None:
        """Record what went wrong with demonstrations. A supervised step that is repeated after a resume records its
        faults again; those of the first time are gone by then."""
        ...

    def bad_rows(self, rows: Sequence[BadRowRecord]) -> None:
        """Record rows of the data that cannot be used. Each row is given once."""
        ...
