"""The loop of mode=bench: which steps it takes, what goes on ahead of them, and the settings that it replaces."""

from __future__ import annotations

from typing import Any

import pytest

from support.bench_numbers import config_of
from support.loop_world import World
from vlmrl.config.algorithm import FilterMode, Truncated
from vlmrl.config.monitor import WandbMode
from vlmrl.orchestrator.loop import Loop
from vlmrl.preflight.check import Stage, check
from vlmrl.runs.bench.activity import ENGINE_GOES_ON, Activity
from vlmrl.runs.bench.bench import MoreAhead, TimedLoop, bench_settings, has_random_weights
from vlmrl.runs.bench.schedule import Schedule


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_later_batches_go_on_behind_the_last_step(max_staleness: int) -> None:
    """The last measured step has the same work around it as the others: batches of later steps roll out or are opened,
    and none of them is learned from."""
    world, waits = World(), []

    class Noted(Activity):
        def trainer_waits(self) -> Any:
            waits.append(len(world.events))
            return super().trainer_waits()

    def make_loop(**parts: Any) -> Loop:
        length = MoreAhead(parts["problems"], 3 + max_staleness + 1, schedule=Schedule(1, 2, 0))
        return TimedLoop(**parts | {"length": length}, activity=Noted(ENGINE_GOES_ON, Clock()))

    assert world.run(max_staleness=max_staleness, make_loop=make_loop) == "finished"
    assert [event for event in world.events if event.startswith("learn ")] == ["learn 1", "learn 2", "learn 3"]
    rolled_out = {asked["step"] for asked in world.asked}
    assert rolled_out == set(range(1, 3 + max_staleness + 1))
    assert len(waits) == 3, "once for each step"
    groups = len(world.asked[0]["problems"])
    assert len(world.opened) == groups * 3, "with the last step, those of a later one are opened, too"
    assert len(world.discarded) >= groups


def test_settings_that_are_no_part_of_a_step() -> None:
    config = bench_settings(
        config_of(
            *("mode=bench", "algorithm=dapo", "algorithm.truncated=mask", "trainer.patience=3"),
            *("trainer.keep_best=eval/reward", "algorithm.filters.zero_advantage=track", "monitor.blind_guard=stop"),
        )
    )
    assert (config.algorithm.refill.budget, config.algorithm.truncated) == (1, Truncated.zero)
    assert config.algorithm.filters.zero_advantage is FilterMode.none
    assert (config.orchestrator.eval.every, config.monitor.vision_gap_every, config.monitor.report) == (0, 0, False)
    assert config.monitor.wandb.mode is WandbMode.disabled
    check(config, Stage.composed)


def test_which_weights_are_random() -> None:
    assert has_random_weights(config_of())
    assert has_random_weights(config_of("model=qwen3vl", "model.init=random"))
    assert not has_random_weights(config_of("model=qwen3vl", "trainer.compile=true"))
