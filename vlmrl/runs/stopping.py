"""Signals that ask a run to stop: it finishes its step, saves and ends.

    first Ctrl-C or SIGTERM (in a Slurm job SIGUSR1 and SIGUSR2 too)   Stop is set
    second Ctrl-C or SIGTERM                                           the process ends at once

In a Slurm job only a second Ctrl-C ends the process at once: Slurm and srun may both pass on the same signal.
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
    """Set when the run is to stop."""

    number: int | None = None
    """The number of the signal; None until there was one."""
    handler_before: Any = None
    """The handler that the signal had before the run installed its own."""

    def requeue(self) -> None:
        """Put the Slurm job back into the queue if the signal was one of the queue's. Raises VlmrlError if Slurm
        refuses."""
        if self.number in slurm.QUEUE_SIGNALS:
            slurm.requeue(self.number, self.handler_before)


@contextmanager
def stopping_on_signals(stop: Stop, warn: Callable[[str], None]) -> Iterator[None]:
    """Handle the signals (see the top of this file) inside the block; the first one sets `stop`."""
    loop = asyncio.get_running_loop()
    is_slurm = slurm.in_step()
    numbers = (signal.SIGINT, signal.SIGTERM, *(slurm.QUEUE_SIGNALS if is_slurm else ()))

    def set_stop() -> None:
        warn("Asked to stop: the step in progress is finished and saved. A second Ctrl-C ends the run at once.")
        stop.set()

    def first(number: int, frame: FrameType | None) -> None:
        stop.number, stop.handler_before = number, before[number]
        for each in numbers:
            signal.signal(each, signal.SIG_IGN if is_slurm and each != signal.SIGINT else end_at_once)
        loop.call_soon_threadsafe(set_stop)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is first:
                signal.signal(number, handler)


@contextmanager
def rank_lost(rank_group: RankGroup | None) -> Iterator[asyncio.Event]:
    """An event that is set when another rank of `rank_group` ends before the run does. Never set without one."""
    lost, loop = asyncio.Event(), asyncio.get_running_loop()

    def set_lost() -> None:
        loop.call_soon_threadsafe(lost.set)

    if rank_group is not None:
        rank_group.on_lost(set_lost)
    yield lost
    if rank_group is not None:
        rank_group.on_lost(None)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process on the second signal, without waiting for anything.

    The files on disk are complete at every moment. Servers and services that the run started end by themselves when
    this process is gone.
    """
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # show the cursor, which the live view hides
    os.write(sys.stderr.fileno(), b"ended at once\n")
    os._exit(1)
