"""The interface between rollouts and the envs that they play, and what every kind of envs shares.

    handle = envs.new(problem)          one per rollout; nothing is called yet
    messages = await handle.reset()      task.env and env.reset
    reply = await handle.step(…)         env.step
    handle.end()                         env.close, in the background, as soon as a call that is running returns
    await envs.settle()                  the envs that were ended are closed
    await envs.stop()                    the end of the run

A rollout that a program plays has a `ProgramHandle` instead, which fills the rollout by itself.

An env is closed exactly once, however its rollout ends. Only a call that never returns keeps its env from that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.border import TaskCodeError, TaskTimeoutError
from vlmrl.types import EngineSession, EnvTime, Message, Rollout, StopReason

log = logging.getLogger(__name__)

CLOSE_PATIENCE_S = 5.0
"""Seconds that the end of a batch waits for envs that are being closed. A run that was interrupted waits for calls that
are still running, too, because their envs are closed after them."""


class EnvLostError(Exception):
    """An env ended with a worker process that another rollout's call ended. The rollout is played again from its start,
    with another env."""


class EnvHandle(Protocol):
    """One env, from the rollout's side."""

    time: EnvTime
    """Where the time of its calls went."""

    async def reset(self) -> tuple[Message, ...]:
        """Make the env and return its first messages. Raises `TaskCodeError` and `EnvLostError`."""
        ...

    async def step(self, text: str, info: StepInfo) -> Reply:
        """The reply to a completion. Raises `TaskCodeError` and `EnvLostError`."""
        ...

    def end(self) -> None:
        """Close the env in the background. Returns at once; may be called while a call is running."""
        ...


@dataclass(frozen=True)
class Seat:
    """What plays with a rollout that a program plays: the policy and its budgets."""

    renderer: Renderer
    engine: EngineSession
    sampling: OwnSampling
    """How the run samples."""
    seed: Callable[[int], int]
    """Number of the answer in the rollout → its seed."""
    max_turns: int
    """Most answers of the rollout."""
    max_new_tokens: int
    """Most tokens of an answer."""
    max_model_len: int
    """Most tokens of prompt plus answer."""
    max_frames: int | None = None
    """Most frames of all videos of a prompt together; None for no limit."""


@runtime_checkable
class ProgramHandle(Protocol):
    """One rollout that a program plays: it sends its prompts to the chat endpoint, in place of an env that is called
    (vlmrl/orchestrator/programs)."""

    time: EnvTime
    """Where the time of the program went."""
    noise: bool
    """Whether the policy sees noise in place of every image; may be set before `play`."""

    async def play(self, rollout: Rollout, seat: Seat) -> StopReason:
        """Fill turns, reward and metrics of `rollout`; return why it ended. Raises `UserFault`, `EngineError` and
        `EnvLostError`."""
        ...

    def end(self) -> None:
        """As in `EnvHandle`."""
        ...


class Envs(Protocol):
    """The envs of one task."""

    task: Task

    def new(self, problem: Problem) -> EnvHandle | ProgramHandle:
        """A handle of a new env, which its `reset` makes, or of a program that plays the problem."""
        ...

    async def settle(self) -> None:
        """Wait until the envs that were ended are closed, at most `CLOSE_PATIENCE_S`."""
        ...

    async def stop(self) -> None:
        """Release what the envs of the run share. No env is opened after it."""
        ...


class Closing:
    """The envs that are being closed in the background."""

    def __init__(self) -> None:
        self._due: set[asyncio.Task[None]] = set()
        self._late: set[asyncio.Task[None]] = set()

    def start(self, close: Coroutine[Any, Any, None], *, is_late: bool) -> None:
        """Run `close`. With `is_late` it waits for a call that was given up, so `settle` does not wait for it."""
        task = asyncio.get_running_loop().create_task(logged(close))
        (self._late if is_late else self._due).add(task)  # the event loop itself holds tasks weakly
        task.add_done_callback(self._due.discard)
        task.add_done_callback(self._late.discard)

    async def settle(self) -> None:
        """Wait for those that are due, at most `CLOSE_PATIENCE_S`. An env that is not closed by then is not waited for
        again."""
        if self._due:
            _, late = await asyncio.wait(self._due, timeout=CLOSE_PATIENCE_S)
            self._late |= late
            self._due -= late


async def logged(close: Coroutine[Any, Any, None]) -> None:
    """Close an env; a `close` that fails is written to the log, because its rollout is complete."""
    try:
        await close
    except TaskCodeError as fault:
        log.warning("%s; the rollout counts, but what its env held may not be released\n%s", fault, fault.traceback)


def timed_out(where: str, timeout_s: float) -> TaskTimeoutError:
    """The fault of a call that ran too long."""
    return TaskTimeoutError(
        f"{where} did not return within task.timeout_s={timeout_s:g}, so its rollout is lost: raise task.timeout_s, or "
        "find what it waits for"
    )
