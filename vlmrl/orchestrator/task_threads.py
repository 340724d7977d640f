"""Run the task's code in threads. `vlmrl.tasks.border` checks what it returns.

    event loop ─▶ TaskThreads.run(partial(step_env, env, text)) ─▶ daemon thread ─▶ Reply or TaskCodeError

The task's code may block, hang or raise. None of these stops the event loop or another rollout. The fence around the
task's code is in `vlmrl.tasks.border`, so an exception that is no `UserFault` is a bug of ours and ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

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
        """Return the future result of `call`. An exception in `call` becomes the future's: a `UserFault` where the
        user's code failed behind its fence, and any other one is a bug of ours, which ends the run."""
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
        loop = asyncio.get_running_loop()
        taken = _Taken()

        def work() -> None:
            try:
                taken.work_on(calls)
            finally:  # whatever ends this thread, the calls that it took are answered
                with contextlib.suppress(RuntimeError):  # the run was interrupted and its event loop is closed
                    loop.call_soon_threadsafe(deliver)

        def deliver() -> None:
            self._busy -= 1
            taken.deliver()
            if calls:
                self._queue.append(calls)
            if self._queue:
                self._start_thread(self._queue.popleft())

        try:
            threading.Thread(target=work, name="task", daemon=True).start()
        except RuntimeError as error:  # the system has no room for another thread
            if self._busy:
                self._queue.append(calls)  # a busy one takes over
            while calls and not self._busy:
                _answer(calls.popleft()[1], error)
            return
        self._busy += 1


class _Taken:
    """The calls that one thread has taken, and their outcomes: a result, or the exception."""

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[Any]] = []
        self._outcomes: list[Any] = []

    def work_on(self, calls: Calls) -> None:
        """Take calls and run them until none is left or `TASK_THREAD_PATIENCE_S` has passed, so that results which are
        ready are delivered."""
        until = time.monotonic() + TASK_THREAD_PATIENCE_S
        while calls and (not self._futures or time.monotonic() < until):
            try:
                call, future = calls.popleft()
            except IndexError:  # another thread took the last one
                break
            self._futures.append(future)
            try:
                self._outcomes.append(call())
            except BaseException as error:  # noqa: BLE001 — it is raised where the result is awaited
                self._outcomes.append(error)

    def deliver(self) -> None:
        """Set the futures, in the thread of the event loop."""
        lost = RuntimeError("the thread that ran the task's code ended before its result")
        missing = len(self._futures) - len(self._outcomes)
        for future, outcome in zip(self._futures, [*self._outcomes, *[lost] * missing], strict=True):
            _answer(future, outcome)


def _answer(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():  # cancelled in the meantime
        return
    if isinstance(outcome, StopIteration):  # a future refuses it
        outcome = RuntimeError(repr(outcome))
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
