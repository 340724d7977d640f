"""`play`: who plays the episodes of mode=play, and which problems."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vlmrl.config.eval_set import EvalSplit
from vlmrl.config.fields import Resume, setting


class Player(StrEnum):
    """The players that are built in."""

    person = "person"
    """The person at the terminal: each line of the standard input is an answer."""
    random = "random"
    """Answers of the right format that say nothing about the problem (`Task.demonstration` with `random_answers`)."""


@dataclass
class PlayConfig:
    """mode=play plays episodes without a model."""

    policy: str = setting("person", on_resume=Resume.refused, choices=Player)
    """Who answers: `person`, `random`, or the import path of a function that returns the answer. By the names of its
    parameters the function gets `messages`, the conversation as the policy sees it, and `env`, the task's env; with
    task=gymnasium, `env` is the environment and the answer an action, so that `task.expert` is such a function."""
    split: EvalSplit = setting(EvalSplit.train, on_resume=Resume.refused)
    """The split whose problems are played."""
    problem: int = setting(0, on_resume=Resume.refused, low=0, high=10**15, outside="there is no such problem")
    """How many problems of the split are passed over before the first one; each episode plays the next one."""
    episodes: int = setting(1, on_resume=Resume.refused, low=1, high=10**5, outside="nothing is played")
    """How many problems are played, an episode each, one after the other."""
