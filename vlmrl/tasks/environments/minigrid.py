"""An expert for levels of MiniGrid whose goal can be walked to: Empty, FourRooms, LavaGap, Crossing.

    task.env_id=minigrid:MiniGrid-Empty-Random-5x5-v0 task.actions=[left,right,forward]
    task.expert=vlmrl.tasks.environments.minigrid:shortest_way
    task.shaping=vlmrl.tasks.environments.minigrid:nearness

The agent turns left (action 0), turns right (1) or walks forward (2). Doors, keys and boxes are not searched.
"""

from __future__ import annotations

from collections import deque
from typing import Any, TypeAlias

LEFT, RIGHT, FORWARD = 0, 1, 2

AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""(x, y) of a step forward, by the agent's direction: right, down, left, up."""

Pose: TypeAlias = tuple[int, int, int]
"""x, y and direction."""


def shortest_way(env: Any) -> int:
    """The first action of a shortest way from here to the goal. Raises ValueError where none leads there."""
    way = _way(env)
    if way is None:
        raise ValueError("no way leads to a goal by turning and walking alone")
    return way[0] if way else FORWARD


def nearness(env: Any) -> float:
    """Minus the actions from here to the goal; minus four per field where no way leads there."""
    way = _way(env)
    return -float(4 * env.width * env.height if way is None else len(way))


def _way(env: Any) -> list[int] | None:
    """The actions of a shortest way to a goal; None where there is none."""
    start: Pose = (int(env.agent_pos[0]), int(env.agent_pos[1]), int(env.agent_dir))
    queue: deque[tuple[Pose, list[int]]] = deque([(start, [])])
    seen = {start}
    while queue:
        (x, y, direction), way = queue.popleft()
        if _kind(env, x, y) == "goal":
            return way
        if _kind(env, x, y) == "lava":
            continue
        dx, dy = AHEAD[direction]
        turned = {LEFT: (x, y, (direction - 1) % 4), RIGHT: (x, y, (direction + 1) % 4)}
        for action, pose in {**turned, FORWARD: (x + dx, y + dy, direction)}.items():
            if pose not in seen and _is_free(env, pose[0], pose[1]):
                seen.add(pose)
                queue.append((pose, [*way, action]))
    return None


def _kind(env: Any, x: int, y: int) -> str:
    found = env.grid.get(x, y)
    return "" if found is None else str(found.type)


def _is_free(env: Any, x: int, y: int) -> bool:
    found = env.grid.get(x, y)
    return found is None or bool(found.can_overlap())
