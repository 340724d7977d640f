"""Envs in threads of the run (`task.workers=thread`), and in one event loop where their methods are `async`.

    handle.step ─▶ TaskThreads ─▶ env.step ─┬─ Reply ───────────────────────────▶ rollout
                                            └─ Awaited ─▶ loop of the tasks ────▶ rollout

A coroutine holds no thread while it waits, so any number of them run at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from vlmrl.orchestrator.envs.base import Closing, timed_out
from vlmrl.orchestrator.task_threads import Call, TaskThreads
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.event_loop import InTaskLoop
from vlmrl.tasks.open_env import Awaited, OpenEnv
from vlmrl.types import EnvTime, Message

T = TypeVar("T")


class ThreadEnvs:
    """`Envs` whose calls run in threads."""

    def __init__(self, task: Task, timeout_s: float | None = None) -> None:
        """`timeout_s` is the longest that a call may take from its start; None for no limit."""
        self.task = task
        self.timeout_s = timeout_s
        self.threads = TaskThreads()
        self.closing = Closing()

    def new(self, problem: Problem) -> ThreadEnv:
        return ThreadEnv(self, problem)

    async def settle(self) -> None:
        await self.closing.settle()

    async def stop(self) -> None:
        await self.settle()


class ThreadEnv:
    """An `EnvHandle` of a `ThreadEnvs`."""

    def __init__(self, envs: ThreadEnvs, problem: Problem) -> None:
        self.time = EnvTime()
        self._envs = envs
        self._problem = problem
        self._env: OpenEnv | None = None
        self._running: asyncio.Future[Any] | None = None
        self._awaited: Awaited[Any] | None = None
        self._coroutine: InTaskLoop[Any] | None = None
        self._is_given_up = False
        self._is_ended = False

    @property
    def users(self) -> Any:
        """The env that the task made, after `reset`."""
        assert self._env is not None, "an env is reset before it is looked at"
        return self._env.env

    async def reset(self) -> tuple[Message, ...]:
        def make() -> tuple[Message, ...] | Awaited[tuple[Message, ...]]:
            self._env = OpenEnv(self._envs.task, self._problem)
            return self._env.reset()

        messages, seconds = await self._run("reset()", make)
        self.time.resets += 1
        self.time.reset_s += seconds
        return messages

    async def step(self, text: str, info: StepInfo) -> Reply:
        assert self._env is not None, "an env is reset before its first step"
        reply, seconds = await self._run("step()", partial(self._env.step, text, info))
        self.time.steps += 1
        self.time.step_s += seconds
        return reply

    def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._envs.closing.start(self._close(), is_late=self._is_given_up)

    async def _close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.cancel()
        if self._running is not None:
            await asyncio.wait({self._running})
            returned = None if self._running.exception() else self._running.result()
            for never_started in (returned, self._awaited):
                if isinstance(never_started, Awaited):
                    never_started.discard()
        if self._env is not None:
            await self._run("close()", self._env.close)

    async def _run(self, where: str, function: Callable[[], T | Awaited[T]]) -> tuple[T, float]:
        """The result of a call and its seconds. Raises `TaskCodeError`."""
        is_close = self._is_ended

        def unless_ended() -> T | Awaited[T] | None:
            return None if self._is_ended and not is_close else function()  # nothing waits for the result any more

        call = self._envs.threads.begin(unless_ended)
        self._running = call.future
        await self._within(where, call)
        value: Any = call.future.result()
        assert call.started is not None
        self.time.queue_s += call.started - call.queued
        if isinstance(value, Awaited):
            value = await self._result_of(where, value, call.started)
        return value, time.monotonic() - call.started

    async def _within(self, where: str, call: Call[Any]) -> None:
        """Wait until a call has returned. The time limit counts from its start, not from when it was queued."""
        limit = self._envs.timeout_s
        left = limit
        while not call.future.done():
            await asyncio.wait({call.future}, timeout=left)
            if limit is None or call.future.done() or call.started is None:
                continue
            left = call.started + limit - time.monotonic()
            if left <= 0:
                self._is_given_up = True
                self._envs.threads.give_up(call)
                raise timed_out(where, limit)

    async def _result_of(self, where: str, value: Awaited[T], started: float) -> T:
        """The result of what the task's code wants to be awaited. It is cancelled where it takes too long, and by
        `end`."""
        limit = self._envs.timeout_s
        self._awaited = value
        self._coroutine = InTaskLoop(value.result())
        self._running = asyncio.wrap_future(self._coroutine.future)
        await asyncio.wait({self._running}, timeout=None if limit is None else started + limit - time.monotonic())
        if not self._running.done():
            assert limit is not None
            self._coroutine.cancel()
            raise timed_out(where, limit)
        self._coroutine = None
        result: T = self._running.result()
        return result
