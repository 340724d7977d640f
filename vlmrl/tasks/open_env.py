"""Call the user's env: whatever it does becomes a checked value or a `TaskCodeError`.

    task.env ─▶ OpenEnv ─┬─ env.reset ─▶ messages
                         ├─ env.step  ─▶ Reply           a method that is `async` ─▶ Awaited, of the same
                         └─ env.close ─▶ None, once

Code that plays an env by itself, outside of a run, waits with `finished` for methods that may be `async`:

    with OpenEnv(task, problem) as env:
        messages = finished(env.reset())
        reply = finished(env.step("red", StepInfo(turn=1, num_tokens=2, is_cut=False)))
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from vlmrl.errors import fenced
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.border import TaskCodeError, checked_prompt, checked_reply
from vlmrl.tasks.event_loop import InTaskLoop
from vlmrl.types import Message

T = TypeVar("T")


class Awaited(Generic[T]):
    """What a method of the user's that is `async` returned. It has not started yet."""

    def __init__(self, where: str, value: Awaitable[Any], check: Callable[[str, Any], T]) -> None:
        self._where, self._value, self._check = where, value, check

    async def result(self) -> T:
        """Wait for it, and check its value. Raises `TaskCodeError`."""
        with fenced(self._where, TaskCodeError):
            return self._check(self._where, await self._value)

    def discard(self) -> None:
        """Leave it unstarted, without the warning that Python gives of a coroutine that was never awaited."""
        if inspect.iscoroutine(self._value):
            self._value.close()


def finished(value: T | Awaited[T]) -> T:
    """`value`, or the result where it has to be awaited. Blocks the thread that calls it."""
    return InTaskLoop(value.result()).future.result() if isinstance(value, Awaited) else value


class OpenEnv:
    """One env of a task, which is closed at the end of a `with` block. Raises `TaskCodeError`, and so does what is
    `Awaited`."""

    check_prompt = staticmethod(checked_prompt)
    check_reply = staticmethod(checked_reply)

    def __init__(self, task: Task, problem: Problem, of: str = "") -> None:
        """Call `task.env`. `of` stands behind the name of a method in the text of its fault: ` of train 0`."""
        with fenced(f"env(){of}", TaskCodeError):
            self.env: Any = task.env(problem)
        self.of = of

    def __enter__(self) -> OpenEnv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            finished(self.close())
        except TaskCodeError:
            if error is None:  # else the first error is the one to report
                raise

    def reset(self) -> tuple[Message, ...] | Awaited[tuple[Message, ...]]:
        """The first messages."""
        where = f"reset(){self.of}"
        with fenced(where, TaskCodeError):
            return _checked(where, self.env.reset(), self.check_prompt)

    def step(self, text: str, info: StepInfo) -> Reply | Awaited[Reply]:
        """The reply to one completion, with rewards and metrics as plain floats."""
        where = f"step(){self.of}"
        with fenced(where, TaskCodeError):
            step = self.env.step
            return _checked(where, step(text, info=info) if takes_info(step) else step(text), self.check_reply)

    def close(self) -> Awaited[None] | None:
        """Call `env.close`, where the env has it."""
        where = f"close(){self.of}"
        with fenced(where, TaskCodeError):
            close = getattr(self.env, "close", None)
            return None if close is None else _checked(where, close(), lambda where, value: None)


def takes_info(step: Callable[..., Any]) -> bool:
    """Whether a `step` has a parameter called `info`, by its signature.

    >>> takes_info(lambda completion: None), takes_info(lambda completion, info: None)
    (False, True)
    """
    try:
        return "info" in inspect.signature(step).parameters
    except (TypeError, ValueError):  # of a function in C no signature is known
        return False


def _checked(where: str, value: Any, check: Callable[[str, Any], T]) -> T | Awaited[T]:
    return Awaited(where, value, check) if inspect.isawaitable(value) else check(where, value)
