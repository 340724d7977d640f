"""Run the task's code in threads. `vlmrl.tasks.border` checks what it returns.

    event loop ─▶ TaskThreads.run(partial(step_env, env, text)) ─▶ daemon thread ─▶ Reply or TaskCodeError

The task's code may block, hang or raise. None of these stops the event loop or another rollout.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from vlmrl.errors import UserFault, fenced
from vlmrl.tasks.border import TaskCodeError

T = TypeVar("T")

TASK_THREADS = 32
"""How many calls of the task's code may run at the same time."""

TASK_THREAD_PATIENCE_S = 0.01
"""Seconds after which other threads take over the remaining calls of a round."""

Calls: TypeAlias = deque[tuple[Callable[[], Any], asyncio.Future[Any]]]
"""Calls of one round that no thread has taken yet, each with the future of its result."""


class TaskThreads:
    """Runs the task's code, which may block, outside the event loop.

    Calls made in the same round of the event loop (siblings whose completions came in one batch) go to one thread,
    because a switch to a thread and back costs more than one step of a fast env. If that thread has not finished after
    `TASK_THREAD_PATIENCE_S`, the env is slow, and one further thread per remaining call starts, up to `TASK_THREADS`.

    The threads are daemons, which the standard library's pools do not offer: code that hangs must not keep an
    interrupted run from ending.
    """

    def __init__(self) -> None:
        self._waiting: Calls = deque()
        self._busy = 0
        self._queue: deque[Calls] = deque()  # rounds that wait for a free thread

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Return the future result of `call`. An exception in `call` becomes a `TaskCodeError`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._start_round)
        self._waiting.append((call, future))
        return future

    def _start_round(self) -> None:
        calls, self._waiting = self._waiting, deque()
        self._start_thread(calls)
        asyncio.get_running_loop().call_later(TASK_THREAD_PATIENCE_S, self._add_threads, calls)

    def _add_threads(self, calls: Calls) -> None:
        for _ in range(min(len(calls), TASK_THREADS)):
            self._start_thread(calls)

    def _start_thread(self, calls: Calls) -> None:
        """Start a thread that works on `calls`, or queue them until one of `TASK_THREADS` is free."""
        if self._busy == TASK_THREADS:
            self._queue.append(calls)
            return
        self._busy += 1
        loop = asyncio.get_running_loop()

        def work() -> None:
            outcomes = _take_and_run(calls)
            with contextlib.suppress(RuntimeError):  # the run was interrupted and its event loop is closed
                loop.call_soon_threadsafe(deliver, outcomes)

        def deliver(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
            self._busy -= 1
            for future, outcome in outcomes:
                if future.done():  # cancelled in the meantime
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            if calls:
                self._queue.append(calls)
            if self._queue:
                self._start_thread(self._queue.popleft())

        threading.Thread(target=work, name="task", daemon=True).start()


def _take_and_run(calls: Calls) -> list[tuple[asyncio.Future[Any], Any]]:
    """Take calls and run them until none is left or `TASK_THREAD_PATIENCE_S` has passed, so that results which are
    ready are delivered."""
    until = time.monotonic() + TASK_THREAD_PATIENCE_S
    outcomes: list[tuple[asyncio.Future[Any], Any]] = []
    while calls and (not outcomes or time.monotonic() < until):
        try:
            call, future = calls.popleft()
        except IndexError:  # another thread took the last one
            break
        outcomes.append((future, _result_or_error(call)))
    return outcomes


def _result_or_error(call: Callable[[], Any]) -> Any:
    try:
        with fenced("the task", TaskCodeError):
            return call()
    except UserFault as fault:
        return fault
