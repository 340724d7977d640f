"""The warm-up of verifiers_tools.py: the form of an episode of `vf_cards`, without what a card means.

Each demonstration calls the tool and then says a letter that has nothing to do with the card. The prompts are those of
the environment: the tool of this module is described as verifiers describes that of its tool server.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmrl import ConfigError, Env, Image, Message, Reply, Split, Task, ToolCall

COLORS = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255)}
QUESTION = "Draw a card. Which letter?"
TOOL = "card_tools_draw"


@dataclass(frozen=True)
class Card:
    id: str
    letter: str


def picture(letter: str) -> Image:
    return Image(np.full((32, 32, 3), COLORS[letter], np.uint8))


def card_tools_draw() -> Image:
    """Draw a card."""
    return picture("A")  # supervised steps call no tool


class Ask:
    def reset(self) -> tuple[Message, ...]:
        return (Message.of("user", QUESTION),)

    def step(self, completion: str) -> Reply:
        return Reply(done=True)


class Cards(Task):
    def __init__(self, config: Any, *, seed: int) -> None:
        if config.args:
            raise ConfigError(f"task.args={config.args}: this task has no settings: leave them out")
        self._seed = seed

    def problem(self, split: Split, index: int) -> Card:
        name = f"{split} {index} of {self._seed}"
        return Card(name, random.Random(name).choice("ABC"))

    def env(self, problem: Any) -> Env:
        return Ask()

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        letter = random.Random(seed).choice("ABC") if random_answers else problem.letter
        return (
            Message.of("user", QUESTION),
            Message("assistant", (), (ToolCall(TOOL, {}),)),
            Message("tool", (picture(problem.letter),), name=TOOL),
            Message.of("assistant", letter),
        )

    def texts(self) -> tuple[str, ...]:
        return (QUESTION, *COLORS, f'{{"name": "{TOOL}", "arguments": {{}}}}')
