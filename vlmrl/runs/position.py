"""The position of a run in its data: which problem comes next, whatever was set before a resume.

    checkpoint of step 2, cursor=8 ─▶ resumed with groups_per_step=2 ─▶ step 3 plays problems 8 and 9, step 4 10 and 11

RL steps, supervised steps and the demonstrations in RL steps each go through a sequence of problems of their own
(`vlmrl.orchestrator.stream`). A checkpoint stores the place in each from which on its weights have not learned. So a
batch that was rolled out but not learned from is rolled out again, and a batch size that changes skips and repeats
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmrl.config.run import RunConfig
from vlmrl.orchestrator.stream import Indices
from vlmrl.orchestrator.supervised import AFTER_WARMUP
from vlmrl.trainer.loop_state import Cursor, LoopState


@dataclass(frozen=True)
class Cursors:
    """The places in the sequences of a run."""

    rl: Cursor
    warmup: Cursor
    rl_demonstrations: Cursor

    @classmethod
    def of(cls, config: RunConfig, *, version: int = 0, supervised_steps: int = 0) -> Cursors:
        """The places after so many RL steps and supervised steps that all were made with `config`, of a task without
        bad rows: those of a new run, and of a checkpoint that is older than the record of places."""
        warmup = config.trainer.warmup
        return cls(
            Cursor(version * config.orchestrator.groups_per_step),
            Cursor(supervised_steps * warmup.batch_size),
            Cursor((AFTER_WARMUP + 1 + version) * warmup.rl_batch_size),
        )

    def restored(self, state: LoopState) -> Cursors:
        """The places that a checkpoint recorded. What an older version did not record stays where it is."""
        return Cursors(
            state.cursor or self.rl,
            state.warmup_cursor or self.warmup,
            state.rl_demonstrations_cursor or self.rl_demonstrations,
        )


@dataclass(eq=False)
class Position:
    """The sequences of a run, each where the run stands in it."""

    begun: Cursors
    """Where this process began."""
    rl: Indices = field(init=False)
    warmup: Indices = field(init=False)
    """Numbers of demonstrations, counted from 0."""
    rl_demonstrations: Indices = field(init=False)

    def __post_init__(self) -> None:
        self.rl = Indices(self.begun.rl)
        self.warmup = Indices(self.begun.warmup)
        self.rl_demonstrations = Indices(self.begun.rl_demonstrations)

    def after(self, version: int, supervised_steps: int) -> Cursors:
        """The places after RL step `version` and supervised step `supervised_steps`, for a checkpoint."""
        return Cursors(
            self.rl.cursor(version), self.warmup.cursor(supervised_steps), self.rl_demonstrations.cursor(version)
        )
