"""Whether a process at the other end of a connection is still alive: it says so every few seconds.

    Beats(send, …)      a thread that calls `send` every BEAT_S seconds
    Watch(…)            a thread that counts the seconds since `heard` was called, and reports a silence

A thread says so, not the work itself, so a process that compiles, writes a checkpoint or computes a long step is heard.
A process that is stopped (SIGSTOP), swapped out, or on a host that hangs is not. Seconds in which this process did not
run itself do not count: when a whole job is suspended and continued, no rank takes the others for dead.

A beat also says where the work stands (`Standing`), so that a rank whose work hangs while its threads live is found.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

BEAT_S = 5.0
"""Seconds between two beats."""

SILENCE_LIMIT_S = 60.0
"""Seconds without a beat after which a process counts as hanging."""

STANDSTILL_LIMIT_S = 1800.0
"""Seconds that one instruction of a command may take. torch.distributed lets ranks wait as long for each other."""

SHOWN_FRAMES = 3
"""Innermost frames that a message quotes."""


@dataclass(frozen=True)
class Standing:
    """Where a rank works."""

    where: str
    """The innermost frames, `loss.py:12 in my_loss, called at …`."""
    seconds: float
    """How long it has been at the same instruction."""
    waits: bool
    """Whether it waits for another rank in torch.distributed."""


class Pace:
    """Follows the main thread from beat to beat."""

    def __init__(self) -> None:
        self._stack: tuple[tuple[object, int], ...] = ()
        self._seconds = 0.0

    def standing(self) -> Standing:
        """Call it every `BEAT_S` seconds."""
        frames = _frames(sys._current_frames().get(threading.main_thread().ident or 0))
        stack = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        self._seconds = self._seconds + BEAT_S if stack == self._stack else 0.0
        self._stack = stack
        places = [
            f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
            for frame in frames[:SHOWN_FRAMES]
        ]
        waits = any("/torch/distributed/" in frame.f_code.co_filename for frame in frames)
        return Standing(", called at ".join(places), self._seconds, waits)


class Beats:
    """Calls `send` every `BEAT_S` seconds until `stop` or until it raises OSError (the other process has ended)."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        with suppress(OSError):
            while not self._stopped.wait(BEAT_S):
                self._send()


class Watch:
    """Calls `on_silence` once when `heard` was not called for `SILENCE_LIMIT_S` seconds in which this process ran."""

    def __init__(self, on_silence: Callable[[], None]) -> None:
        self._on_silence = on_silence
        self._silent_s = 0.0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def heard(self) -> None:
        self._silent_s = 0.0

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        tick = min(1.0, SILENCE_LIMIT_S / 10)
        while not self._stopped.wait(tick):
            self._silent_s += tick
            if self._silent_s > SILENCE_LIMIT_S:
                self._on_silence()
                return


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames
