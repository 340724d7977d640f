"""Who answers in mode=play: the person at the terminal, random answers, or a scripted policy."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from functools import partial
from typing import Protocol

from vlmrl.errors import TaskError, UserFault, fenced
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.supervised import demonstration_seed
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.runs.play.envs import WatchedEnv
from vlmrl.tasks.base import NoProblem, Task
from vlmrl.tasks.demonstrations import NoDemonstrationsError, get_demonstration
from vlmrl.tasks.scripted import ScriptedPolicy
from vlmrl.types import Text

ASK = "answer> "

STANDARD_INPUT = 0
"""The file descriptor."""

CHUNK_BYTES = 1 << 16
"""Bytes that are read from the standard input at once."""


class Player(Protocol):
    """Gives the answers."""

    async def answer(self, env: WatchedEnv) -> str | None:
        """The next answer in the episode of `env`; None where the player leaves. Raises `UserFault` for a scripted
        policy that fails."""
        ...


class Person:
    """Answers with the lines of the standard input; `\\n` in a line is a line break."""

    def __init__(self, stop: asyncio.Event) -> None:
        """Once `stop` is set, the person has left."""
        self._stop = stop
        self._threads = TaskThreads()
        self._read = b""
        self._is_over = False
        self._is_terminal = os.isatty(STANDARD_INPUT)
        if self._is_terminal:
            print("Answer as the policy would: a line is an answer, \\n in it is a line break, and Ctrl-D leaves.")

    async def answer(self, env: WatchedEnv) -> str | None:
        print(ASK, end="", flush=True)
        reading = asyncio.create_task(self._line())
        if await stopped_before(reading, self._stop):
            print()
            return None
        line = reading.result()
        if line is None or not self._is_terminal:
            print(line or "")
        return None if line is None else line.replace("\\n", "\n")

    async def _line(self) -> str | None:
        """The next line; None at the end."""
        while b"\n" not in self._read and not self._is_over:
            # By os.read, in a daemon thread: it may wait for ever, and sys.stdin would then keep its lock at the exit.
            chunk = await asyncio.shield(self._threads.run(_read_chunk))
            self._read += chunk
            self._is_over = not chunk
        if not self._read:
            return None
        line, _, self._read = self._read.partition(b"\n")
        return line.removesuffix(b"\r").decode(errors="replace")


def _read_chunk() -> bytes:
    """Bytes of the standard input; none at its end, or where it cannot be read."""
    try:
        return os.read(STANDARD_INPUT, CHUNK_BYTES)
    except OSError:
        return b""


class RandomPlayer:
    """Answers as the task's demonstrations with random answers do."""

    def __init__(self, task: Task, seed: int, stop: asyncio.Event) -> None:
        self._task = task
        self._seed = seed
        self._stop = stop
        self._threads = TaskThreads()
        self._number = 0
        self._env: WatchedEnv | None = None
        self._answers: deque[str] = deque()

    async def answer(self, env: WatchedEnv) -> str | None:
        """Raises `TaskError` where the task has no demonstrations, so that the run ends."""
        if env is not self._env:
            self._env, self._answers = env, deque()
        if self._stop.is_set():
            return None
        while not self._answers:
            self._answers.extend(await self._threads.run(partial(self._drawn, env)))
            self._number += 1
        return self._answers.popleft()

    def _drawn(self, env: WatchedEnv) -> list[str]:
        """The answers of one demonstration."""
        seed = demonstration_seed(self._seed, self._number)
        try:
            messages, given = get_demonstration(self._task, env.problem, random_answers=True, seed=seed)
        except NoDemonstrationsError as error:
            raise TaskError(
                f"play.policy=random: {error.text}. Without demonstrations, nothing says what an answer looks like: "
                "define Task.demonstration, or set play.policy to the import path of a function that answers"
            ) from error
        except NoProblem as absent:
            raise UserFault(f"demonstration() has no random answers for {env.problem.id}: {absent}") from None
        said = [message for message in messages[given:] if message.role == "assistant"]
        return ["".join(part.text for part in message.content if isinstance(part, Text)) for message in said]


class Script:
    """Answers by a function of the user's."""

    def __init__(self, path: str, stop: asyncio.Event) -> None:
        """`path` is the function's import path. Raises ConfigError."""
        self._path = path
        self._policy = ScriptedPolicy(path)
        self._stop = stop
        self._threads = TaskThreads()

    async def answer(self, env: WatchedEnv) -> str | None:
        return None if self._stop.is_set() else await self._threads.run(partial(self._answer, env))

    def _answer(self, env: WatchedEnv) -> str:
        with fenced(f"play.policy={self._path}"):
            return self._policy.answer(env.messages, env.users)
