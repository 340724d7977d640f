"""How a run draws the problems of a task: with its renderer, its limits, and its record of bad rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vlmrl.config.model import most_frames
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.task import TaskConfig
from vlmrl.errors import ConfigError
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.bad_rows import BadRowWatch
from vlmrl.orchestrator.curriculum import Curriculum
from vlmrl.orchestrator.envs.base import Envs
from vlmrl.orchestrator.fit import PromptCheck
from vlmrl.orchestrator.stream import Chooser, Indices, ProblemStream
from vlmrl.record.difficulty import DIFFICULTY, Attempts, Difficulty
from vlmrl.record.pass_rates import PASS_RATES, read_pass_rates
from vlmrl.record.step_log import Phase
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Split
from vlmrl.tasks.border import get_num_rows


@dataclass(frozen=True)
class ProblemSource:
    """The problems of one task of a run."""

    config: RunConfig
    envs: Envs
    renderer: Renderer
    monitor: Monitor
    bad_rows: BadRowWatch

    @classmethod
    def of(
        cls, config: RunConfig, task_config: TaskConfig, envs: Envs, renderer: Renderer, monitor: Monitor
    ) -> ProblemSource:
        """The problems of a task, whose settings are `task_config`."""
        policy, rate = task_config.bad_rows, task_config.max_bad_row_rate
        return cls(config, envs, renderer, monitor, BadRowWatch(policy, rate, config.output_dir, monitor.bad_rows))

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
        task = self.envs.task
        check = PromptCheck(
            self.envs,
            self.renderer,
            max_model_len(self.config),
            limit_of(self.config),
            has_rows=get_num_rows(task, split) is not None,
            max_frames=most_frames(self.config.model),
        )
        return ProblemStream(
            task,
            split,
            indices or Indices(),
            once=once,
            check=check,
            phase=phase,
            bad_rows=self.bad_rows,
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


def steps_of(config: RunConfig, num_rows: int | None) -> int:
    """The most steps of a run: `trainer.max_steps`, or those of `trainer.max_epochs` passes over so many rows. With
    mode=sft, supervised steps.

    Raises ConfigError where the task has no number of rows.
    """
    supervised, epochs = config.mode is Mode.sft, config.trainer.max_epochs
    if epochs is None:
        return config.trainer.warmup.steps if supervised else config.trainer.max_steps
    if config.mode is Mode.dpo and config.dpo.from_run is not None and num_rows is None:
        return config.trainer.max_steps  # until the recorded pairs have been counted (runs/dpo.py)
    if num_rows is None:
        steps = "trainer.warmup.steps" if supervised else "trainer.max_steps"
        raise ConfigError(
            f"trainer.max_epochs={epochs:g} needs a task with a number of rows, and the problems of task.target="
            f"{config.task.target} are endless, so no pass over them would end: set {steps} instead, or define "
            "num_rows(split) in the task"
        )
    per_step = config.dpo.batch_size if config.mode is Mode.dpo else config.orchestrator.groups_per_step
    if supervised:
        per_step = config.trainer.warmup.batch_size
    return math.ceil(epochs * num_rows / per_step)


def make_curriculum(config: RunConfig, num_rows: int | None) -> Curriculum | None:
    """The curriculum of a run's training problems; None without `task.curriculum`. Raises ConfigError."""
    curriculum = config.task.curriculum
    if not curriculum.is_on:
        return None
    if curriculum.hopeless is not None and num_rows is None:
        raise ConfigError(
            f"task.curriculum.hopeless={curriculum.hopeless:g} lets problems rest for passes over the data, and the "
            f"problems of task.target={config.task.target} are endless: set task.curriculum.hopeless=null, or define "
            "num_rows(split) in the task"
        )
    known = Difficulty() if curriculum.start_from is None else first_difficulty(curriculum.start_from)
    return Curriculum(curriculum, num_rows, config.orchestrator.max_staleness, known)


def first_difficulty(place: str) -> Difficulty:
    """What `task.curriculum.start_from` names: the pass rates of an evaluation, or those of the newest checkpoint of a
    run with a curriculum. Raises ConfigError."""
    path = Path(place)
    for table in (path, path / PASS_RATES, path / "eval" / PASS_RATES):
        if table.is_file():
            rates = read_pass_rates(table)
            return Difficulty({key: Attempts(rate.passed, rate.samples) for key, rate in rates.items()})
    for checkpoint in sorted(path.glob(f"checkpoints/step_*/{DIFFICULTY}"), reverse=True):
        try:
            known = Difficulty.read(checkpoint)
        except OSError as error:
            raise ConfigError(f"task.curriculum.start_from={place}: {error}") from error
        return Difficulty({key: attempts._replace(last=-1) for key, attempts in known.by_id.items()})
    raise ConfigError(
        f"task.curriculum.start_from={place} has no {PASS_RATES}, so no problem has a difficulty: name the folder of "
        "an evaluation (mode=eval) or of a run with a curriculum"
    )
