"""`task`: what the policy learns. Each built-in task has its own schema; `task.target` may name a class of your own."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.algorithm import Credit
from vlmrl.config.fields import SMALLEST, Resume, setting
from vlmrl.config.reward import RewardConfig


class Workers(Enum):
    """Where the envs of a task run."""

    thread = "thread"
    """In threads of the run: 32 calls at the same time, and any number of `async` ones."""
    process = "process"
    """In worker processes, one call at a time in each. For envs that keep Python busy or may crash: they use all cores,
    and a crash costs one rollout."""


class BadRows(Enum):
    """What happens at a row that cannot be used: no answer, a missing or broken image, a prompt that is too long."""

    skip = "skip"
    """The row is counted, recorded in bad_rows.jsonl with its reason, and left out."""
    fail = "fail"
    """The run stops at the first bad row and names it."""


@dataclass
class CurriculumConfig:
    """Choose training problems by their pass rates (`vlmrl.orchestrator.curriculum`), the share of a problem's recent
    rollouts that solve it. Off while `solved` and `hopeless` are null and the band is 0 to 1."""

    pass_at: float = setting(
        1.0, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is not a reward that a policy can reach"
    )
    """The reward from which on a rollout solves its problem."""
    solved: float | None = setting(None, on_resume=Resume.noted, low=0, high=1, outside="it is not a pass rate")
    """Pass over problems whose pass rate is at least this, e.g. 1."""
    hopeless: float | None = setting(None, on_resume=Resume.noted, low=0, high=1, outside="it is not a pass rate")
    """Let problems rest whose pass rate is at most this, e.g. 0."""
    rest: int = setting(2, on_resume=Resume.noted, low=1, high=10**6, outside="no problem rests")
    """Whole passes over the data for which a hopeless problem rests."""
    low: float = setting(0.0, on_resume=Resume.noted, low=0, high=1, outside="it is not a pass rate")
    """The lower end of the band: aim at problems whose pass rate is between `low` and `high`, e.g. 0.2 and 0.8.
    Problems that were never played count as inside."""
    high: float = setting(1.0, on_resume=Resume.noted, low=0, high=1, outside="it is not a pass rate")
    """The upper end of the band, a pass rate."""
    outside: int = setting(8, on_resume=Resume.noted, low=1, high=10**6, outside="no problem is left")
    """Of the problems outside the band, play one in so many, so that their pass rates stay true."""
    start_from: str | None = setting(None, on_resume=Resume.noted)
    """Folder of a run whose pass rates are the first ones: of `mode=eval`, which writes pass_rates.json, or of a run
    with a curriculum."""

    @property
    def is_on(self) -> bool:
        """Whether problems are chosen."""
        return self.solved is not None or self.hopeless is not None or (self.low, self.high) != (0.0, 1.0)


@dataclass
class TaskConfig:
    """What every task has."""

    target: str = setting(MISSING, on_resume=Resume.refused, imports=True)
    """Import path of the Task class, `package.module:Class` or `path/to/file.py:Class`; called as
    `Class(config, seed=run seed)`."""
    max_turns: int = setting(1, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The most turns of an episode; a turn is a prompt and its completion."""
    timeout_s: float | None = setting(
        None, on_resume=Resume.noted, low=SMALLEST, high=1e6, outside="no call of the env could return in that time"
    )
    """Seconds that a call of an env's `reset` or `step` may take. A call that takes longer ends its rollout as
    `task_timeout`. None sets no limit."""
    workers: Workers = setting(Workers.thread, on_resume=Resume.free)
    """Where the envs run: in threads of the run, or in worker processes."""
    num_workers: int | None = setting(
        None, on_resume=Resume.free, low=1, high=4096, outside="no process would run the envs"
    )
    """Number of worker processes with `task.workers=process`. None starts one per core."""
    num_examples: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=10**12, outside="there is no problem to train on"
    )
    """Number of training problems: the run repeats the first so many, in supervised steps too. None uses all problems
    of the task."""
    max_fault_rate: float = setting(
        1.0, on_resume=Resume.free, low=SMALLEST, high=1, outside="the first fault, or none, ends the run"
    )
    """Share of the rollouts of the last steps that may be faults of the task's code or data; with more, the run is
    saved and ends. 1 allows every share, but a run of nothing but faults ends in any case."""
    bad_rows: BadRows = setting(BadRows.skip, on_resume=Resume.free)
    """What happens at a row that cannot be used."""
    max_bad_row_rate: float = setting(
        0.5, on_resume=Resume.free, low=0, high=1, outside="the run stops always, or never"
    )
    """Share of bad rows among the rows drawn above which the run stops; 1 allows every share."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Choose training problems by their pass rates."""
    credit: Credit = setting(Credit.episode, on_resume=Resume.noted)
    """Which reward the task's turns are trained on; the default of `algorithm.credit`. A task that rewards single turns
    says `turn`."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward terms of this task alone, in place of the run's `reward`; for a task of a mixture or of an evaluation
    set."""
    kind: str = setting(MISSING, on_resume=Resume.refused)
    """The task's schema; set by the option that `task=` chooses."""


@dataclass
class ColorCodewordConfig(TaskConfig):
    """Read the colors of squares as letters: the answer is the codeword so far."""

    kind: str = setting("color_codeword", on_resume=Resume.refused)
    """The built-in task."""
    target: str = setting("vlmrl.tasks.color_codeword:ColorCodeword", on_resume=Resume.refused, imports=True)
    """The built-in class."""
    max_turns: int = setting(2, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """User turns; the codeword has `max_turns * images_per_turn` letters."""
    credit: Credit = setting(Credit.turn, on_resume=Resume.noted)
    """Each answer has a reward of its own. With one reward per episode, the tiny model does not learn the task."""
    images_per_turn: int = setting(2, on_resume=Resume.refused, low=1, high=1024, outside="there is nothing to read")
    """Squares that each user turn shows."""
    image_size: int = setting(32, on_resume=Resume.refused, low=1, high=2**13, outside="an image has no pixel")
    """Pixels per side of a square."""
    shuffle_images: bool = setting(False, on_resume=Resume.refused)
    """Blind control: show the images of another problem. Nothing can be learned then."""
    holdout_one_in: int = setting(
        8, on_resume=Resume.refused, low=2, high=10**9, outside="no codeword is left to train on"
    )
    """One of so many codewords, chosen by its hash, is kept for evaluation and never trained on."""


@dataclass
class ImportedTaskConfig(TaskConfig):
    """A task of your own: `task=my_package.my_module:MyTask task.args.level=3`."""

    kind: str = setting("imported", on_resume=Resume.refused)
    """A task of your own, which `task.target` names."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Settings that your task reads; they are not checked."""


@dataclass
class MixtureConfig(TaskConfig):
    """Several tasks in one run: `task=mixture +task@task.tasks.a=dataset +task@task.tasks.b=color_codeword`."""

    kind: str = setting("mixture", on_resume=Resume.refused)
    """Several tasks by name."""
    target: str = setting("vlmrl.tasks.mixture:MixtureTask", on_resume=Resume.refused)
    """The built-in class."""
    max_turns: int = setting(
        1, on_resume=Resume.noted, low=1, high=1, outside="each task keeps its own, task.tasks.<name>.max_turns"
    )
    """Not used: the turns of an episode are those of its task."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name → task, of any kind but another mixture. Metrics of each stand under `by_task/<name>/…`."""
    weights: dict[str, float] = setting({}, on_resume=Resume.noted, free_form=True)
    """Name → weight of a task: the problems of training come from the tasks in proportion to their weights, in a fixed
    order. A task that is not named has weight 1. An evaluation takes the tasks in turn."""


def tasks_of(config: TaskConfig, key: str = "task") -> dict[str, TaskConfig]:
    """Key → config of every single task: those of a mixture, or the task itself.

    >>> list(tasks_of(MixtureConfig(tasks={"a": ColorCodewordConfig()}))), list(tasks_of(ColorCodewordConfig()))
    (['task.tasks.a'], ['task'])
    """
    if not isinstance(config, MixtureConfig):
        return {key: config}
    return {f"{key}.tasks.{name}": own for name, own in config.tasks.items()}


def most_turns(config: TaskConfig) -> int:
    """The most turns of an episode, of any task of a mixture."""
    return max(own.max_turns for own in tasks_of(config).values())
