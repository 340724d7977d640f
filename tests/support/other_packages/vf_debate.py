"""An environment of verifiers with two agents: one that learns, and a judge of the same policy that does not."""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.runtimes import ProgramResult

__all__ = ["DebateEnv", "DebateHarness", "DebateTaskset"]


class DebateTask(vf.Task[vf.TaskData]):
    @vf.reward(weight=2.0)
    async def length(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class DebateTaskset(vf.Taskset[DebateTask, vf.TasksetConfig]):
    def load(self) -> Any:
        for index in range(40):
            yield DebateTask(vf.TaskData(prompt=f"Say {index}"), self.config.task)


class DebateHarnessConfig(vf.HarnessConfig):
    pass


class DebateHarness(vf.Harness[DebateHarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any, *more: Any
    ) -> ProgramResult:
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            message = {"role": "user", "content": data.prompt}
            await client.chat.completions.create(model=ctx.model, messages=[message])
        return ProgramResult(0, "", "")


class DebateConfig(vf.EnvConfig):
    speaker: vf.AgentConfig = vf.AgentConfig()
    judge: vf.AgentConfig = vf.AgentConfig()


class DebateEnv(vf.Env[DebateConfig]):
    async def setup(self, agents: Any) -> None:
        agents.judge.trainable = False

    async def run(self, task: Any, agents: Any) -> None:
        await agents.speaker.run(task)
        await agents.judge.run(task)
