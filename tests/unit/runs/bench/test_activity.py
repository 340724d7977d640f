"""The wall clock of a step, divided among kinds of work."""

from __future__ import annotations

import asyncio
import time

import pytest

from vlmrl.runs.bench.activity import (
    DRAWING,
    ENGINE_GOES_ON,
    ENGINE_WAITS,
    RENDERING,
    SAMPLING,
    TASK,
    Activity,
    TimedThreads,
    difference,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def play(activity: Activity, clock: Clock) -> dict[str, float]:
    """Two rollouts: one samples from second 0 to 6, the other renders from 1 to 3, plays from 2 to 4 and samples from
    4 to 7. From 7 to 9 nothing goes on."""
    changes = [
        (0, activity.begin, SAMPLING),
        (1, activity.begin, RENDERING),
        (2, activity.begin, TASK),
        (3, activity.end, RENDERING),
        (4, activity.end, TASK),
        (4, activity.begin, SAMPLING),
        (6, activity.end, SAMPLING),
        (7, activity.end, SAMPLING),
    ]
    for second, change, kind in changes:
        clock.now = float(second)
        change(kind)
    clock.now = 9.0
    return {kind: seconds for kind, seconds in activity.seconds().items() if seconds}


def test_an_engine_that_waits_for_every_rollout() -> None:
    clock = Clock()
    assert play(Activity(ENGINE_WAITS, clock), clock) == {TASK: 2.0, RENDERING: 1.0, SAMPLING: 4.0}


def test_an_engine_that_goes_on() -> None:
    clock = Clock()
    activity = Activity(ENGINE_GOES_ON, clock)
    before = activity.seconds()
    assert play(activity, clock) == {SAMPLING: 7.0}
    assert difference(activity.seconds(), before)[SAMPLING] == 7.0


def test_what_the_trainer_waits_for() -> None:
    """It waits from second 3 to 5, of which one second belongs to the task."""
    clock = Clock()
    activity = Activity(ENGINE_WAITS, clock)
    activity.begin(SAMPLING)
    activity.begin(TASK)
    clock.now = 3.0
    with activity.trainer_waits():
        clock.now = 4.0
        activity.end(TASK)
        clock.now = 5.0
    clock.now = 7.0
    assert {kind: each for kind, each in activity.awaited().items() if each} == {TASK: 1.0, SAMPLING: 1.0}
    assert {kind: each for kind, each in activity.seconds().items() if each} == {TASK: 4.0, SAMPLING: 3.0}


def test_problems_that_are_drawn_in_threads() -> None:
    activity = Activity(ENGINE_GOES_ON)

    def slow() -> int:
        time.sleep(0.05)
        return 3

    async def draw() -> int:
        return await TimedThreads(activity).run(slow)

    assert asyncio.run(draw()) == 3
    found = activity.seconds()
    assert found[DRAWING] >= 0.05
    assert sum(found.values()) == pytest.approx(found[DRAWING])
