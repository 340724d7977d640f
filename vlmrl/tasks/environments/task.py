"""task=gymnasium: play a Gymnasium environment by its frames.

    problem ─▶ a seed whose start state belongs to the split (starts.py) ─▶ Episode (episode.py) ─▶ messages, rewards

The environment's rewards are the rewards of the turns, and their sum is the reward of the episode.

Left out on purpose: other action spaces than Discrete, text observations in place of frames, and vector environments:
each rollout has a simulator of its own.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.import_paths import assert_takes, import_named
from vlmrl.rendering.images import image_hash
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.environments.actions import Actions
from vlmrl.tasks.environments.episode import Episode, Game
from vlmrl.tasks.environments.prompts import Prompts
from vlmrl.tasks.environments.simulator import Simulator, check
from vlmrl.tasks.environments.starts import Starts
from vlmrl.types import Message, Text

HASHES_BYTES = 1 << 22
"""Bound on the remembered hashes of first frames, 64 bytes each."""


@dataclass(frozen=True)
class Start:
    """A problem: the environment, reset with a seed."""

    seed: int

    @property
    def id(self) -> str:
        return f"seed {self.seed}"


class GymnasiumTask(Task):
    """Play an environment of Gymnasium. Raises `ConfigError` for one that cannot be played."""

    def __init__(self, config: GymnasiumConfig, *, seed: int) -> None:
        space = check(config)
        actions = Actions(config.actions, int(space.n), int(space.start))
        potential = _function("task.shaping", config.shaping) or (lambda env: 0.0)
        self._config = config
        self._expert = _function("task.expert", config.expert)
        self._game = Game(config, actions, Prompts(config, actions.names), potential)
        self._hashes: ByteLRU[int, str] = ByteLRU(HASHES_BYTES)
        self._starts = Starts(self._first_hash, one_in=config.holdout_one_in, seed=seed)

    def problem(self, split: Split, index: int) -> Start:
        return Start(self._starts.seed_of(split, index))

    def env(self, problem: Start) -> Episode:
        return Episode(self._game, problem.seed)

    def demonstration(self, problem: Start, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A game of the expert, or of random actions. With `task.history` it shows as many turns as fit a prompt, from
        any turn of the game on."""
        draw = random.Random(seed)
        names, turns = self._game.actions.names, self._config.max_turns
        answers, before = ([draw.choice(names) for _ in range(turns)] for _ in range(2))
        first = draw.randrange(turns) if self._config.history is not None else 0
        if random_answers:
            return self._played(problem, first, lambda turn, _: before[turn], lambda turn, _: answers[turn])
        if self._expert is None:
            raise NotImplementedError(
                "task.expert is not set, so nobody knows the right actions of task=gymnasium: set it to a function of "
                "the environment, or trainer.warmup.demonstrations=random, or trainer.warmup.steps=0"
            )
        return self._played(problem, first, self._experts_choice, self._experts_choice)

    def texts(self) -> tuple[str, ...]:
        """The system prompt, the texts of a few random games, and each action alone."""
        games = [self.demonstration(Start(seed), random_answers=True, seed=seed) for seed in range(4)]
        texts = [part.text for game in games for message in game for part in message.content if isinstance(part, Text)]
        return (*dict.fromkeys(texts), *self._game.actions.names)

    def data_table(self) -> dict[str, str]:
        """The actions, and how many start states were found and are held out."""
        return {"actions": ", ".join(self._game.actions.names), "start states": self._starts.in_words()}

    def _played(
        self,
        problem: Start,
        first: int,
        before: Callable[[int, Episode], str],
        choose: Callable[[int, Episode], str],
    ) -> tuple[Message, ...]:
        """A conversation that begins with turn `first`, or with the last one where the game is over before. `before`
        and `choose` give the actions until then and from then on."""
        episode = self.env(problem)
        try:
            messages = episode.reset()
            for turn in range(first):
                if episode.take(before(turn, episode)):
                    break
            else:
                return self._conversation(episode, episode.start_over() if first else messages, first, choose)
        finally:
            episode.close()
        return self._played(problem, turn, before, choose)

    def _conversation(
        self, episode: Episode, opening: tuple[Message, ...], first: int, choose: Callable[[int, Episode], str]
    ) -> tuple[Message, ...]:
        messages = list(opening)
        for turn in range(self._config.max_turns - first):
            answer = choose(turn, episode)
            reply = episode.step(answer)
            messages.append(Message.of("assistant", answer))
            if reply.done or reply.history is not None:
                break
            messages += reply.messages
        return tuple(messages)

    def _experts_choice(self, turn: int, episode: Episode) -> str:
        assert self._expert is not None
        return episode.answer_of(self._expert(episode.simulator.unwrapped))

    def _first_hash(self, seed: int) -> str:
        """The hash of the first frame with a seed."""
        if (known := self._hashes.get(seed)) is not None:
            return known
        simulator = Simulator(self._config)
        try:
            simulator.reset(seed)
            found = image_hash(simulator.raw_frame())
        finally:
            simulator.close()
        self._hashes.put(seed, found, 64)
        return found


def _function(key: str, path: str | None) -> Callable[[Any], Any] | None:
    """The function that `key` names, which takes the environment. Raises ConfigError."""
    if path is None:
        return None
    function = import_named(key, path, "function", callable, inspect.isfunction)
    assert_takes(key, path, function, "env")
    return function  # type: ignore[no-any-return]
