"""Signals that ask a run to stop, and those that end it at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from vlmrl.runs import stopping
from vlmrl.runs.stopping import SAVE_SIGNALS, Stop, ignore_the_launcher, stopping_on_signals

URGENT = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def ended_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that would have ended the process at once; handlers are as before after the test."""
    ended: list[int] = []
    before = {number: signal.getsignal(number) for number in (*URGENT, *SAVE_SIGNALS)}
    monkeypatch.setattr(stopping, "end_at_once", lambda number, frame: ended.append(number))
    yield ended
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped_by(*numbers: signal.Signals) -> tuple[Stop, list[str]]:
    """The event and the warnings after these signals have come."""
    stop, said = Stop(), list[str]()

    async def run() -> None:
        with stopping_on_signals(stop, said.append):
            for number in numbers:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.001)

    asyncio.run(run())
    return stop, said


@pytest.mark.parametrize("number", [*URGENT, *SAVE_SIGNALS])
def test_the_first_signal_stops(number: signal.Signals, ended_at_once: list[int]) -> None:
    stop, said = stopped_by(number)
    assert stop.is_set()
    assert stop.number == number
    assert len(said) == 1
    assert ended_at_once == []
    if number in SAVE_SIGNALS:
        assert signal.getsignal(number) is signal.SIG_IGN, "it may come again until the process has ended"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (*URGENT, *SAVE_SIGNALS)]
    stopped_by()
    assert [signal.getsignal(number) for number in (*URGENT, *SAVE_SIGNALS)] == before


def test_a_launcher_does_not_cut_the_reason_short() -> None:
    async def run() -> None:
        with stopping_on_signals(Stop(), print):
            ignore_the_launcher()

    asyncio.run(run())
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process


@pytest.mark.parametrize("number", SAVE_SIGNALS)
def test_such_a_signal_may_come_often(number: signal.Signals, ended_at_once: list[int]) -> None:
    stop, said = stopped_by(number, number, number, signal.SIGTERM)
    assert stop.number == number
    assert len(said) == 1
    assert ended_at_once == [], "a terminal that goes away sends SIGHUP, and systemd SIGTERM after it"


@pytest.mark.parametrize("first", URGENT)
@pytest.mark.parametrize("second", URGENT)
def test_the_second_urgent_signal_ends_at_once(
    first: signal.Signals, second: signal.Signals, ended_at_once: list[int]
) -> None:
    stopped_by(first, second)
    assert ended_at_once == [second]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_there_is_no_queue_outside_of_slurm(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    stop, _ = stopped_by(number)
    stop.requeue()  # does nothing; it would ask for the job's number


def test_nohup_and_the_handler_of_a_library_stay() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    stop, _ = stopped_by(signal.SIGHUP, signal.SIGUSR1)
    assert not stop.is_set()
    assert seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
