"""Which rollouts a page shows. A run may leave millions; a page opens at once with some thousands.

    training     whole groups, evenly over all (step, group), first and last included
    evaluation   the same held-out problems at each evaluation, sampled and greedy
    dropped      for each reason a few groups of steps that had it, whole, so that it can be looked at

Nothing is read but the names of the files, metrics.jsonl and the run's config; so the choice costs nothing, however
long the run was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmrl.record.metrics import Record
from vlmrl.record.run_dir import RunDir

EVALUATION_SHARE = 0.3
"""Share of the page that evaluations may take where not everything fits."""
DROPPED_GROUPS = 6
"""Groups per drop reason."""
ORDINARY_DROPS = ("zero_advantage",)
"""Reasons that are the algorithm's own choice: their groups are among the others."""


@dataclass(frozen=True)
class Shape:
    """How many rollouts a step has, by the run's config."""

    groups_per_step: int
    group_size: int
    problems: int
    """Held-out problems of an evaluation."""

    @property
    def step(self) -> int:
        return self.groups_per_step * self.group_size


@dataclass(eq=False)
class Choice:
    """Groups to read, by file."""

    groups: dict[Path, set[int]] = field(default_factory=dict)
    """File → numbers of its groups (an evaluation's are its problems)."""
    dropped: dict[Path, set[str]] = field(default_factory=dict)
    """File → drop reasons of which its first group is wanted too."""

    def add(self, path: Path, group: int) -> None:
        self.groups.setdefault(path, set()).add(group)

    @property
    def paths(self) -> list[Path]:
        return sorted({*self.groups, *self.dropped})


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of range(count), evenly, both ends included; all of them where there are no more.

    >>> evenly(10, 4), evenly(3, 5), evenly(9, 1)
    ([0, 3, 6, 9], [0, 1, 2], [8])
    """
    if wanted >= count:
        return list(range(count))
    if wanted <= 1:
        return [count - 1][:wanted]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def recorded_steps(run_dir: RunDir, kind: str) -> list[int]:
    """Steps that have a file of rollouts; `kind` is "step" or "eval"."""
    return sorted(int(path.stem.split("_")[1]) for path in run_dir.rollouts.glob(f"{kind}_*.jsonl"))


def choose(
    run_dir: RunDir,
    shape: Shape,
    wanted: int,
    steps: Sequence[int],
    evaluations: Sequence[int],
    metrics: Iterable[Record],
) -> Choice:
    """About `wanted` rollouts of `steps` and `evaluations` (dropped ones come on top of it, a few groups)."""
    choice = Choice()
    pairs = max(int(wanted * EVALUATION_SHARE), wanted - len(steps) * shape.step) // 2  # sampled and greedy
    shown = evenly(len(evaluations), pairs)
    problems = evenly(shape.problems, pairs // len(shown)) if shown else []
    for problem in problems:
        for index in shown:
            choice.add(run_dir.rollouts_file("eval", evaluations[index]), problem)

    room = wanted - 2 * len(shown) * len(problems)
    linear = [(step, group) for step in steps for group in range(shape.groups_per_step)]
    for index in evenly(len(linear), -(-room // shape.group_size)):
        step, group = linear[index]
        choice.add(run_dir.rollouts_file("step", step), group)

    for reason, having in _steps_with_drops(metrics).items():
        here = [step for step in having if step in set(steps)]
        for index in evenly(len(here), DROPPED_GROUPS):
            choice.dropped.setdefault(run_dir.rollouts_file("step", here[index]), set()).add(reason)
    return choice


def _steps_with_drops(metrics: Iterable[Record]) -> Mapping[str, list[int]]:
    """Drop reason → steps that have such a rollout."""
    prefix = "rollouts/dropped/"
    found: dict[str, list[int]] = {}
    for record in metrics:
        for key, count in record.items():
            reason = key.removeprefix(prefix)
            if key.startswith(prefix) and count and reason not in ORDINARY_DROPS:
                found.setdefault(reason, []).append(record["step"])
    return found
