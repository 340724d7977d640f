"""Run the task's code in threads, and check what it returns against the contract of `vlmrl.tasks.base`.

    event loop ─▶ TaskThreads.run(partial(step_env, env, text)) ─▶ daemon thread ─▶ Reply or TaskCodeError

The task's code may block, hang or raise. None of these stops the event loop or another rollout.
"""

from __future__ import annotations

import asyncio
import contextlib
import numbers
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np

from vlmrl.tasks.base import Env, Problem, Reply, Split, Task
from vlmrl.types import Image, Message, StopReason, Text

T = TypeVar("T")

TASK_THREADS = 32
"""How many calls of the task's code may run at the same time."""

TASK_THREAD_PATIENCE_S = 0.01
"""Seconds after which other threads take over the remaining calls of a round."""

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Rewards are stored as float32, where a larger one would be infinite."""

Calls: TypeAlias = deque[tuple[Callable[[], Any], asyncio.Future[Any]]]
"""Calls of one round that no thread has taken yet, each with the future of its result."""


class TaskCodeError(Exception):
    """The task's code raised, or returned something that its contract does not allow. Ends one rollout."""

    def __init__(self, stop_reason: StopReason, text: str) -> None:
        super().__init__(text)
        self.stop_reason = stop_reason


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
        return call()
    except TaskCodeError as fault:
        return fault
    except BaseException as error:  # noqa: BLE001 — user code: even its sys.exit() ends only its own rollout
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}, in {where.name})"
        return TaskCodeError(StopReason.TASK_ERROR, text)


# ── calls of the task, checked ──────────────────────────────────────────────────────────────────────────────


def get_problem(task: Task, split: Split, index: int) -> Problem:
    """`task.problem`, checked. Raises `TaskCodeError`."""
    problem = task.problem(split, index)
    _check(isinstance(problem.id, str), f"problem({split!r}, {index}).id is {problem.id!r}, not a str")
    return problem


def open_env(task: Task, problem: Problem) -> tuple[Env, tuple[Message, ...]]:
    """`task.env` and its first messages, checked. Raises `TaskCodeError`."""
    env = task.env(problem)
    messages = env.reset()
    _check_messages("reset()", messages, ("system", "user", "assistant", "tool"))
    _check(messages[-1].role in ("user", "tool"), "reset() does not end with a user message for the policy to answer")
    return env, messages


def step_env(env: Env, text: str) -> Reply:
    """`env.step`, checked, with rewards and metrics converted to float. Raises `TaskCodeError`."""
    reply = env.step(text)
    _check(isinstance(reply, Reply), f"step() returned a {type(reply).__name__}, not a Reply")
    _check(isinstance(reply.metrics, dict), f"step() returned metrics={reply.metrics!r}, not a dict")
    if not reply.done:
        _check_messages("step()", reply.messages, ("user", "tool"))
    for name, value in {**reply.metrics, "turn_reward": reply.turn_reward, "reward": reply.reward}.items():
        if not (isinstance(value, numbers.Real) and abs(value) <= LARGEST_REWARD):  # NaN fails this comparison too
            raise TaskCodeError(
                StopReason.BAD_REWARD, f"step() returned {name}={value!r}, which is not a finite number"
            )
    return Reply(
        turn_reward=float(reply.turn_reward),
        done=bool(reply.done),
        reward=float(reply.reward),
        messages=reply.messages,
        metrics={name: float(value) for name, value in reply.metrics.items()},
    )


def _check_messages(source: str, messages: Any, roles: tuple[str, ...]) -> None:
    _check(
        isinstance(messages, tuple) and all(isinstance(message, Message) for message in messages),
        f"{source} returned a {type(messages).__name__}, not a tuple of Message",
    )
    _check(bool(messages), f"{source} returned no message although the episode is not done: the policy has no prompt")
    for message in messages:
        _check(message.role in roles, f"{source} returned a message of role {message.role!r}, not {' or '.join(roles)}")
        _check(
            isinstance(message.content, tuple) and all(isinstance(part, (Text, Image)) for part in message.content),
            f"{source} returned a message whose content is not a tuple of Text and Image",
        )


def _check(holds: bool, problem: str) -> None:
    """Raise `TaskCodeError(problem)` unless `holds`."""
    if not holds:
        raise TaskCodeError(StopReason.TASK_ERROR, problem)
