"""`task=program`: a program of your own that talks to the run's chat endpoint plays the rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.fields import SMALLEST, Form, Resume, setting
from vlmrl.config.task import TaskConfig

COMMAND = Form(r"(?=.*\S)[^\x00-\x1f\x7f]*", "a command such as 'python agent.py'", "there is no program to start")


class ProgramResult(Enum):
    """Where the reward of an episode comes from."""

    last_line = "last_line"
    """From the last line that the program prints: a number, or a JSON object with `reward` and, if you like,
    `metrics`."""
    file = "file"
    """From the file that the environment variable VLMRL_RESULT_FILE names: the program writes the same into it."""
    none = "none"
    """From reward terms alone (`reward=exact`), which score the last answer. The output of the program is not read."""


class ProgramSampling(Enum):
    """Who decides how the policy's answers are sampled."""

    run = "run"
    """The run. A request that asks for another temperature, top_p, top_k or seed is refused."""
    client = "client"
    """The program, where it says so. Each turn is learned at its own temperature. Turns that were sampled greedily or
    with top_p or top_k cannot be learned from: they have no loss."""


@dataclass
class ProgramConfig(DatasetConfig, TaskConfig):  # the base of a mixed group is a direct base of its schemas
    """A program plays each rollout: `task=program task.command='python agent.py'`."""

    kind: str = setting("program", on_resume=Resume.refused)
    """A program that talks to the run's chat endpoint."""
    target: str = setting("vlmrl.tasks.programs.task:ProgramTask", on_resume=Resume.refused, imports=True)
    """The built-in class."""
    max_turns: int = setting(8, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The most turns of an episode, each of which is one answer of the policy. A request beyond them is refused."""
    timeout_s: float | None = setting(
        600.0, on_resume=Resume.noted, low=SMALLEST, high=1e6, outside="no program could end in that time"
    )
    """Seconds that a program may take for one problem, waiting for answers included. A program that takes longer is
    ended, and its rollout is `task_timeout`. None sets no limit."""
    command: str = setting(MISSING, on_resume=Resume.noted, form=COMMAND)
    """The command that starts the program, split into words as a shell does it. No shell runs: write `sh -c '…'` for
    one."""
    reuse: bool = setting(False, on_resume=Resume.noted)
    """Whether a process plays one problem after another: it reads each as a JSON line from its standard input, and
    prints a JSON line with the result. Otherwise each rollout starts a process of its own."""
    processes: int = setting(32, on_resume=Resume.free, low=1, high=4096, outside="no program would run")
    """The most processes of the program that run at the same time."""
    result: ProgramResult = setting(ProgramResult.last_line, on_resume=Resume.noted)
    """Where the reward of an episode comes from."""
    sampling: ProgramSampling = setting(ProgramSampling.run, on_resume=Resume.noted)
    """Who decides how the policy's answers are sampled. The greedy evaluation is greedy either way."""
    path: Any = setting(None, on_resume=Resume.noted)
    """Rows whose questions, pictures and answers are handed to the program, as with task=dataset. null: the program
    gets a number, from which it makes a problem of its own."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Settings that the program finds under `args` in its problem; they are not checked."""
    texts: list[str] = setting([], on_resume=Resume.noted)
    """Examples of the text in prompts and answers. Only a tokenizer that is made here is trained on them."""
    noise: bool = setting(False, on_resume=Resume.refused)
    """Blind control: show noise in place of every image that the program sends. Only what can be done without seeing
    can be learned then."""


def scores_itself(task: TaskConfig) -> bool:
    """Whether a task says how good an answer is, so that it needs no reward terms. All do but data sets, and programs
    whose output is not read."""
    if isinstance(task, ProgramConfig):
        return task.result is not ProgramResult.none
    return task.kind != "dataset"
