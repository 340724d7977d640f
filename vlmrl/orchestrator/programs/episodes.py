"""Play rollouts by an environment of `verifiers` (`task=verifiers`), in one worker process.

    slot ─▶ chat.py ─▶ worker: {"id", "task", "base_url", "api_key"} ─▶ traces ─▶ reward, metrics
                          │  requests, with the trace's id as X-Session-ID ─▶ Endpoint ─▶ ChatSession ─▶ engine
                          └─ turns of traces that are not trainable are left out

The worker plays many episodes at the same time. Where it ends, the episodes that it was playing are faults of the task,
and the next episode starts another worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from vlmrl.config.program import ProgramSampling
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.errors import fenced, safe_text
from vlmrl.orchestrator.endpoint.server import SessionAddress
from vlmrl.orchestrator.envs.base import Seat
from vlmrl.orchestrator.programs.chat import EndpointOfRun, in_slot, play_by_chat
from vlmrl.orchestrator.programs.process import GuardedProcess, end_in_words
from vlmrl.orchestrator.programs.programs import environment, said
from vlmrl.orchestrator.programs.results import Result
from vlmrl.tasks.base import Problem, Reply, Task
from vlmrl.tasks.border import TaskCodeError, TaskTimeoutError, checked_reply
from vlmrl.tasks.programs.problems import PlayedOutside, played_outside
from vlmrl.tasks.programs.verifiers import first_line, worker_command
from vlmrl.types import EnvTime, Rollout, StopReason


class EpisodeWorker:
    """The process that plays episodes. It is started by the first one, and replaced when it has ended."""

    def __init__(self, config: VerifiersConfig) -> None:
        self._config = config
        self._process: GuardedProcess | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()

    async def play(self, **request: Any) -> dict[str, Any]:
        """Let the worker play one episode; its answer. Raises `TaskCodeError` where the worker ends or cannot start. A
        caller that is cancelled cancels the episode."""
        process = await self._started()
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            await process.send(orjson.dumps({"id": number, **request}) + b"\n")
            return await future
        except asyncio.CancelledError:
            await process.send(orjson.dumps({"id": number, "cancel": True}) + b"\n")
            raise
        finally:
            self._waiting.pop(number, None)

    async def stop(self) -> None:
        """End the worker and everything that it started."""
        process, self._process = self._process, None
        if process is not None:
            await process.gone()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _started(self) -> GuardedProcess:
        async with self._starting:
            if self._process is None or self._process.has_ended:
                await self.stop()
                with fenced("starting the worker of task=verifiers", TaskCodeError):
                    process = await GuardedProcess.start(worker_command(self._config), environment({}))
                try:
                    await self._make_ready(process)
                except BaseException:  # also where the first episode takes too long
                    await process.gone()
                    raise
                self._process = process
                self._reading = asyncio.create_task(self._read(process))
            return self._process

    async def _make_ready(self, process: GuardedProcess) -> None:
        await process.send(first_line(self._config))
        line = await process.next_object()
        answer = {} if line is None else orjson.loads(line)
        if not answer.get("ready"):
            why = answer.get("failed") or said(process.printed)
            raise TaskCodeError(f"task.env={self._config.env} cannot be loaded: {safe_text(why)}")

    async def _read(self, process: GuardedProcess) -> None:
        """Hand each answer to the episode that waits for it, until the worker ends."""
        while (line := await process.next_object()) is not None:
            answer = orjson.loads(line)
            future = self._waiting.pop(answer["id"], None)
            if future is not None and not future.done():
                future.set_result(answer)
        status = await process.wait()
        lost, self._waiting = self._waiting, {}
        for future in lost.values():
            if not future.done():
                future.set_exception(
                    TaskCodeError(
                        f"the worker of task=verifiers ended with {end_in_words(status)}{said(process.printed)}"
                    )
                )


class VerifiersEnvs:
    """`Envs` of a task whose rollouts an environment of verifiers plays."""

    def __init__(self, config: VerifiersConfig, task: Task, endpoint: EndpointOfRun) -> None:
        self.task = task
        self.config = config
        self.endpoint = endpoint
        self.worker = EpisodeWorker(config)
        self.slots = asyncio.Semaphore(config.episodes)

    def new(self, problem: Problem) -> Episode:
        found = played_outside(problem)
        assert found is not None, "the task's problems are played outside"
        return Episode(self, found)

    async def settle(self) -> None:
        """Nothing is left: an episode that was cancelled is cancelled in the worker, too."""

    async def stop(self) -> None:
        await self.worker.stop()
        await self.endpoint.stop()


class Episode:
    """One rollout that the environment plays."""

    def __init__(self, envs: VerifiersEnvs, problem: PlayedOutside) -> None:
        self.time = EnvTime()
        self.noise = envs.config.noise
        self._envs = envs
        self._problem = problem

    async def play(self, rollout: Rollout, seat: Seat) -> StopReason:
        """See `ProgramHandle.play`."""
        async with in_slot(self._envs.slots, self.time):
            return await play_by_chat(
                rollout,
                seat,
                self._envs.endpoint,
                self._play,
                noise=self.noise,
                client_samples=self._envs.config.sampling is ProgramSampling.client,
            )

    def end(self) -> None:
        """Nothing is left: `play` has ended its episode, also where it was cancelled."""

    async def _play(self, address: SessionAddress) -> Result:
        limit = self._envs.config.timeout_s
        try:
            async with asyncio.timeout(limit):
                answer = await self._envs.worker.play(
                    **self._problem.payload,
                    base_url=address.base_url,
                    api_key=address.api_key,
                    model=self._envs.endpoint.endpoint.model,
                )
        except TimeoutError:
            raise TaskTimeoutError(
                f"the episode did not end within task.timeout_s={limit:g}, so its rollout is lost: raise "
                "task.timeout_s, or find what it waits for"
            ) from None
        if not answer["ok"]:
            raise TaskCodeError(f"the episode failed: {safe_text(answer['error'])}")
        return result_of([trace for trace in answer["traces"] if trace["trainable"]])


def result_of(traces: Sequence[Mapping[str, Any]]) -> Result:
    """The result of an episode from its trainable traces: means over the traces, where there are several.

    >>> trace = {"id": "a", "reward": 1.0, "rewards": {"right": 1.0}, "metrics": {"turns": 2}}
    >>> result = result_of([trace, {**trace, "id": "b", "reward": 0.0, "rewards": {"right": None}}])
    >>> result.reward, result.metrics, result.rewards, sorted(result.lanes)
    (0.5, {'turns': 2.0}, {'right': 1.0}, ['a', 'b'])
    """

    def means(key: str) -> dict[str, float]:
        names = dict.fromkeys(name for trace in traces for name in trace[key])
        found = {name: [trace[key][name] for trace in traces if trace[key].get(name) is not None] for name in names}
        return {name: statistics.fmean(values) for name, values in found.items() if values}

    reward = statistics.fmean(trace["reward"] for trace in traces) if traces else 0.0
    reply = checked_reply("the episode", Reply(done=True, reward=reward, metrics=means("metrics")))
    rewards = checked_reply("the episode's rewards", Reply(done=True, metrics=means("rewards"))).metrics
    return Result(reply.reward, reply.metrics, rewards, frozenset(trace["id"] for trace in traces))
