"""Envs in worker processes (`task.workers=process`): for envs that hold Python's lock while they draw, or may crash.

    ProcessEnvs ─┬─ Worker ─ process ─ envs 0, 2, 4, …
                 └─ Worker ─ process ─ envs 1, 3, 5, …          a new env goes to the worker with the fewest

What a crash costs: the rollout whose call the process was running. The other envs of that process are lost with it, so
their rollouts are played again from their start, with the same seeds (`EnvLostError`).

Left out on purpose: several calls at the same time in one worker. An env that waits (for a browser, a server) belongs
into a thread, or into more workers (`task.num_workers`).
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

from vlmrl.config.task import TaskConfig
from vlmrl.errors import fenced
from vlmrl.orchestrator.envs import worker_program
from vlmrl.orchestrator.envs.base import Closing
from vlmrl.orchestrator.envs.worker import Worker, WorkerCall, WorkerSettings
from vlmrl.orchestrator.envs.worker_program import Request
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.border import TaskCodeError
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.types import EnvTime, Message


class ProcessEnvs:
    """`Envs` whose calls run in worker processes."""

    def __init__(self, config: TaskConfig, task: Task, seed: int, logs: Path | None = None) -> None:
        """`task` was made from `config` and `seed`, from which each worker makes its own. `logs` is the folder of what
        the workers print."""
        self.task = task
        self.closing = Closing()
        self.numbers: Iterator[int] = itertools.count()
        self._config = config
        self._seed = seed
        self._logs = logs
        self._workers: list[Worker] = []

    def new(self, problem: Problem) -> ProcessEnv:
        return ProcessEnv(self, problem)

    def place(self) -> Worker:
        """The worker for a new env. Starts all workers when the first env is placed."""
        if not self._workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([worker_program.__name__])
            count = self._config.num_workers or len(os.sched_getaffinity(0))
            self._workers = [Worker(self._settings(context, number)) for number in range(count)]
            atexit.register(self._kill)  # before multiprocessing's own, which waits for workers that ignore SIGTERM
        return min(self._workers, key=lambda worker: worker.num_open)

    async def settle(self) -> None:
        await self.closing.settle()

    async def stop(self) -> None:
        await self.settle()
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in self._workers))
        self._workers = []
        atexit.unregister(self._kill)

    def _settings(self, context: ForkServerContext, number: int) -> WorkerSettings:
        log = None if self._logs is None else self._logs / f"env_worker_{number:02d}.log"
        return WorkerSettings(context, self._config, self._seed, log)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()


class ProcessEnv:
    """An `EnvHandle` of a `ProcessEnvs`."""

    def __init__(self, envs: ProcessEnvs, problem: Problem) -> None:
        self.time = EnvTime()
        self._envs = envs
        self._problem = problem.problem if isinstance(problem, MixedProblem) else problem
        self._number = next(envs.numbers)
        self._worker: Worker | None = None
        self._call: WorkerCall | None = None

    async def reset(self) -> tuple[Message, ...]:
        with fenced("task.workers=process hands the problem to a worker process: pickle.dumps(problem)", TaskCodeError):
            problem = pickle.dumps(self._problem)
        self._worker = self._envs.place()
        self._worker.num_open += 1
        call = await self._run(self._worker, Request(self._number, "reset", problem=problem))
        self.time.resets += 1
        self.time.reset_s += call.seconds
        messages: tuple[Message, ...] = call.future.result()
        return messages

    async def step(self, text: str, info: StepInfo) -> Reply:
        assert self._worker is not None, "an env is reset before its first step"
        call = await self._run(self._worker, Request(self._number, "step", text=text, info=info))
        self.time.steps += 1
        self.time.step_s += call.seconds
        reply: Reply = call.future.result()
        return reply

    def end(self) -> None:
        if (worker := self._worker) is not None:
            self._worker = None
            worker.num_open -= 1
            self._envs.closing.start(self._close(worker), is_late=False)

    async def _close(self, worker: Worker) -> None:
        if self._call is not None:
            self._call.is_abandoned = True
            await asyncio.wait({self._call.future})
            self._call.future.exception()  # read, or asyncio would report it
        await worker.begin(Request(self._number, "close")).future

    async def _run(self, worker: Worker, request: Request) -> WorkerCall:
        """Wait for a call. Raises `TaskCodeError` and `EnvLostError`."""
        self._call = call = worker.begin(request)
        await asyncio.wait({call.future})
        call.future.result()
        self.time.queue_s += call.waited
        return call
