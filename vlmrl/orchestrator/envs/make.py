"""Make the envs of a task as its config says (`task.timeout_s`), those of a mixture task by task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from vlmrl.config.task import MixtureConfig, TaskConfig
from vlmrl.orchestrator.envs.base import EnvHandle, Envs
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.tasks.base import Problem, Task
from vlmrl.tasks.mixture import MixedProblem


def make_envs(config: TaskConfig, task: Task) -> Envs:
    """The envs of `task`, which was made from `config`."""
    if isinstance(config, MixtureConfig):
        return MixedEnvs(task, {name: make_envs(own, task) for name, own in config.tasks.items()})
    return ThreadEnvs(task, config.timeout_s)


class MixedEnvs:
    """`Envs` of a mixture: those of each of its tasks."""

    def __init__(self, task: Task, by_name: Mapping[str, Envs]) -> None:
        self.task = task
        self._by_name = by_name

    def new(self, problem: Problem) -> EnvHandle:
        assert isinstance(problem, MixedProblem)
        return self._by_name[problem.task].new(problem)

    async def settle(self) -> None:
        await asyncio.gather(*(envs.settle() for envs in self._by_name.values()))

    async def stop(self) -> None:
        await asyncio.gather(*(envs.stop() for envs in self._by_name.values()))
