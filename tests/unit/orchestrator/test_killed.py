"""Refill and curriculum of asynchronous runs that are killed again and again, and resumed from their checkpoints.

Which step draws which problem depends on the timing there, so a resumed run cannot be equal bit for bit. What must hold
is that every index is learned from, thrown away, passed over or unusable exactly once, and that the curriculum knows
what was learned, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.loop_world import GROUPS, SIBLINGS, World
from vlmrl.config.algorithm import AlgorithmConfig, RefillConfig
from vlmrl.config.task import CurriculumConfig
from vlmrl.orchestrator.curriculum import Curriculum
from vlmrl.orchestrator.stream import Indices, ProblemStream
from vlmrl.record.difficulty import Attempts, Difficulty
from vlmrl.tasks.base import BadRow, NotInSplit
from vlmrl.trainer.loop_state import Cursor, LoopState
from vlmrl.types import Group

ROWS = 20
"""Of a pass. Row 3, 13 is held out, row 5, 15 is bad; of the others, one in four is solved, one hopeless."""


class Table:
    """A task with rows; its problems have the row for an id."""

    def num_rows(self, split: str) -> int:
        return ROWS

    def problem(self, split: str, index: int) -> Any:
        row = index % ROWS
        if row % 10 == 3:
            raise NotInSplit
        if row % 10 == 5:
            raise BadRow("no answer", source="a.csv", row=row)
        return SimpleNamespace(id=f"row {row}")


def reward_of(index: int, sibling: int) -> float:
    return {0: 1.0, 1: 0.0}.get(index % ROWS % 4, float(sibling % 2))


class KilledError(Exception):
    """Stands for SIGKILL: nothing is written after it."""


@dataclass
class Disk:
    """What outlives a kill: the newest checkpoint, and the record of steps."""

    path: Path
    version: int = 0
    recorded: dict[int, list[Group]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    unlearned: int = 0
    """Most ranges of indices that a checkpoint has found under way."""

    def read(self) -> LoopState:
        return LoopState.read(self.path) if self.version else LoopState(cursor=Cursor(0), difficulty=Difficulty())


@dataclass(eq=False)
class Life(World):
    """The run between two kills."""

    disk: Any = None
    stream: Any = None
    curriculum: Any = None
    every: int = 1

    def step(self, step: int, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        self.disk.recorded[step], self.disk.metrics[step] = list(groups), dict(metrics)
        super().step(step, metrics, groups)

    def checkpoint(self, step: int) -> None:
        if step % self.every == 0:
            cursor = self.stream.indices.cursor(self.version)
            LoopState(cursor=cursor, difficulty=self.curriculum.state()).write(self.disk.path)
            self.disk.version = step
            self.disk.unlearned = max(self.disk.unlearned, len(cursor.unlearned))
        super().checkpoint(step)


STEPS = 6


def lives(disk: Disk, every: int, kills: Sequence[tuple[str | None, int]], random: Any) -> None:
    """Run, kill at the first event of `kills`, resume, kill at the next one, …; None: run to the end. Each life has a
    `max_staleness` of its own, because a run that is resumed with a lower one does not draw again at once what was
    under way."""
    for kill, max_staleness in kills:
        state = disk.read()
        assert state.cursor is not None
        assert state.difficulty is not None
        curriculum = Curriculum(CurriculumConfig(solved=1.0, hopeless=0.0, rest=1), ROWS, max_staleness)
        curriculum.restore(state.difficulty)
        task: Any = Table()
        stream = ProblemStream(task, "train", Indices(state.cursor), chooser=curriculum)
        world = Life(
            version=disk.version, disk=disk, stream=stream, curriculum=curriculum, every=every, reward_of=reward_of
        )
        world.delay = lambda event: int(random.integers(0, 30))
        if kill is not None:
            world.failing[kill] = KilledError()
        try:
            algorithm = AlgorithmConfig(refill=RefillConfig(budget=4))
            world.run(steps=STEPS, algorithm=algorithm, max_staleness=max_staleness, stream=stream)
        except KilledError:
            continue


def usable(index: int) -> bool:
    return index % ROWS % 10 not in (3, 5)


def recomputed(groups: Sequence[Group]) -> dict[str, Attempts]:
    """What the record says of each problem: its last two groups, and where it was played last."""
    found: dict[str, Attempts] = {}
    for group in groups:
        solved, before = sum(rollout.reward == 1.0 for rollout in group.rollouts), found.get(group.problem_id)
        earlier = (before.solved, before.attempts) if before else (0, 0)
        found[group.problem_id] = Attempts(solved, SIBLINGS, *earlier, last=group.rollouts[0].problem_index)
    return found


EVENTS = st.tuples(st.sampled_from(["train", "learn", "publish", "step", "checkpoint"]), st.integers(1, STEPS)).map(
    lambda pair: f"{pair[0]} {pair[1]}"
)


@settings(max_examples=25, deadline=None)
@example(seed=2, every=2, kills=[("publish 4", 2), ("checkpoint 5", 2), ("train 6", 1)], last=2)
@given(
    seed=st.integers(0, 2**32),
    every=st.integers(1, 3),
    kills=st.lists(st.tuples(EVENTS, st.integers(0, 3)), max_size=4),
    last=st.integers(0, 3),
)
def test_nothing_is_lost_or_learned_twice(seed: int, every: int, kills: list[tuple[str, int]], last: int) -> None:
    with TemporaryDirectory() as folder:
        disk = Disk(Path(folder) / "loop.json")
        lives(disk, every, [*kills, (None, last)], np.random.default_rng(seed))
        assert sorted(disk.recorded) == list(range(1, STEPS + 1))
        of_steps = [disk.recorded[step] for step in range(1, STEPS + 1)]
        groups = [group for of_step in of_steps for group in of_step]
        played = [group.rollouts[0].problem_index for group in groups]
        assert len(played) == len(set(played)), "learned twice"
        assert all(map(usable, played))
        end = max(played) + 1
        passed_over = sum(disk.metrics[step]["curriculum/passed_over"] for step in range(1, STEPS + 1))
        assert len(played) + passed_over == sum(map(usable, range(end))), "lost"
        assert disk.metrics[STEPS]["data/rows_seen"] == end
        known = disk.read().difficulty
        assert known is not None
        assert known.by_id == recomputed([group for of_step in of_steps[: disk.version] for group in of_step])
        assert all(len(of_step) >= GROUPS for of_step in of_steps)


def test_a_kill_finds_steps_under_way() -> None:
    """The property above is about checkpoints that have to hand out indices again, and about problems passed over."""
    with TemporaryDirectory() as folder:
        disk = Disk(Path(folder) / "loop.json")
        lives(disk, 1, [("learn 3", 2), ("publish 5", 2), (None, 0)], np.random.default_rng(1))
        assert disk.unlearned > 0
        assert sum(metrics["curriculum/passed_over"] for metrics in disk.metrics.values()) > 0
        assert sum(metrics["refill/discarded"] for metrics in disk.metrics.values()) > 0
