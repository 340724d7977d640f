"""The messages of a game: `task.prompt` and `task.reply` filled in, with the frame in its place.

    first message of a conversation   task.prompt    frame, actions, instruction, observation, info, turn, past, …
    message after an action           task.reply     … and the last action: action, answer, valid, reward

docs/environments.md lists the names for users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.template import Template
from vlmrl.types import Image, Message, Video

FRAME = "\x00frame\x00"
"""Stands for the frame in a filled template. No environment's text contains it."""

NAMES = (
    *("frame", "actions", "instruction", "observation", "info", "turn", "max_turns", "past"),
    *("action", "answer", "valid", "reward"),
)
"""What the templates see."""


@dataclass(frozen=True)
class Taken:
    """An answer, and what came of it."""

    answer: str
    action: str | None
    """The action's name; None where the answer named none."""
    reward: float

    def names(self) -> dict[str, Any]:
        """Its names in a template."""
        return {
            "answer": self.answer,
            "action": self.action or "none",
            "valid": self.action is not None,
            "reward": self.reward,
        }


NOTHING = Taken("", "none", 0.0)
"""What the first message of an episode sees as the last action."""


@dataclass(frozen=True)
class Shown:
    """What the policy is shown in one turn."""

    picture: Image | Video
    observation: Any
    info: dict[str, Any]
    past: tuple[Taken, ...]
    """The actions of the episode before it."""

    @property
    def turn(self) -> int:
        """Counted from 1."""
        return len(self.past) + 1

    @property
    def last(self) -> Taken:
        return self.past[-1] if self.past else NOTHING


class Prompts:
    """Makes the messages of a task. Thread-safe."""

    def __init__(self, config: GymnasiumConfig, actions: Sequence[str]) -> None:
        """Raises ConfigError for a template that uses an unknown name or shows no frame."""
        self._system = () if config.system_prompt is None else (Message.of("system", config.system_prompt),)
        self._prompt = _template(config.prompt, "task.prompt")
        self._reply = _template(config.reply, "task.reply")
        self._constant = {"actions": list(actions), "max_turns": config.max_turns}

    def opening(self, shown: Shown) -> tuple[Message, ...]:
        """The messages that a conversation begins with."""
        return (*self._system, self._message(self._prompt, shown))

    def later(self, shown: Shown) -> Message:
        """The message after an action in the same conversation."""
        return self._message(self._reply, shown)

    def _message(self, template: Template, shown: Shown) -> Message:
        names = {
            **self._constant,
            **shown.last.names(),
            "frame": FRAME,
            "instruction": instruction_in(shown.observation),
            "observation": shown.observation,
            "info": shown.info,
            "turn": shown.turn,
            "past": [taken.names() for taken in shown.past],
        }
        before, *after = template.fill(names).split(FRAME)
        if len(after) != 1:
            raise ValueError(f"{template.key} shows the frame {len(after)} times in turn {shown.turn}, and not once")
        parts = [text for text in (before.strip(), after[0].strip()) if text]
        place = 1 if before.strip() else 0
        return Message.of("user", *parts[:place], shown.picture, *parts[place:])


def instruction_in(observation: Any) -> str:
    """The texts of an observation that is a dictionary, such as MiniGrid's mission; empty where it has none.

    >>> instruction_in({"mission": "go to the green goal", "direction": 1}), instruction_in(3)
    ('go to the green goal', '')
    """
    if not isinstance(observation, dict):
        return ""
    return " ".join(value for value in observation.values() if isinstance(value, str))


def _template(text: str, key: str) -> Template:
    template = Template(text, key)
    for name in sorted(template.names - set(NAMES)):
        raise ConfigError(
            f"{key} uses {name} ({template.place_of(name)}), which no turn has, so no prompt can be made: use "
            f"{', '.join(NAMES)}"
        )
    if "frame" not in template.names:
        raise ConfigError(
            f"{key} does not use frame, so the policy would see nothing: write {{{{ frame }}}} where the frame stands"
        )
    return template
