"""`task=verifiers`: an environment of the `verifiers` package, with its own tasks, agents, tools and rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import SMALLEST, Resume, setting
from vlmrl.config.program import ProgramSampling
from vlmrl.config.task import TaskConfig


@dataclass
class VerifiersConfig(TaskConfig):
    """Play an environment of verifiers 0.4: `task=verifiers task.env=my_env`."""

    kind: str = setting("verifiers", on_resume=Resume.refused)
    """An environment of `verifiers`."""
    target: str = setting("vlmrl.tasks.programs.verifiers:VerifiersTask", on_resume=Resume.refused, imports=True)
    """The built-in class."""
    max_turns: int = setting(32, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The most turns of an episode, all agents together; each is one answer of the policy."""
    timeout_s: float | None = setting(
        600.0, on_resume=Resume.noted, low=SMALLEST, high=1e6, outside="no episode could end in that time"
    )
    """Seconds that an episode may take, waiting for answers included. A longer one is `task_timeout`. None sets no
    limit."""
    env: str = setting(MISSING, on_resume=Resume.refused)
    """The taskset's id: the name of an installed package, as `verifiers` takes it."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """The rest of the environment's config, under verifiers' own names: `+task.args.agent.harness.id=null`,
    `+task.args.taskset.task.level=2`. They are checked by verifiers."""
    python: str | None = setting(None, on_resume=Resume.free)
    """The Python of the virtual environment that has verifiers and the environment. null: the run's own."""
    episodes: int = setting(32, on_resume=Resume.free, low=1, high=4096, outside="no episode would be played")
    """The most rollouts that are played at the same time."""
    holdout_one_in: int = setting(8, on_resume=Resume.refused, low=2, high=10**9, outside="no task is left to train on")
    """One of so many problems, chosen by the hash of its key, is kept for evaluation and never trained on."""
    sampling: ProgramSampling = setting(ProgramSampling.run, on_resume=Resume.noted)
    """Who decides how answers are sampled."""
    texts: list[str] = setting([], on_resume=Resume.noted)
    """Examples of the text in prompts and answers. Only a tokenizer that is made here is trained on them."""
    noise: bool = setting(False, on_resume=Resume.refused)
    """Blind control: show noise in place of every image. Only what can be done without seeing can be learned then."""
