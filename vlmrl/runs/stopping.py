"""How a run is asked to stop: it finishes its step, saves and ends.

first Ctrl-C or SIGTERM; of a Slurm job SIGUSR1 and SIGUSR2 too ─▶ Stop
second ─▶ the process ends at once; of a Slurm job only by Ctrl-C, for Slurm and srun may each pass on the same wish
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vlmrl.ranks import slurm
from vlmrl.ranks.rank_group import RankGroup


class Stop(asyncio.Event):
    """Set when the run is asked to stop."""

    number: int | None = None
    """The signal that asked."""
    handler_before: Any = None
    """Who held that signal before the run did."""

    def requeue(self) -> None:
        """Where the signal asks for it, put the Slurm job back into the queue. Raises VlmrlError where that fails."""
        if self.number in slurm.QUEUE_SIGNALS:
            slurm.requeue(self.number, self.handler_before)


@contextmanager
def asked_to_stop(warn: Callable[[str], None]) -> Iterator[Stop]:
    """What the first signal sets; see the top of the file."""
    stop, loop = Stop(), asyncio.get_running_loop()
    is_slurm = slurm.in_step()
    numbers = (signal.SIGINT, signal.SIGTERM, *(slurm.QUEUE_SIGNALS if is_slurm else ()))

    def ask() -> None:
        warn("Asked to stop: the step in progress is finished and saved. A second Ctrl-C ends the run at once.")
        stop.set()

    def first(number: int, frame: FrameType | None) -> None:
        stop.number, stop.handler_before = number, before[number]
        for each in numbers:
            signal.signal(each, signal.SIG_IGN if is_slurm and each != signal.SIGINT else end_at_once)
        loop.call_soon_threadsafe(ask)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, first)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is first:
                signal.signal(number, handler)


@contextmanager
def rank_lost(group: RankGroup | None) -> Iterator[asyncio.Event]:
    """An event that is set when a rank of `group` has ended before its time."""
    lost, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(lost.set)

    if group is not None:
        group.on_lost(tell)
    yield lost
    if group is not None:
        group.on_lost(None)


async def stopped_before(work: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Wait for `work` or for `stop`; whether it was `stop`. Then the work is cancelled and over."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if work.done():
        return False
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return True


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The second signal. Nothing is waited for: the disk is in order at every moment, and servers and services that the
    run started end by themselves when it is gone."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor, which the live view hides
    os.write(sys.stderr.fileno(), b"ended at once\n")
    os._exit(1)
