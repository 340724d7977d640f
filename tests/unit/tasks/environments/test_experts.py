"""The experts walk shortest ways, and the potentials count what is left of them."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import minigrid  # noqa: F401 — registers its environments
import pytest

from vlmrl.tasks.environments import frozen_lake
from vlmrl.tasks.environments import minigrid as grids

LAKES = [("RandomFrozenLake-v0", {"size": size}) for size in (4, 6)]
LEVELS: list[tuple[str, dict[str, Any]]] = [
    (f"MiniGrid-{name}-v0", {}) for name in ("Empty-Random-6x6", "Empty-8x8", "LavaGapS6", "SimpleCrossingS9N2")
]


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expert"),
    [(*lake, frozen_lake) for lake in LAKES] + [(*level, grids) for level in LEVELS],
)
def test_the_expert_takes_as_many_steps_as_the_potential_says(env_id: str, kwargs: dict[str, Any], expert: Any) -> None:
    env = gymnasium.make(env_id, **kwargs)
    for seed in range(12):
        env.reset(seed=seed)
        left = -expert.nearness(env.unwrapped)
        for step in itertools.count(1):
            _, reward, terminated, truncated, _ = env.step(expert.shortest_way(env.unwrapped))
            assert not truncated
            assert -expert.nearness(env.unwrapped) == left - step
            if terminated:
                break
        assert (step, float(reward) > 0) == (left, True)
    env.close()


def test_no_sequence_of_fewer_actions_wins() -> None:
    """Every sequence of actions is tried on small lakes."""
    env = gymnasium.make("RandomFrozenLake-v0", size=3, frozen=0.6)

    def wins(actions: tuple[int, ...]) -> bool:
        env.reset()  # on the same map
        for action in actions:
            _, reward, terminated, _, _ = env.step(action)
            if terminated:
                return float(reward) == 1.0
        return False

    for seed in range(4):
        env.reset(seed=seed)
        length = -int(frozen_lake.nearness(env.unwrapped))
        assert not any(map(wins, itertools.product(range(4), repeat=length - 1)))
        assert any(map(wins, itertools.product(range(4), repeat=length)))
    env.close()


def test_a_seed_is_a_map() -> None:
    env = gymnasium.make("RandomFrozenLake-v0")

    def map_of(seed: int | None) -> bytes:
        env.reset(seed=seed)
        return bytes(env.unwrapped.desc.tobytes())  # type: ignore[attr-defined]

    maps = [map_of(seed) for seed in range(20)]
    assert maps == [map_of(seed) for seed in range(20)]
    assert len(set(maps)) > 15
    assert map_of(None) == maps[-1]
    env.close()


def test_a_hole_and_a_goal_behind_a_wall_have_no_way() -> None:
    lake: Any = gymnasium.make("FrozenLake-v1", desc=["SH", "HG"]).unwrapped
    lake.reset()
    assert frozen_lake.nearness(lake) == -4.0
    level: Any = gymnasium.make("MiniGrid-DoorKey-5x5-v0").unwrapped
    level.reset(seed=0)
    assert grids.nearness(level) == -100.0
    with pytest.raises(ValueError, match="no way leads to a goal"):
        grids.shortest_way(level)
