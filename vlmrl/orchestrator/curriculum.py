"""Choose problems by how well the policy does on them (`task.curriculum`).

    learn(step) ─▶ pass rates by problem id ─▶ wants(problem)? ─ no ─▶ passed over, the next index is drawn
                        │      ▲
                        ▼      └── start_from: pass_rates.json of mode=eval, or a checkpoint of another run
                   checkpoint

A problem that was never played is wanted. A solved one is not; a hopeless one is not for some passes; of those outside
the band, one in `outside` is. Where that leaves nothing of a whole pass, problems are played as they come.

The choice for step s rests on the rewards of steps up to s − 1 − max_staleness, which are known whatever the timing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vlmrl.config.task import CurriculumConfig
from vlmrl.record.difficulty import Attempts, Difficulty
from vlmrl.types import DropReason, Group

ROUNDING = 1e-6
"""How far a reward may lie below `pass_at`: weighted terms that should add up to 1 may not quite."""


class Played(NamedTuple):
    """A group that counts: the arguments of `Difficulty.add`."""

    problem_id: str
    solved: int
    attempts: int
    number: int
    """Index of the problem."""


@dataclass(eq=False)
class Curriculum:
    """The `Chooser` of a run's training problems."""

    config: CurriculumConfig
    num_rows: int | None
    """Indices of one pass; with None, a hopeless problem does not rest."""
    max_staleness: int
    difficulty: Difficulty = field(default_factory=Difficulty)
    _waiting: deque[tuple[int, list[Played]]] = field(init=False, default_factory=deque)
    """Groups of steps that no choice rests on yet, by step."""
    _kinds: Counter[str] = field(init=False)
    _passed_over: Counter[int] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.restore(self.difficulty)

    def restore(self, difficulty: Difficulty) -> None:
        """Go on with what a checkpoint knows."""
        self.difficulty = difficulty
        self._kinds = Counter(map(self.kind, difficulty.by_id.values()))

    def learn(self, step: int, groups: Sequence[Group]) -> None:
        """Take over the rewards of a step."""
        self._waiting.append((step, [played for group in groups if (played := self._played(group)).attempts]))

    def _played(self, group: Group) -> Played:
        """How often the rollouts of a group pass. Faults, and rollouts without an answer or a reward, do not count."""
        counted = [
            rollout.reward >= self.config.pass_at - ROUNDING
            for rollout in group.rollouts
            if rollout.turns and not rollout.stop_reason.is_fault and rollout.dropped is not DropReason.NO_REWARD
        ]
        return Played(group.problem_id, sum(counted), len(counted), group.rollouts[0].problem_index)

    def begin(self, step: int) -> None:
        """Step `step` begins to draw: count the steps that its choice rests on."""
        while self._waiting and self._waiting[0][0] <= step - 1 - self.max_staleness:
            for played in self._waiting.popleft()[1]:
                old = self.difficulty.by_id.get(played.problem_id)
                if old is not None:
                    self._kinds[self.kind(old)] -= 1
                self._kinds[self.kind(self.difficulty.add(*played))] += 1
            for forgotten in self.difficulty.forget():
                self._kinds[self.kind(forgotten)] -= 1

    def wants(self, step: int, index: int, problem_id: str) -> bool:
        """Whether `step` plays this problem."""
        known = self.difficulty.by_id.get(problem_id)
        kind = "inside" if known is None else self.kind(known)
        if known is not None and kind == "hopeless":
            wanted = self._has_rested(known, index)
        elif kind == "outside":
            wanted = _share(index) < 1 / self.config.outside
        else:
            wanted = kind == "inside"
        self._passed_over[step] += not wanted
        return wanted

    def kind(self, known: Attempts) -> str:
        """`solved`, `hopeless`, `inside` or `outside` of the band."""
        config, rate = self.config, known.pass_rate
        if config.solved is not None and rate >= config.solved:
            return "solved"
        if config.hopeless is not None and rate <= config.hopeless:
            return "hopeless"
        return "inside" if config.low <= rate <= config.high else "outside"

    def _has_rested(self, known: Attempts, index: int) -> bool:
        rows = self.num_rows
        return rows is None or index // rows > known.last // rows + self.config.rest

    def state(self) -> Difficulty:
        """What is known after every step that was learned, for a checkpoint."""
        whole = Difficulty(dict(self.difficulty.by_id))
        for _, groups in self._waiting:
            for played in groups:
                whole.add(*played)
        whole.forget()
        return whole

    def metrics(self, step: int) -> dict[str, float]:
        """`curriculum/…` of a step; its problems were chosen by these rates."""
        for old in [old for old in self._passed_over if old < step]:
            del self._passed_over[old]
        return {
            "curriculum/passed_over": float(self._passed_over[step]),
            "curriculum/known": float(len(self.difficulty.by_id)),
            "curriculum/solved": float(self._kinds["solved"]),
            "curriculum/hopeless": float(self._kinds["hopeless"]),
        }


def _share(index: int) -> float:
    """A number in [0, 1) that depends on the index alone and is as good as random.

    >>> 900 < sum(_share(index) < 0.25 for index in range(4000)) < 1100
    True
    """
    mixed = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64) / 2**64
