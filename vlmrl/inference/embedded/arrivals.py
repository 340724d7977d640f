"""Requests of the embedded engine that wait for a batch, and those that enter one that runs.

    event loop   add ──▶ waiting                            set the futures ◀── close, at the end of the batch
                            │ waiting, enter                        ▲
    batch                   └──▶ rows ── ended ──▶ held ────────────┘ at each reading, while other rows go on

The last completions of a batch are handed over when it has ended: then the last session may close, and the trainer
starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from vlmrl.inference.embedded.requests import Request
from vlmrl.models.attention.prefix_tree import sort_key
from vlmrl.types import Completion

ENTER_SHARE = 0.125
"""Requests enter where they are at least this share of the rows that are being decoded: each entry is a pass of prefill
and lays out all rows anew."""


class AskedSession(Protocol):
    """What a session of the engine notes."""

    missed_since: float


@dataclass(eq=False)
class Pending:
    """A request that waits for its completion, and the future that gets it."""

    session: AskedSession
    request: Request
    future: asyncio.Future[Completion]

    def settle(self, completion: Completion | None, error: BaseException | None = None) -> None:
        """Hand over a completion, or an error. A cancelled request gets nothing."""
        self.session.missed_since = time.monotonic()
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            assert completion is not None
            self.future.set_result(completion)


def in_order(pending: Sequence[Pending]) -> list[Pending]:
    """Sorted by content: the order of arrival depends on threads, and the order of rows changes the last bit."""
    return sorted(pending, key=lambda p: (sort_key(p.request.prompt.token_ids), p.request.sampling.seed))


class Arrivals:
    """Requests beside a batch that runs; implements `Intake`."""

    def __init__(self, batch: Sequence[Pending], loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = loop, Lock()
        self._waiting: list[Pending] = []
        self._open = {id(pending.request): pending for pending in batch}
        """By the id of the request: those that the batch samples."""
        self._entered: set[int] = set()
        """Of these, the ids of those that have entered later."""
        self._held: list[tuple[Pending, Completion]] = []

    def add(self, pending: Pending) -> None:
        """Have a request wait for its turn to enter."""
        with self._lock:
            self._waiting.append(pending)

    def close(self, error: BaseException | None) -> list[Pending]:
        """At the end of the batch: hand over what is held → the requests that have not entered. With an `error`, all
        requests of the batch get it."""
        with self._lock:
            for pending, completion in self._held:
                pending.settle(completion)
            if error is not None:
                for pending in self._open.values():
                    pending.settle(None, error)
            return self._waiting

    def waiting(self, running: int) -> list[Request]:
        with self._lock:
            if running:
                self._hand_over()
            self._waiting = in_order([pending for pending in self._waiting if not pending.future.done()])
            if len(self._waiting) < ENTER_SHARE * running:
                return []
            return [pending.request for pending in self._waiting]

    def enter(self, requests: Sequence[Request]) -> None:
        chosen = {id(request) for request in requests}
        with self._lock:
            self._hand_over()
            entering = [pending for pending in self._waiting if id(pending.request) in chosen]
            self._waiting = [pending for pending in self._waiting if id(pending.request) not in chosen]
            self._open |= {id(pending.request): pending for pending in entering}
            self._entered |= chosen

    def ended(self, request: Request, completion: Completion) -> None:
        with self._lock:
            self._held.append((self._open.pop(id(request)), completion))
            self._entered.discard(id(request))

    def withdraw(self) -> bool:
        with self._lock:
            self._waiting += [self._open.pop(number) for number in self._entered]
            found, self._entered = bool(self._entered), set()
            return found

    def _hand_over(self) -> None:
        held, self._held = self._held, []
        if held:
            self._loop.call_soon_threadsafe(_settle, held)


def _settle(held: Sequence[tuple[Pending, Completion]]) -> None:
    for pending, completion in held:
        pending.settle(completion)
