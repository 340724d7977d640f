"""Environments that nobody has named here start and play, or are refused in words; drawing holds in threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from support.environments import task_of
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.errors import ConfigError
from vlmrl.rendering.images import image_hash
from vlmrl.tasks.check import check_task
from vlmrl.tasks.environments.simulator import Simulator

UNNAMED = [
    "CartPole-v1",
    "MountainCar-v0",
    "Acrobot-v1",
    "Blackjack-v1",
    "CliffWalking-v1",
    "Taxi-v4",
    "minigrid:MiniGrid-DoorKey-5x5-v0",
    "minigrid:MiniGrid-FourRooms-v0",
    "minigrid:MiniGrid-LavaGapS5-v0",
    "minigrid:MiniGrid-MemoryS7-v0",
    "minigrid:BabyAI-GoToObj-v0",
]


@pytest.mark.parametrize("env_id", UNNAMED)
def test_an_environment_of_others_keeps_the_contract(env_id: str) -> None:
    task = task_of(env_id=env_id, frame_size=64, max_turns=3, holdout_one_in=2)
    assert check_task(task, problems=1, max_turns=3) == []
    assert task.data_table().keys() == {"actions", "start states"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"env_id": "Pendulum-v1"}, r"has the action space Box\(.*choose an environment with a Discrete action space"),
        ({"env_id": "Nope-v0"}, "Environment `Nope` doesn't exist.*correct task.env_id.*the package before a colon"),
        ({"env_id": "no_such_package:Env-v0"}, "raised ModuleNotFoundError: No module named 'no_such_package'"),
        ({"env_id": "LunarLander-v3"}, r"Box2D is not installed.*install what it needs"),
        ({"env_id": "FrozenLake-v1", "env_kwargs": {"slip": 1}}, "unexpected keyword argument 'slip'.*task.env_kwargs"),
        ({"env_id": "FrozenLake-v1", "env_kwargs": {"map_name": None}}, "another frame when it is reset with the same"),
        ({"env_id": "support.environments:Unseeded-v0"}, "another frame when it is reset with the same seed"),
        ({"env_id": "support.environments:Grey-v0"}, r"draws uint8 \[4, 8\], not a frame uint8 \[height, width, 3\]"),
    ],
)
def test_what_cannot_be_played_is_refused_in_words(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)^task.env_id={settings['env_id']}.*{problem}"):
        task_of(**settings)


@pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")
def test_an_environment_without_frames_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"draws no frames: its render modes are \['ansi'\].*choose an environment"):
        task_of(env_id="support.environments:Blank-v0")


def played(env_id: str, seed: int) -> list[str]:
    simulator = Simulator(GymnasiumConfig(env_id=env_id))
    simulator.reset(seed)
    frames = [image_hash(simulator.raw_frame())]
    draw = np.random.default_rng(seed)
    for _ in range(6):
        is_over = simulator.step(int(draw.integers(simulator.action_space.n)))[2]
        frames.append(image_hash(simulator.raw_frame()))
        if is_over:
            break
    simulator.close()
    return frames


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Blackjack-v1", "Taxi-v4"])
def test_threads_that_draw_at_once_draw_what_one_draws(env_id: str) -> None:
    """Each opens and closes windows of its own, which share pygame."""
    task_of(env_id=env_id)  # imports pygame
    seeds = range(4)
    alone = [played(env_id, seed) for seed in seeds]
    found: list[list[list[str]]] = []

    def play() -> None:
        found.append([played(env_id, seed) for seed in seeds])

    threads = [threading.Thread(target=play) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 12
