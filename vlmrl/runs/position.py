"""The position of a run in its data: which problem comes next, whatever was set before a resume.

    checkpoint of step 2, cursor=8 ─▶ resumed with groups_per_step=2 ─▶ step 3 plays problems 8 and 9, step 4 10 and 11

RL steps, supervised steps and the demonstrations in RL steps each go through a sequence of problems of their own. A
checkpoint stores the index of the first problem of each that its weights have not learned from. So a batch that was
rolled out but not learned from is rolled out again, and a batch size that changes skips and repeats nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.run import RunConfig
from vlmrl.orchestrator.supervised import AFTER_WARMUP
from vlmrl.trainer.loop_state import LoopState


@dataclass(frozen=True)
class Cursor:
    """A place in a sequence of problems.

    >>> cursor = Cursor(steps=2, index=8, per_step=2)
    >>> cursor.first_of(3), cursor.first_of(4)
    (8, 10)
    """

    steps: int
    """Steps that were made when the process started."""
    index: int
    """Index of the first problem after them."""
    per_step: int
    """Problems per step."""

    def first_of(self, step: int) -> int:
        """Index of the first problem of a step, counted from 1."""
        return self.index + (step - 1 - self.steps) * self.per_step


@dataclass(frozen=True)
class Position:
    """The cursors of a run."""

    rl: Cursor
    warmup: Cursor
    rl_demonstrations: Cursor

    @classmethod
    def of(cls, config: RunConfig, *, version: int = 0, supervised_steps: int = 0) -> Position:
        """The position after so many RL steps and supervised steps that all were made with `config`."""
        warmup = config.trainer.warmup
        groups, batch, mixed = config.orchestrator.groups_per_step, warmup.batch_size, warmup.rl_batch_size
        return cls(
            Cursor(version, version * groups, groups),
            Cursor(supervised_steps, supervised_steps * batch, batch),
            Cursor(version, (AFTER_WARMUP + 1 + version) * mixed, mixed),
        )

    def restored(self, state: LoopState, config: RunConfig) -> Position:
        """The position that a checkpoint recorded, in a run that goes on with `config`. What an older version did not
        record stays where it is."""
        warmup = config.trainer.warmup
        return Position(
            _moved(self.rl, state.cursor, config.orchestrator.groups_per_step),
            _moved(self.warmup, state.warmup_cursor, warmup.batch_size),
            _moved(self.rl_demonstrations, state.rl_demonstrations_cursor, warmup.rl_batch_size),
        )


def _moved(cursor: Cursor, index: int | None, per_step: int) -> Cursor:
    return Cursor(cursor.steps, cursor.index if index is None else index, per_step)
