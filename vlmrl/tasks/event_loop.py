"""The event loop for coroutines of the user's task: `async def reset`, `step` and `close` of an env.

    thread of the run ─▶ InTaskLoop(coroutine) ─▶ daemon thread "task loop", one event loop for all envs ─▶ future

All envs of a process share one loop, so they can share what belongs to a loop: an HTTP session, a browser. It is not
the loop of the run, so a coroutine that blocks (`time.sleep`) holds up the other coroutines of the task and nothing
else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LOCK = threading.Lock()
_LOOPS: list[asyncio.AbstractEventLoop] = []
"""The loop, once the first coroutine has started."""


class InTaskLoop(Generic[T]):
    """A coroutine that runs in the loop of the tasks."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()
        """Done when the coroutine has ended, also after `cancel`: what runs after it never meets it."""
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._loop = _task_loop()
        self._loop.call_soon_threadsafe(self._begin)

    def cancel(self) -> None:
        """Cancel the coroutine, from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.future.set_exception(RuntimeError("the coroutine was cancelled"))
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())


def _task_loop() -> asyncio.AbstractEventLoop:
    with _LOCK:
        if not _LOOPS:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="task loop", daemon=True).start()
            _LOOPS.append(loop)
        return _LOOPS[0]
