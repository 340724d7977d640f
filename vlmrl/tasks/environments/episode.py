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
from vlmrl.types import Image, Message, Video


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
        self._observed: Observed = (None, {})
        self._past: tuple[Taken, ...] = ()
        self._shown: list[Shown] = []
        """What is shown in the present conversation, turn by turn."""
        self._return = 0.0
        self._penalties = 0.0

    @property
    def simulator(self) -> Simulator:
        """The simulator after `reset`."""
        assert self._simulator is not None, "reset() comes first"
        return self._simulator

    def answer_of(self, action: Any) -> str:
        """The answer that takes an action, which is given by name or by number. Raises ValueError for one of
        neither."""
        return self._game.actions.name(self._game.actions.number_of(action))

    def reset(self) -> tuple[Message, ...]:
        self._simulator = Simulator(self._game.config)
        self._observed = self._simulator.reset(self._seed)
        return self.start_over()

    def step(self, completion: str) -> Reply:
        if self.take(completion):
            return self._reply()
        stands_still = self._past[-1].action is None and not (self._game.config.noise or self._game.config.film)
        picture = self._shown[-1].picture if stands_still else self._drawn()
        self._shown.append(Shown(picture, *self._observed, self._past))
        limit = self._game.config.history
        if limit is None or len(self._shown) <= limit:
            return replace(self._reply(), done=False, messages=(self._game.prompts.later(self._shown[-1]),))
        self._shown = self._shown[-limit:]
        return replace(self._reply(), done=False, history=self._conversation())

    def take(self, completion: str) -> bool:
        """Take the action that an answer names, without a look at the outcome. Returns whether the episode is over."""
        config, number = self._game.config, self._game.actions.parse(completion)
        if number is None:
            self._penalties += config.invalid_reward
            is_over = config.invalid is InvalidAnswer.end
            taken = Taken(completion, None, config.invalid_reward)
        else:
            potential = self._game.potential(self.simulator.unwrapped)
            self._observed, reward, is_over = self.simulator.step(number)
            self._return += reward
            shaped = reward + self._game.potential(self.simulator.unwrapped) - potential
            taken = Taken(completion, self._game.actions.name(number), shaped)
        self._past = (*self._past, taken)
        return is_over or len(self._past) == config.max_turns

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()

    def start_over(self) -> tuple[Message, ...]:
        """Begin a conversation with the present turn, and return its messages."""
        self._shown = [Shown(self._drawn(), *self._observed, self._past)]
        return self._conversation()

    def _reply(self) -> Reply:
        """The reply that ends the episode here."""
        return Reply(
            turn_reward=self._past[-1].reward,
            done=True,
            reward=self._return + self._penalties,
            metrics=self._metrics(),
        )

    def _conversation(self) -> tuple[Message, ...]:
        """The messages of what is shown, with the answers in between."""
        first, *later = self._shown
        messages = list(self._game.prompts.opening(first))
        for shown in later:
            messages += [Message.of("assistant", shown.last.answer), self._game.prompts.later(shown)]
        return tuple(messages)

    def _metrics(self) -> dict[str, float]:
        metrics = {
            "return": self._return,
            "turns": float(len(self._past)),
            "invalid": sum(taken.action is None for taken in self._past) / len(self._past),
        }
        success_at = self._game.config.success_at
        return metrics if success_at is None else metrics | {"success": float(self._return >= success_at)}

    def _drawn(self) -> Image | Video:
        """The frame now; with `task.film` and after an action, the frames of that action. With `task.noise`, noise of
        their size that depends on the seed and the turn alone, so that it says nothing about the state."""
        has_film = bool(self._past) and self._past[-1].action is not None and bool(self.simulator.film)
        pixels = np.stack(self.simulator.film) if has_film else self.simulator.frame()
        if self._game.config.noise:
            draw = np.random.default_rng((self._seed, len(self._past)))
            pixels = draw.integers(0, 256, pixels.shape, np.uint8)
        return Video(pixels) if has_film else Image(pixels)
