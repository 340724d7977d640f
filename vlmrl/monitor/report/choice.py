"""Choose the rollouts that a page shows. A run may record millions; a page opens quickly with a few thousand.

    training     whole groups, evenly spaced over all (step, group), including the first and the last
    evaluation   the same held-out problems at each evaluation, sampled and greedy, of the named sets too
    dropped      for each drop reason, a few whole groups that contain such a rollout

The choice needs only file names, metrics.jsonl and the config of the run, so it is fast for a run of any length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmrl.config.run import Mode
from vlmrl.record.metrics import EVAL_SAMPLED, Record
from vlmrl.record.run_dir import RunDir

EVALUATION_SHARE = 0.3
"""Largest share of the page for evaluations, if not everything fits."""
DROPPED_GROUPS = 6
"""Extra groups per drop reason."""
ORDINARY_DROPS = ("zero_advantage",)
"""Drop reasons without extra groups: the algorithm drops these rollouts by design, and they are not rare."""

SET_SIZE = re.compile(r"orchestrator\.eval\.sets\.(.+)\.problems")
"""A config key that every named evaluation set has."""


@dataclass(frozen=True)
class Shape:
    """Numbers of groups and rollouts, from the run's config."""

    groups_per_step: int
    group_size: int
    problems: int
    """Held-out problems of the largest evaluation set."""
    answers: int = 2
    """Rollouts of one evaluation with the same problem number: a sampled and a greedy one of the main evaluation, and
    those of the named sets."""

    @property
    def step(self) -> int:
        """Rollouts of a step."""
        return self.groups_per_step * self.group_size

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        """The numbers of a run's config, which has dotted keys. Raises KeyError where they are none."""
        groups = config["orchestrator.groups_per_step"], config["orchestrator.group_size"]
        if config.get("mode") == Mode.play.name:  # each step is one episode
            groups = 1, 1
        sizes = evaluation_sizes(config)
        numbers = [*groups, *(number for size in sizes.values() for number in size)]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or 0 in groups:
            raise KeyError(f"groups_per_step, group_size and the sizes of evaluations are {numbers}")
        return Shape(
            *groups,
            problems=max(problems for problems, _ in sizes.values()),
            answers=max(1, sum(answers for problems, answers in sizes.values() if problems)),
        )


def evaluation_sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Problems, and answers to each, of every evaluation set in a config with dotted keys; "" is the main evaluation.

    >>> evaluation_sizes({"orchestrator.eval.problems": 128})
    {'': (128, 2)}
    """
    sizes = {"": (config["orchestrator.eval.problems"], 2)}
    for name in (found[1] for found in map(SET_SIZE.fullmatch, config) if found):
        problems, samples, greedy = (
            config[f"orchestrator.eval.sets.{name}.{key}"] for key in ("problems", "samples", "greedy")
        )
        sizes[name] = (problems, samples + greedy)
    return sizes


def evaluation_rollouts(record: Record, sizes: Mapping[str, tuple[int, int]]) -> int:
    """Rollouts of an evaluation whose metrics are `record`: each set may have steps of its own, and may have fewer
    problems than its config wants. Without metrics, all sets as the config has them.

    >>> evaluation_rollouts({"eval/ood/problems": 20.0}, {"": (128, 2), "ood": (64, 9)})
    180
    """
    played = 0
    for name, (problems, answers) in sizes.items():
        value = record.get(f"eval/{name}/problems" if name else EVAL_SAMPLED)
        if value is not None:
            played += (int(value) if name else problems) * answers
    return played or sum(problems * answers for problems, answers in sizes.values())


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
    asked = max(int(wanted * EVALUATION_SHARE), wanted - len(steps) * shape.step) // shape.answers
    shown = evenly(len(evaluations), asked)
    problems = evenly(shape.problems, asked // len(shown)) if shown else []
    for problem in problems:
        for index in shown:
            choice.add(run_dir.recorded_rollouts("eval", evaluations[index]), problem)

    room = wanted - shape.answers * len(shown) * len(problems)
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
