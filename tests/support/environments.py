"""Gymnasium environments for the tests of task=gymnasium, and configs that play them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.tasks.environments.task import GymnasiumTask

MOVES = ["left", "down", "right", "up"]
LAKE: dict[str, Any] = {"env_id": "FrozenLake-v1", "env_kwargs": {"is_slippery": False}, "actions": MOVES}
LAKES: dict[str, Any] = {
    **LAKE,
    "env_id": "vlmrl.tasks.environments.frozen_lake:RandomFrozenLake-v0",
    "env_kwargs": {},
    "expert": "vlmrl.tasks.environments.frozen_lake:shortest_way",
    "shaping": "vlmrl.tasks.environments.frozen_lake:nearness",
}
GRID: dict[str, Any] = {
    "env_id": "minigrid:MiniGrid-Empty-Random-5x5-v0",
    "env_kwargs": {"tile_size": 8, "highlight": False},
    "actions": ["left", "right", "forward"],
    "expert": "vlmrl.tasks.environments.minigrid:shortest_way",
    "shaping": "vlmrl.tasks.environments.minigrid:nearness",
}


def task_of(seed: int = 0, **settings: Any) -> GymnasiumTask:
    return GymnasiumTask(GymnasiumConfig(**settings), seed=seed)


class Counter(gymnasium.Env[int, int]):
    """Counts its steps. The frame's red is the count; action 2 ends the episode with 5, any other one pays 1."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 — Gymnasium's own form
    opened = 0
    closed = 0

    def __init__(self, render_mode: str | None = None, start: int = 0) -> None:
        self.render_mode = render_mode
        self.action_space, self.observation_space = Discrete(3, start=start), Discrete(100)  # type: ignore[assignment]
        self._canvas = np.zeros((4, 8, 3), np.uint8)
        Counter.opened += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._canvas[:] = 0, int(seed or 0) % 256, 0
        return 0, {"lives": 3}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        over = bool(action == self.action_space.start + 2)  # type: ignore[attr-defined]
        self._canvas[:, :, 0] += 1  # it draws over the frame before
        return int(self._canvas[0, 0, 0]), 5.0 if over else 1.0, over, False, {"lives": 2}

    def render(self) -> np.ndarray:
        return self._canvas

    def close(self) -> None:
        Counter.closed += 1


class Blank(Counter):
    """Has no frames."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012


class Grey(Counter):
    """Draws one channel."""

    def render(self) -> np.ndarray:
        return self._canvas[..., 0]


class Unseeded(Counter):
    """Starts anywhere."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        Unseeded.opened += 1
        return super().reset(seed=Unseeded.opened)


for made in (Counter, Blank, Grey, Unseeded):
    gymnasium.register(id=f"{made.__name__}-v0", entry_point=f"{__name__}:{made.__name__}")


def always_two(env: Any) -> int:
    """An expert for `Counter`."""
    return 2


def wrong(env: Any) -> str:
    """An expert that does not know the names."""
    return "jump"


def lives(env: Any) -> float:
    """A potential: ten times the steps."""
    return 10.0 * int(env._canvas[0, 0, 0])
