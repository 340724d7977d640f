"""Signals that ask a run to stop: it finishes its step, saves and ends.

    first Ctrl-C or SIGTERM                  Stop is set
    second Ctrl-C or SIGTERM                 the process ends at once
    SIGHUP, SIGQUIT, SIGXCPU, SIGUSR1 and 2  Stop is set; however often they come, the process is not ended at once

The last line is for terminals that go away (a shell may send several SIGHUP), limits on processor time (SIGXCPU comes
every second) and batch systems. Such a signal stays as it is where the process was started with it ignored (nohup) or
where a library has a handler for it. In a Slurm job SIGUSR1 and SIGUSR2 also put the job back into the queue, and only
a second Ctrl-C ends the process at once: Slurm and srun may both pass on the same signal.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from vlmrl.ranks import slurm
from vlmrl.ranks.rank_group import RankGroup

SAVE_SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that set `Stop` and never end the process at once. By default they end it without saving."""


class Stop(asyncio.Event):
    """Set when the run is to stop."""

    number: int | None = None
    """The number of the signal; None until there was one."""
    handler_before: Any = None
    """The handler that the signal had before the run installed its own."""

    def requeue(self) -> None:
        """Put the Slurm job back into the queue if the signal was one of the queue's. Raises VlmrlError if Slurm
        refuses."""
        if slurm.in_step() and self.number in slurm.QUEUE_SIGNALS:
            slurm.requeue(self.number, self.handler_before)


@contextmanager
def stopping_on_signals(stop: Stop, warn: Callable[[str], None], saves: bool = True) -> Iterator[None]:
    """Handle the signals (see the top of this file) inside the block; the first one sets `stop`. `saves`: whether the
    block makes steps, and saves the last one before it ends."""
    loop = asyncio.get_running_loop()
    is_slurm = slurm.in_step()
    queue_signals = slurm.QUEUE_SIGNALS if is_slurm else ()
    free = [number for number in SAVE_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    urgent = (signal.SIGINT, signal.SIGTERM)

    def set_stop() -> None:
        what = "the step in progress is finished and saved" if saves else "what was recorded is kept"
        warn(f"Asked to stop: {what}. A second Ctrl-C ends the run at once.")
        stop.set()

    def first(number: int, frame: FrameType | None) -> None:
        if stop.number is None:
            stop.number, stop.handler_before = number, before[number]
            loop.call_soon_threadsafe(set_stop)
        if is_slurm:
            for each in (signal.SIGTERM, *queue_signals):
                signal.signal(each, signal.SIG_IGN)
            signal.signal(signal.SIGINT, end_at_once)
        elif number in urgent:
            for each in urgent:
                signal.signal(each, end_at_once)

    before = {number: signal.getsignal(number) for number in dict.fromkeys((*urgent, *queue_signals, *free))}
    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is first:
                was_taken = stop.number is not None and number in SAVE_SIGNALS  # it may come again until the very end
                signal.signal(number, signal.SIG_IGN if was_taken else handler)


def ignore_the_launcher() -> None:
    """Ignore SIGTERM until the process ends. torchrun sends it when it has seen another rank end, while this rank still
    has to write down why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
    with suppress(OSError):  # the terminal may be gone
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # show the cursor, which the live view hides
        os.write(2, b"ended at once\n")
    os._exit(1)
