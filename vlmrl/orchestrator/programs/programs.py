"""Play rollouts by a program of the user's (`task=program`), which talks to the run's chat endpoint.

    slot ─▶ chat.py ─▶ process: OPENAI_BASE_URL, OPENAI_API_KEY, the problem on stdin ─▶ Result
                          │  requests ─▶ Endpoint ─▶ ChatSession ─▶ engine
                          └─ exit status, output ─▶ reward, or a fault of this rollout alone

A process plays one problem, or with `task.reuse=true` one after another; one that ended is replaced. However a rollout
ends, the process that played it has ended with everything it started, or waits for its next problem.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from vlmrl.config.program import ProgramConfig, ProgramResult, ProgramSampling
from vlmrl.errors import fenced
from vlmrl.orchestrator.endpoint.server import SessionAddress
from vlmrl.orchestrator.envs.base import Closing, Seat
from vlmrl.orchestrator.programs.chat import EndpointOfRun, in_slot, play_by_chat
from vlmrl.orchestrator.programs.process import GuardedProcess, end_in_words, last_lines
from vlmrl.orchestrator.programs.results import UNPAID, Result, last_line, result_in
from vlmrl.tasks.base import Problem, Task
from vlmrl.tasks.border import TaskCodeError, TaskTimeoutError
from vlmrl.tasks.programs.problems import PlayedOutside, played_outside
from vlmrl.types import EnvTime, Printed, Rollout, StopReason

RESULT_FILE = "VLMRL_RESULT_FILE"
"""Environment variable with the path of the result, for `task.result=file`."""

RESULT_KEYS = frozenset({"reward", "error", "done"})
"""A JSON line of a program that is used again ends its problem where it has one of these keys."""


class ProgramEnvs:
    """`Envs` of a task whose rollouts a program plays."""

    def __init__(self, config: ProgramConfig, task: Task, endpoint: EndpointOfRun) -> None:
        self.task = task
        self.config = config
        self.endpoint = endpoint
        self.command = shlex.split(config.command)
        self.closing = Closing()
        self.slots = asyncio.Semaphore(config.processes)
        self._idle: list[GuardedProcess] = []

    def new(self, problem: Problem) -> Program:
        found = played_outside(problem)
        assert found is not None, "the task's problems are played outside"
        return Program(self, found)

    async def settle(self) -> None:
        await self.closing.settle()

    async def stop(self) -> None:
        idle, self._idle = self._idle, []
        await asyncio.gather(*(process.gone() for process in idle))
        await self.settle()
        await self.endpoint.stop()

    @asynccontextmanager
    async def process(self, env: Mapping[str, str]) -> AsyncIterator[GuardedProcess]:
        """A process for one problem. It is used again only with `task.reuse`, and where the block did not raise
        anything but a fault that the program itself has reported."""
        process = await self._idle_or_new(env)
        try:
            yield process
        except ReportedError:
            self._give_back(process)
            raise
        except BaseException:
            self._end(process)
            raise
        self._give_back(process)

    async def _idle_or_new(self, env: Mapping[str, str]) -> GuardedProcess:
        while self._idle:
            process = self._idle.pop()
            if not process.has_ended:
                process.forget()
                return process
            self._end(process)
        with fenced(f"starting task.command={self.config.command}", TaskCodeError):
            return await GuardedProcess.start(self.command, env)

    def _give_back(self, process: GuardedProcess) -> None:
        if self.config.reuse and not process.has_ended:
            self._idle.append(process)
        else:
            self._end(process)

    def _end(self, process: GuardedProcess) -> None:
        process.stop()
        self.closing.start(process.gone(), is_late=False)


class ReportedError(TaskCodeError):
    """The program said that it cannot play this problem, and is ready for the next."""


class Program:
    """One rollout that a program plays."""

    def __init__(self, envs: ProgramEnvs, problem: PlayedOutside) -> None:
        self.time = EnvTime()
        self.printed: Printed | None = None
        """The end of what the program printed while it played."""
        self.noise = envs.config.noise
        self._envs = envs
        self._problem = problem

    async def play(self, rollout: Rollout, seat: Seat) -> StopReason:
        """See `ProgramHandle.play`."""
        async with in_slot(self._envs.slots, self.time):
            try:
                return await play_by_chat(
                    rollout,
                    seat,
                    self._envs.endpoint,
                    self._play,
                    noise=self.noise,
                    client_samples=self._envs.config.sampling is ProgramSampling.client,
                )
            finally:
                rollout.printed = self.printed

    def end(self) -> None:
        """Nothing is left: `play` has ended its process, also where it was cancelled."""

    async def _play(self, address: SessionAddress) -> Result:
        config = self._envs.config
        env = {"OPENAI_BASE_URL": address.base_url, "OPENAI_API_KEY": address.api_key}
        with tempfile.TemporaryDirectory(prefix="vlmrl-result-") as folder:
            if config.result is ProgramResult.file:
                env[RESULT_FILE] = str(Path(folder) / "result.json")
            line = await asyncio.to_thread(self._line, address)
            async with self._envs.process(environment(env)) as process:
                try:
                    async with asyncio.timeout(config.timeout_s):
                        if config.reuse:
                            return await self._next_result(process, line)
                        return await self._only_result(process, line, env.get(RESULT_FILE))
                except TimeoutError:
                    raise TaskTimeoutError(
                        f"the program did not end within task.timeout_s={config.timeout_s:g}, so its rollout is lost: "
                        f"raise task.timeout_s, or find what it waits for{said(process.printed)}"
                    ) from None
                finally:
                    self.printed = process.printed

    def _line(self, address: SessionAddress) -> bytes:
        """The problem as a JSON line. It has the address, too, for a program that plays several problems."""
        with fenced("writing the problem as JSON", TaskCodeError):
            facts: dict[str, Any] = {**self._problem.payload, "base_url": address.base_url, "api_key": address.api_key}
            return orjson.dumps(facts, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"

    async def _only_result(self, process: GuardedProcess, line: bytes, file: str | None) -> Result:
        """The result of a process that plays this problem only."""
        await process.send(line, is_last=True)
        status = await process.wait()
        printed = process.printed
        if status != 0:
            raise TaskCodeError(f"the program ended with {end_in_words(status)}{said(printed)}")
        if self._envs.config.result is ProgramResult.none:
            return UNPAID
        if file is None:
            return result_in(last_line(printed.stdout), "the program's last line")
        with fenced(f"reading {RESULT_FILE}", TaskCodeError):
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        return result_in(text, RESULT_FILE)

    async def _next_result(self, process: GuardedProcess, line: bytes) -> Result:
        """The result of a process that plays one problem after another."""
        await process.send(line)
        while (text := await process.next_object()) is not None:
            try:
                found = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue  # something else that it prints
            if not RESULT_KEYS & found.keys():
                continue
            if found.get("error") is not None:
                raise ReportedError(f"the program reports an error: {str(found['error'])[:10_000]}")
            if self._envs.config.result is ProgramResult.none:
                return UNPAID
            return result_in(text.decode(errors="replace"), "the program's result")
        status = await process.wait()
        raise TaskCodeError(
            f"the program ended with {end_in_words(status)} before it printed a result, although task.reuse=true "
            f"expects it to wait for the next problem{said(process.printed)}"
        )


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """The run's environment with `own` on top. Requests to this machine go through no proxy, and Python hands on what
    it prints at once."""
    env = {"PYTHONUNBUFFERED": "1", **os.environ, **own}
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1,localhost"]))
    return env


def said(printed: Printed) -> str:
    """What a program last wrote to its standard error, to stand at the end of a message."""
    lines = last_lines(printed.stderr)
    return f"; the end of its standard error:\n{lines}" if lines else ""
