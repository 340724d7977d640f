"""The envs of mode=play: in threads of this process, whatever `task.workers` says, one after the other."""

from __future__ import annotations

from vlmrl.config.task import MixtureConfig, TaskConfig
from vlmrl.orchestrator.envs.threads import ThreadEnv, ThreadEnvs
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.runs.play.screen import Screen
from vlmrl.tasks.base import Problem, Reply, StepInfo, Task
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.tools.base import Tool
from vlmrl.types import Answer, Message, Prompt, ToolUse


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


class WatchedToolbox(Toolbox):
    """Tools whose results are shown, and stand in the conversation of the env that is being played."""

    def __init__(self, tools: tuple[Tool, ...], envs: WatchedEnvs, screen: Screen) -> None:
        super().__init__(tools)
        self._envs = envs
        self._screen = screen

    async def reply(self, answer: Answer, prompt: Prompt, use: ToolUse, text: str = "") -> tuple[Message, ...]:
        messages = await super().reply(answer, prompt, use, text)
        if (played := self._envs.played) is not None:
            played.messages = (*played.messages, Message.of("assistant", text), *messages)
        self._screen.results(messages)
        return messages


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
