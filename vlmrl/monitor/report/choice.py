"""Choose the rollouts that a page shows. A run may record millions; a page opens quickly with a few thousand.

    training     whole groups, evenly spaced over all (step, group), including the first and the last
    evaluation   the same held-out problems at each evaluation, sampled and greedy
    dropped      for each drop reason, a few whole groups that contain such a rollout

The choice needs only file names, metrics.jsonl and the config of the run, so it is fast for a run of any length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmrl.record.metrics import Record
from vlmrl.record.run_dir import RunDir

EVALUATION_SHARE = 0.3
"""Largest share of the page for evaluations, if not everything fits."""
DROPPED_GROUPS = 6
"""Extra groups per drop reason."""
ORDINARY_DROPS = ("zero_advantage",)
"""Drop reasons without extra groups: the algorithm drops these rollouts by design, and they are not rare."""


@dataclass(frozen=True)
class Shape:
    """Numbers of groups and rollouts, from the run's config."""

    groups_per_step: int
    group_size: int
    problems: int
    """Held-out problems of an evaluation."""

    @property
    def step(self) -> int:
        """Rollouts of a step."""
        return self.groups_per_step * self.group_size


@dataclass(eq=False)
class Choice:
    """The groups to read from each file."""

    groups: dict[Path, set[int]] = field(default_factory=dict)
    """File → numbers of its groups; the groups of an evaluation are its problems."""
    dropped: dict[Path, set[str]] = field(default_factory=dict)
    """File → drop reasons; for each, the first group with such a rollout is read too."""

    def add(self, path: Path, group: int) -> None:
        """Choose a group of a file."""
        self.groups.setdefault(path, set()).add(group)

    @property
    def paths(self) -> list[Path]:
        """The files to read, sorted."""
        return sorted({*self.groups, *self.dropped})


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` numbers of range(count), evenly spaced and including both ends; all numbers if there are fewer.

    >>> evenly(10, 4), evenly(3, 5), evenly(9, 1)
    ([0, 3, 6, 9], [0, 1, 2], [8])
    """
    if wanted >= count:
        return list(range(count))
    if wanted <= 1:
        return [count - 1][:wanted]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def choose(
    run_dir: RunDir,
    shape: Shape,
    wanted: int,
    steps: Sequence[int],
    evaluations: Sequence[int],
    metrics: Iterable[Record],
) -> Choice:
    """Choose about `wanted` rollouts of `steps` and `evaluations`, plus a few groups with dropped rollouts."""
    choice = Choice()
    pairs = max(int(wanted * EVALUATION_SHARE), wanted - len(steps) * shape.step) // 2  # pairs of sampled and greedy
    shown = evenly(len(evaluations), pairs)
    problems = evenly(shape.problems, pairs // len(shown)) if shown else []
    for problem in problems:
        for index in shown:
            choice.add(run_dir.recorded_rollouts("eval", evaluations[index]), problem)

    room = wanted - 2 * len(shown) * len(problems)
    for index in evenly(len(steps) * shape.groups_per_step, -(-room // shape.group_size)):
        place, group = divmod(index, shape.groups_per_step)
        choice.add(run_dir.recorded_rollouts("step", steps[place]), group)

    recorded = set(steps)
    for reason, having in _steps_with_drops(metrics).items():
        here = [step for step in having if step in recorded]
        for index in evenly(len(here), DROPPED_GROUPS):
            choice.dropped.setdefault(run_dir.recorded_rollouts("step", here[index]), set()).add(reason)
    return choice


def _steps_with_drops(metrics: Iterable[Record]) -> Mapping[str, list[int]]:
    """Drop reason → the steps that have such a rollout."""
    prefix = "rollouts/dropped/"
    found: dict[str, list[int]] = {}
    for record in metrics:
        for key, count in record.items():
            reason = key.removeprefix(prefix)
            if key.startswith(prefix) and count and reason not in ORDINARY_DROPS:
                found.setdefault(reason, []).append(record["step"])
    return found
