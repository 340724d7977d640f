"""Make the envs of a task as its config says (`task.workers`, `task.timeout_s`), those of a mixture task by task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from vlmrl.config.program import ProgramConfig
from vlmrl.config.task import MixtureConfig, TaskConfig, Workers
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.orchestrator.envs.base import EnvHandle, Envs, ProgramHandle
from vlmrl.orchestrator.envs.processes import ProcessEnvs
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.programs.episodes import VerifiersEnvs
from vlmrl.orchestrator.programs.programs import ProgramEnvs
from vlmrl.tasks.base import Problem, Task
from vlmrl.tasks.mixture import MixedProblem


def make_envs(config: TaskConfig, task: Task, endpoint: EndpointOfRun, *, seed: int, logs: Path | None = None) -> Envs:
    """The envs of `task`, which was made from `config` and `seed`. Programs find the policy at `endpoint`. `logs` is
    the folder of what worker processes print; None for the streams of the run."""
    if isinstance(config, MixtureConfig):
        folder = (lambda name: None) if logs is None else logs.joinpath
        by_name = {
            name: make_envs(own, task, endpoint, seed=seed, logs=folder(name)) for name, own in config.tasks.items()
        }
        return MixedEnvs(task, by_name)
    if isinstance(config, ProgramConfig):
        return ProgramEnvs(config, task, endpoint)
    if isinstance(config, VerifiersConfig):
        return VerifiersEnvs(config, task, endpoint)
    if config.workers is Workers.process:
        return ProcessEnvs(config, task, seed, logs)
    return ThreadEnvs(task, config.timeout_s)


class MixedEnvs:
    """`Envs` of a mixture: those of each of its tasks."""

    def __init__(self, task: Task, by_name: Mapping[str, Envs]) -> None:
        self.task = task
        self._by_name = by_name

    def new(self, problem: Problem) -> EnvHandle | ProgramHandle:
        assert isinstance(problem, MixedProblem)
        return self._by_name[problem.task].new(problem)

    async def settle(self) -> None:
        await asyncio.gather(*(envs.settle() for envs in self._by_name.values()))

    async def stop(self) -> None:
        await asyncio.gather(*(envs.stop() for envs in self._by_name.values()))
