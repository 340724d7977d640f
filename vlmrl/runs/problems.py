"""How a run draws the problems of a task: with its renderer, its limits, and its record of bad rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vlmrl.config.run import RunConfig
from vlmrl.config.task import TaskConfig
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.bad_rows import BadRowWatch
from vlmrl.orchestrator.fit import PromptCheck
from vlmrl.orchestrator.stream import Chooser, Indices, ProblemStream
from vlmrl.record.step_log import Phase
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.border import get_num_rows


@dataclass(frozen=True)
class ProblemSource:
    """The problems of one task of a run."""

    config: RunConfig
    task: Task
    renderer: Renderer
    monitor: Monitor
    bad_rows: BadRowWatch

    @classmethod
    def of(
        cls, config: RunConfig, task_config: TaskConfig, task: Task, renderer: Renderer, monitor: Monitor
    ) -> ProblemSource:
        """The problems of `task`, whose settings are `task_config`."""
        policy, rate = task_config.bad_rows, task_config.max_bad_row_rate
        return cls(config, task, renderer, monitor, BadRowWatch(policy, rate, config.output_dir, monitor.bad_rows))

    def stream(
        self,
        phase: Phase,
        split: Split,
        *,
        indices: Indices | None = None,
        once: bool = False,
        chooser: Chooser | None = None,
    ) -> ProblemStream:
        """A sequence of problems, whose bad rows are recorded under `phase`."""
        check = PromptCheck(
            self.task,
            self.renderer,
            max_model_len(self.config),
            limit_of(self.config),
            has_rows=get_num_rows(self.task, split) is not None,
        )
        return ProblemStream(
            self.task,
            split,
            indices or Indices(),
            once=once,
            check=check,
            absent=partial(self.bad_rows.absent, phase, split),
            used=self.bad_rows.used,
            chooser=chooser,
            status=self.monitor.status,
        )


def max_model_len(config: RunConfig) -> int:
    """Most tokens of prompt plus completion: a server may hold more than a sample may have."""
    return min(config.inference.max_model_len, config.trainer.seq_len)


def limit_of(config: RunConfig) -> str:
    """The setting that `max_model_len` comes from."""
    if config.trainer.seq_len <= config.inference.max_model_len:
        return f"trainer.seq_len={config.trainer.seq_len}"
    return f"inference.max_model_len={config.inference.max_model_len}"
