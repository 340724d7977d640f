"""Run the task's code in threads. `vlmrl.tasks.border` checks what it returns.

    event loop ─▶ TaskThreads.run(call) ─▶ daemon thread ─▶ result or TaskCodeError

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
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from vlmrl.errors import TaskError

T = TypeVar("T")

TASK_THREADS = 32
"""How many calls of the task's code may run at the same time."""

TASK_THREAD_PATIENCE_S = 0.01
"""Seconds after which other threads take over the remaining calls of a round."""


@dataclass(eq=False)
class Call(Generic[T]):
    """One call of the task's code."""

    function: Callable[[], T]
    future: asyncio.Future[T]
    """Its result. Done when the call has returned, however long that takes: wait for it with `asyncio.wait`, because to
    await it would cancel it with the waiting task."""
    queued: float
    """`time.monotonic()` when it was made."""
    started: float | None = None
    """`time.monotonic()` when a thread took it."""
    ended: float | None = None
    """`time.monotonic()` when it returned."""
    outcome: Any = None
    """What it returned or raised."""
    is_given_up: bool = False
    """Whether nothing waits for it any more."""


Calls: TypeAlias = deque[Call[Any]]
"""Calls of one round that no thread has taken yet."""


class TaskThreads:
    """Runs the task's code, which may block, outside the event loop.

    Calls made in the same round of the event loop (siblings whose completions came in one batch) go to one thread,
    because a switch to a thread and back costs more than one step of a fast env. If that thread has not finished after
    `TASK_THREAD_PATIENCE_S`, the env is slow, and one further thread per remaining call starts, up to `TASK_THREADS`.

    The threads are daemons, which the standard library's pools do not offer: code that hangs must not keep an
    interrupted run from ending. A call that never returns costs its thread. When the last thread is lost, every call
    that waits for one gets a `TaskError`.
    """

    def __init__(self) -> None:
        self._waiting: Calls = deque()
        self._busy = 0
        self._lost = 0  # threads whose call was given up
        self._queue: deque[Calls] = deque()  # rounds that wait for a free thread

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Return the future result of `call`. An exception in it becomes the future's: a `UserFault` where the user's
        code failed behind its fence, and any other one is a bug of ours, which ends the run."""
        return self.begin(call).future

    def begin(self, call: Callable[[], T]) -> Call[T]:
        """The same as `run`, with the times of the call."""
        loop = asyncio.get_running_loop()
        begun = Call(call, loop.create_future(), queued=time.monotonic())
        if not self._waiting:
            loop.call_soon(self._start_round)
        self._waiting.append(begun)
        return begun

    def give_up(self, call: Call[Any]) -> None:
        """Stop waiting for a call that has started. Its thread is lost until the call returns."""
        assert call.started is not None
        assert not call.future.done()
        call.is_given_up = True
        self._lost += 1
        while self._lost == TASK_THREADS and self._queue:
            self._refuse(self._queue.popleft())

    def _start_round(self) -> None:
        calls, self._waiting = self._waiting, deque()
        self._start_thread(calls)
        asyncio.get_running_loop().call_later(TASK_THREAD_PATIENCE_S, self._add_threads, calls)

    def _add_threads(self, calls: Calls) -> None:
        for _ in range(min(len(calls), TASK_THREADS)):
            self._start_thread(calls)

    def _start_thread(self, calls: Calls) -> None:
        """Start a thread that works on `calls`, or queue them until one of `TASK_THREADS` is free."""
        if self._lost == TASK_THREADS:
            self._refuse(calls)
            return
        if self._busy == TASK_THREADS:
            self._queue.append(calls)
            return
        loop = asyncio.get_running_loop()
        taken = _Taken(until=time.monotonic() + TASK_THREAD_PATIENCE_S)

        def work() -> None:
            try:
                taken.work_on(calls)
            finally:  # whatever ends this thread, the calls that it took are answered
                with contextlib.suppress(RuntimeError):  # the run was interrupted and its event loop is closed
                    loop.call_soon_threadsafe(end)

        def end() -> None:
            self._busy -= 1
            self._lost -= taken.end()
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
                _answer(calls.popleft().future, error)
            return
        self._busy += 1
        # A call that hangs must not keep the results of those that its thread took before it.
        loop.call_later(TASK_THREAD_PATIENCE_S, taken.deliver)

    def _refuse(self, calls: Calls) -> None:
        error = TaskError(
            f"{TASK_THREADS} calls of the task's code have not returned within task.timeout_s, so no thread is left "
            "to call it: set task.workers=process, whose workers are replaced when they hang, or make the calls return"
        )
        while calls:
            _answer(calls.popleft().future, error)


class _Taken:
    """The calls that one thread has taken."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._calls: list[Call[Any]] = []

    def work_on(self, calls: Calls) -> None:
        """Take calls and run them until none is left or `TASK_THREAD_PATIENCE_S` has passed, so that results which are
        ready are delivered."""
        while calls and (not self._calls or time.monotonic() < self._until):
            try:
                call = calls.popleft()
            except IndexError:  # another thread took the last one
                break
            self._calls.append(call)
            call.started = time.monotonic()
            try:
                call.outcome = call.function()
            except BaseException as error:  # noqa: BLE001 — it is raised where the result is awaited
                call.outcome = error
            call.ended = time.monotonic()

    def deliver(self) -> None:
        """Set the futures of the calls that have returned, in the thread of the event loop."""
        for call in self._calls:
            if call.ended is not None:
                _answer(call.future, call.outcome)

    def end(self) -> bool:
        """Set the futures of all calls, once the thread has ended. Returns whether one of them had been given up."""
        self.deliver()
        for call in self._calls:
            _answer(call.future, RuntimeError("the thread that ran the task's code ended before its result"))
        return any(call.is_given_up for call in self._calls)


def _answer(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():  # delivered before, or cancelled in the meantime
        return
    if isinstance(outcome, StopIteration):  # a future refuses it
        outcome = RuntimeError(repr(outcome))
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
