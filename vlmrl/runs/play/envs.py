"""The envs of mode=play: in threads of this process, whatever `task.workers` says, one after the other."""

from __future__ import annotations

from vlmrl.config.task import MixtureConfig, TaskConfig
from vlmrl.orchestrator.envs.threads import ThreadEnv, ThreadEnvs
from vlmrl.runs.play.screen import Screen
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.types import Message


class WatchedEnvs(ThreadEnvs):
    """Envs whose replies are shown."""

    def __init__(self, config: TaskConfig, task: Task, screen: Screen) -> None:
        super().__init__(task)
        self.screen = screen
        self.played: WatchedEnv | None = None
        """The env of the episode that is being played."""
        self._config = config

    def new(self, problem: Problem) -> ThreadEnv:
        own = self._config
        if isinstance(own, MixtureConfig) and isinstance(problem, MixedProblem):
            own = own.tasks[problem.task]
        self.timeout_s = own.timeout_s
        self.played = WatchedEnv(self, problem)
        return self.played


class WatchedEnv(ThreadEnv):
    """An env that keeps the conversation, and shows what it replies."""

    def __init__(self, envs: WatchedEnvs, problem: Problem) -> None:
        super().__init__(envs, problem)
        self.problem = problem
        self.messages: tuple[Message, ...] = ()
        """The conversation as the policy sees it."""
        self._screen = envs.screen

    async def reset(self) -> tuple[Message, ...]:
        self.messages = await super().reset()
        return self.messages

    async def step(self, text: str, info: StepInfo) -> Reply:
        reply = await super().step(text, info)
        if reply.history is not None:
            self.messages = reply.history
        else:
            self.messages = (*self.messages, Message.of("assistant", text), *reply.messages)
        self._screen.reply(reply)
        return reply
