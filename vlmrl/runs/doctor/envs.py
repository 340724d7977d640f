"""The envs of the doctor's problems: called in threads, or a program's, which sees noise where the problem says so."""

from __future__ import annotations

import asyncio

from vlmrl.config.run import RunConfig
from vlmrl.orchestrator.envs.base import EnvHandle, ProgramHandle
from vlmrl.orchestrator.envs.make import make_envs
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.runs.doctor.noise_images import NoiseProblem, NoiseTask
from vlmrl.tasks.base import Problem, Task
from vlmrl.tasks.programs.problems import played_outside


class DoctorEnvs:
    """`Envs` of a `NoiseTask`. `task.workers` has no effect: an env that is called is called in this process."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.task: Task = NoiseTask(task, config.model.vlm)
        self._called = ThreadEnvs(self.task)
        self._outside = make_envs(config.task, task, EndpointOfRun.of(config), seed=config.seed)

    def new(self, problem: Problem) -> EnvHandle | ProgramHandle:
        assert isinstance(problem, NoiseProblem), "the problems are those of a NoiseTask"
        if played_outside(problem) is None:
            return self._called.new(problem)
        handle = self._outside.new(problem.problem)
        assert isinstance(handle, ProgramHandle), "a problem that is played outside has a program"
        handle.noise |= problem.seed is not None
        return handle

    async def settle(self) -> None:
        await asyncio.gather(self._called.settle(), self._outside.settle())

    async def stop(self) -> None:
        await asyncio.gather(self._called.stop(), self._outside.stop())
