"""A connection between two ranks that have met, and what goes over it besides commands."""

from __future__ import annotations

import os
import queue
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vlmrl.ranks.heartbeat import Beats, Standing, Watch
from vlmrl.ranks.meeting import Peer
from vlmrl.ranks.messages import Outbox


@dataclass(frozen=True)
class Beat:
    """A process lives. From a rank other than 0: where its command stands; None between commands."""

    standing: Standing | None = None


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    result: Any


@dataclass(frozen=True)
class Failure:
    """Why a rank ends."""

    reason: str
    is_second_hand: bool
    """Whether another rank may have caused it."""


@dataclass(eq=False)
class Link:
    """The connection to one other rank. Ranks other than 0 have one, to rank 0."""

    peer: Peer
    outbox: Outbox
    sending: threading.Lock = field(default_factory=threading.Lock)
    answers: queue.SimpleQueue[tuple[bool, Any]] = field(default_factory=queue.SimpleQueue)
    """(True, the answer) or (False, why the rank is lost)."""
    reader: threading.Thread | None = None
    beats: Beats | None = None
    watch: Watch | None = None
    standing: Standing | None = None
    """Where the rank said last that it works."""

    def __str__(self) -> str:
        return f"rank {self.peer.rank} (process {self.peer.pid} on {self.peer.host})"

    def send(self, message: object) -> None:
        """Send a message to another rank, or an answer to rank 0."""
        with self.sending:
            self.outbox.send(message)

    def beat(self, standing: Standing | None = None) -> None:
        """Send a beat, unless a message is on its way, which is one too."""
        if self.sending.acquire(blocking=False):
            try:
                self.outbox.send(Beat(standing))
            finally:
                self.sending.release()

    def kill(self) -> None:
        """Kill the process at the other end if it is on this host."""
        if self.peer.is_here:
            with suppress(ProcessLookupError):
                os.kill(self.peer.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop beating and watching."""
        for each in (self.beats, self.watch):
            if each is not None:
                each.stop()
