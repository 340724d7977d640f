"""Watch one metric of the evaluations: which evaluation was the best, and whether it still improves.

`trainer.keep_best` names the metric. The checkpoint of its best evaluation is kept. `trainer.patience` ends the run
after so many evaluations in a row that were no better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlmrl.trainer.loop_state import Best


def is_lower_better(metric: str) -> bool:
    """Whether a smaller value of a metric is better: of losses.

    >>> is_lower_better("eval/loss"), is_lower_better("eval/ood/pass@8")
    (True, False)
    """
    name = metric.rpartition("/")[2]
    return name == "loss" or name.endswith("_loss")


@dataclass(eq=False)
class BestWatch:
    """Remembers the best evaluation."""

    metric: str | None = None
    """`trainer.keep_best`; None watches nothing."""
    patience: int | None = None
    best: Best | None = None
    """Saved in checkpoints."""

    def restore(self, best: Best | None) -> None:
        """Take over what a checkpoint says. The best value of another metric means nothing."""
        self.best = best if best is not None and best.metric == self.metric else None

    def note(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best one; return whether it is better. Of equal ones the earlier stays. An
        evaluation without the metric does not count."""
        value = metrics.get(self.metric or "")
        if self.metric is None or value is None or not math.isfinite(value):
            return False
        sign = -1 if is_lower_better(self.metric) else 1
        if self.best is None or sign * value > sign * self.best.value:
            self.best = Best(self.metric, step, value)
            return True
        if step > self.best.step:  # an evaluation that is made again after a resume counts once
            self.best = Best(self.metric, self.best.step, self.best.value, self.best.evaluations_since + 1)
        return False

    def is_best(self, step: int) -> bool:
        """Whether the best evaluation is that of `step`."""
        return self.best is not None and self.best.step == step

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one."""
        return self.patience is not None and self.best is not None and self.best.evaluations_since >= self.patience
