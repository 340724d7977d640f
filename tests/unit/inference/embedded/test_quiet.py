"""The quiet time before a batch, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from vlmrl.inference.embedded.quiet import QuietTime


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose timers wait for `move`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Let the time pass, and let the timers that are due run."""
        self.now += seconds
        self.run_until_complete(asyncio.sleep(0))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def begun(clock: Clock, quiet: QuietTime, missing: float = 0.0) -> Callable[[], None]:
    async def begin() -> None:
        quiet.begin(missing)

    return lambda: clock.run_until_complete(begin())


@pytest.mark.parametrize(
    ("batch_s", "missing", "quiet_s"), [(0.0, 1.0, 0.002), (1.0, 0.0, 0.02), (1.0, 0.5, 0.145), (10.0, 1.0, 2.7)]
)
def test_a_batch_starts_after_a_share_of_the_last_one(
    clock: Clock, batch_s: float, missing: float, quiet_s: float
) -> None:
    runs: list[float] = []
    quiet = QuietTime(lambda: runs.append(clock.now))
    quiet.note_batch(batch_s)
    begun(clock, quiet, missing)()
    clock.move(quiet_s * 0.99)
    assert runs == []
    clock.move(quiet_s * 0.02)
    assert runs == [pytest.approx(quiet_s * 1.01)]
    clock.close()


def test_each_request_begins_it_again_up_to_a_limit(clock: Clock) -> None:
    runs: list[float] = []
    quiet = QuietTime(lambda: runs.append(clock.now))
    quiet.note_batch(1.0)
    request = begun(clock, quiet)
    while not runs:
        request()
        clock.move(0.015)
    assert runs == [pytest.approx(0.51)]  # half of the last batch, and up to one step of this test
    clock.close()


def test_stop_forgets_the_requests(clock: Clock) -> None:
    runs: list[float] = []
    quiet = QuietTime(lambda: runs.append(clock.now))
    begun(clock, quiet)()
    quiet.stop()
    clock.move(1.0)
    assert runs == []
    clock.close()
