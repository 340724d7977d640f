"""Which groups play at the same time: the bound, the order, and what a cancelled group leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrl.orchestrator.admission import Admission, Place


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_group_begins_when_as_many_rollouts_have_ended_as_it_has() -> None:
    async def scenario() -> None:
        admission = Admission(6)
        places = [admission.place(1, group, 2) for group in range(5)]
        entering = [asyncio.create_task(place.enter()) for place in places]
        await turns()
        assert [task.done() for task in entering] == [True, True, True, False, False]
        places[0].leave(entering[0])
        await turns()
        assert not entering[3].done(), "one of two rollouts has ended"
        places[2].leave(entering[2])
        await turns()
        assert [task.done() for task in entering] == [True, True, True, True, False]
        for place in places[:3]:
            place.leave(entering[0])
        await turns()
        assert entering[4].done()

    run(scenario)


def test_groups_of_earlier_steps_come_first_also_those_that_are_played_in_addition() -> None:
    async def scenario() -> None:
        admission = Admission(1)
        order: list[tuple[int, int]] = []

        async def play(step: int, group: int) -> None:
            place = admission.place(step, group, 1)
            await place.enter()
            order.append((step, group))
            await turns(1)
            admission.give(1)

        async with asyncio.TaskGroup() as playing:
            for step, group in [(1, 0), (3, 0), (2, 1), (2, 0), (3, 1), (1, 7)]:
                playing.create_task(play(step, group))
        assert order == [(1, 0), (1, 7), (2, 0), (2, 1), (3, 0), (3, 1)]

    run(scenario)


def test_a_cancelled_group_takes_no_place_with_it() -> None:
    """Cancelled while it waits, and in the turn of the event loop in which it was admitted."""

    async def scenario() -> None:
        admission = Admission(2)
        first, waiting, last = (admission.place(1, group, 2) for group in range(3))
        await first.enter()
        gone = asyncio.create_task(waiting.enter())
        await turns()
        gone.cancel()
        await turns()
        assert gone.cancelled()
        admitted = asyncio.create_task(last.enter())
        await turns()
        admission.give(2)  # admits the last group, whose task has not run since
        admitted.cancel()
        await turns()
        assert admitted.cancelled()
        again = admission.place(2, 0, 2)
        await asyncio.wait_for(again.enter(), 1)

    run(scenario)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 12))
def test_no_more_rollouts_play_than_the_limit_and_every_group_plays(seed: int, size: int, groups: int) -> None:
    random = np.random.default_rng(seed)
    limit = size * int(random.integers(1, 4))
    playing = most = 0
    began: list[int] = []

    async def scenario() -> None:
        admission = Admission(limit)

        async def rollout(place: Place) -> None:
            nonlocal playing, most
            playing += 1
            most = max(most, playing)
            await turns(int(random.integers(0, 9)))
            playing -= 1

        async def play(group: int) -> None:
            place = admission.place(1, group, size)
            await place.enter()
            began.append(group)
            async with asyncio.TaskGroup() as siblings:
                for _ in range(size):
                    siblings.create_task(rollout(place)).add_done_callback(place.leave)

        async with asyncio.TaskGroup() as all_groups:
            for group in range(groups):
                all_groups.create_task(play(group))

    run(scenario)
    assert began == list(range(groups))
    assert most <= limit
