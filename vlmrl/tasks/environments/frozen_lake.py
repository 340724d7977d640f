"""FrozenLake on random maps, and an expert for any FrozenLake.

    task.env_id=vlmrl.tasks.environments.frozen_lake:RandomFrozenLake-v0
    task.expert=vlmrl.tasks.environments.frozen_lake:shortest_way
    task.shaping=vlmrl.tasks.environments.frozen_lake:nearness

Gymnasium's own environment has one map, or draws one when it is made, without a seed. `RandomFrozenLake` draws a map
with each seed of `reset`, so that a problem is a map, and some maps can be held out.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
"""(rows, columns) that the actions left, down, right and up move."""


class RandomFrozenLake(FrozenLakeEnv):
    """A lake of `size` × `size` fields, of which about the share `frozen` is ice. There is a way to the goal. A field
    has `pixels` × `pixels` pixels."""

    def __init__(
        self,
        render_mode: str | None = None,
        size: int = 4,
        frozen: float = 0.8,
        is_slippery: bool = False,
        pixels: int = 64,
    ) -> None:
        self._size, self._frozen, self._is_slippery, self._pixels = size, frozen, is_slippery, pixels
        self._draw_map(0, render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Begin on the map of a seed; without one, on the same map again."""
        if seed is not None:
            self._draw_map(seed, self.render_mode)
        return super().reset(seed=seed, options=options)  # type: ignore[no-any-return]

    def _draw_map(self, seed: int, render_mode: str | None) -> None:
        desc = generate_random_map(self._size, self._frozen, seed)
        super().__init__(render_mode=render_mode, desc=desc, is_slippery=self._is_slippery)
        self.cell_size = (self._pixels, self._pixels)
        self.window_size = (self._size * self._pixels, self._size * self._pixels)


gymnasium.register("RandomFrozenLake-v0", entry_point=f"{__name__}:RandomFrozenLake", max_episode_steps=100)


def shortest_way(env: Any) -> int:
    """The first action of a shortest way from here to the goal, around the holes. It takes the ice for not slippery."""
    return min(range(len(MOVES)), key=lambda action: (_steps(env, *_after(env, _here(env), action)), action))


def nearness(env: Any) -> float:
    """Minus the steps from here to the goal, around the holes. In a hole: two steps more than the longest way without
    detours. A much larger loss teaches a policy to stand still."""
    row, column = _here(env)
    return -float(2 * env.nrow if env.desc[row, column] == b"H" else _steps(env, row, column))


def _here(env: Any) -> tuple[int, int]:
    row, column = divmod(int(env.s), env.ncol)
    return row, column


def _after(env: Any, place: tuple[int, int], action: int) -> tuple[int, int]:
    row, column = place[0] + MOVES[action][0], place[1] + MOVES[action][1]
    return min(max(row, 0), env.nrow - 1), min(max(column, 0), env.ncol - 1)


def _steps(env: Any, row: int, column: int) -> int:
    """The steps from a field to the goal; the number of fields where no way leads there."""
    queue, seen = deque([((row, column), 0)]), {(row, column)}
    while queue:
        place, steps = queue.popleft()
        letter = env.desc[place]
        if letter == b"G":
            return steps
        if letter == b"H":
            continue
        for action in range(len(MOVES)):
            if (after := _after(env, place, action)) not in seen:
                seen.add(after)
                queue.append((after, steps + 1))
    return int(env.desc.size)
