"""One episode of an environment: answers become actions, frames become messages.

    answer ─▶ action ─▶ Simulator.step ─▶ frame, reward ─▶ Reply
                │ none: task.invalid                 │ more frames than task.history: the conversation starts over

With `task.history=2`, a policy that has gone left and then up sees, in its third turn:

    user        (prompt) [frame 2] So far: left.
    assistant   up
    user        (reply)  [frame 3]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmrl.config.gymnasium import GymnasiumConfig, InvalidAnswer
from vlmrl.tasks.base import Reply
from vlmrl.tasks.environments.actions import Actions
from vlmrl.tasks.environments.prompts import Prompts, Shown, Taken
from vlmrl.tasks.environments.simulator import Observed, Simulator
from vlmrl.types import Image, Message


@dataclass(frozen=True)
class Game:
    """What all episodes of a task share."""

    config: GymnasiumConfig
    actions: Actions
    prompts: Prompts
    potential: Callable[[Any], float]
    """`task.shaping`; 0.0 everywhere without it."""


class Episode:
    """An `Env`. The simulator is opened by `reset`, and freed by `close`."""

    def __init__(self, game: Game, seed: int) -> None:
        """`seed` is the environment's."""
        self._game = game
        self._seed = seed
        self._simulator: Simulator | None = None
        self._shown: list[Shown] = []
        """What was shown in each turn."""
        self._first = 0
        """The turn with which the present conversation begins, counted from 0."""
        self._return = 0.0
        self._penalties = 0.0

    @property
    def simulator(self) -> Simulator:
        """The simulator after `reset`."""
        assert self._simulator is not None, "reset() comes first"
        return self._simulator

    def reset(self) -> tuple[Message, ...]:
        self._simulator = Simulator(self._game.config)
        observed = self._simulator.reset(self._seed)
        self._shown = [self._look(observed, ())]
        return self._game.prompts.opening(self._shown[0])

    def step(self, completion: str) -> Reply:
        number = self._game.actions.parse(completion)
        if number is None:
            return self._go_on_without_action(completion)
        potential = self._game.potential(self.simulator.unwrapped)
        observed, reward, is_over = self.simulator.step(number)
        self._return += reward
        shaped = reward + self._game.potential(self.simulator.unwrapped) - potential
        past = (*self._shown[-1].past, Taken(completion, self._game.actions.name(number), shaped))
        if is_over or self._is_last_turn:
            return self._reply(past, done=True)
        self._shown.append(self._look(observed, past))
        return self._reply(past, done=False)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()

    def start_over(self) -> tuple[Message, ...]:
        """Begin a conversation with the present turn, and return its messages."""
        self._first = len(self._shown) - 1
        return self._conversation()

    def _go_on_without_action(self, completion: str) -> Reply:
        config, last = self._game.config, self._shown[-1]
        self._penalties += config.invalid_reward
        past = (*last.past, Taken(completion, None, config.invalid_reward))
        if config.invalid is InvalidAnswer.end or self._is_last_turn:
            return self._reply(past, done=True)
        image = self._noise(last.image.source, len(past)) if config.noise else last.image
        self._shown.append(replace(last, past=past, image=image))
        return self._reply(past, done=False)

    @property
    def _is_last_turn(self) -> bool:
        return len(self._shown) == self._game.config.max_turns

    def _reply(self, past: tuple[Taken, ...], *, done: bool) -> Reply:
        reply = Reply(
            turn_reward=past[-1].reward,
            done=done,
            reward=self._return + self._penalties,
            metrics=self._metrics(past),
        )
        if done:
            return reply
        limit = self._game.config.history
        if limit is None or len(self._shown) - self._first <= limit:
            return replace(reply, messages=(self._game.prompts.later(self._shown[-1]),))
        self._first = len(self._shown) - limit
        return replace(reply, history=self._conversation())

    def _conversation(self) -> tuple[Message, ...]:
        """The messages from the turn `_first` on, with the answers in between."""
        first, *later = self._shown[self._first :]
        messages = list(self._game.prompts.opening(first))
        for shown in later:
            messages += [Message.of("assistant", shown.last.answer), self._game.prompts.later(shown)]
        return tuple(messages)

    def _metrics(self, past: tuple[Taken, ...]) -> dict[str, float]:
        metrics = {
            "return": self._return,
            "turns": float(len(past)),
            "invalid": sum(taken.action is None for taken in past) / len(past),
        }
        success_at = self._game.config.success_at
        return metrics if success_at is None else metrics | {"success": float(self._return >= success_at)}

    def _look(self, observed: Observed, past: tuple[Taken, ...]) -> Shown:
        frame = self.simulator.frame()
        image = self._noise(frame, len(past)) if self._game.config.noise else Image(frame)
        return Shown(image, *observed, past)

    def _noise(self, frame: Any, turn: int) -> Image:
        """Noise of the frame's size. It depends on the seed and the turn alone, so it says nothing about the state."""
        draw = np.random.default_rng((self._seed, turn))
        return Image(draw.integers(0, 256, np.shape(frame), np.uint8))
