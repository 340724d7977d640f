"""Scripted policies of mode=play: a function in place of the model (`play.policy=my_module:my_policy`).

def my_policy(messages): …         the conversation as the policy sees it
def my_policy(env): …              the task's env; with task=gymnasium, the environment itself
def my_policy(messages, env): …    both
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vlmrl.config.import_paths import import_named
from vlmrl.errors import ConfigError, safe_repr
from vlmrl.tasks.environments.episode import Episode
from vlmrl.types import Message

PARAMETERS = ("messages", "env")
"""What a scripted policy may ask for, by name."""


class ScriptedPolicy:
    """A function that answers. Raises ConfigError where it cannot be imported or called."""

    def __init__(self, path: str) -> None:
        self._function: Callable[..., Any] = import_named("play.policy", path, "function", callable, inspect.isfunction)
        signature = inspect.signature(self._function)
        self._wanted = [name for name in PARAMETERS if name in signature.parameters]
        try:
            signature.bind(**dict.fromkeys(self._wanted))
        except TypeError as error:
            raise ConfigError(
                f"play.policy={path} cannot be called with {' and '.join(PARAMETERS)} alone ({error}), so it cannot "
                "answer: give it no other parameters without a default"
            ) from error

    def answer(self, messages: Sequence[Message], env: Any) -> str:
        """The answer to `messages`; `env` is what `Task.env` returned. Raises whatever the function raises, and
        TypeError where it returns no text."""
        game = env if isinstance(env, Episode) else None
        offered = {"messages": tuple(messages), "env": env if game is None else game.simulator.unwrapped}
        given = self._function(**{name: offered[name] for name in self._wanted})
        if game is not None and not isinstance(given, str):
            return game.answer_of(given)
        if not isinstance(given, str):
            raise TypeError(f"it returned {safe_repr(given)}, which is no text")
        return given
