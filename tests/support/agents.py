"""Programs that talk to the chat endpoint, written with the standard library alone, and a runner that plays them."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.chat import ChatRenderer, ScriptedSession
from vlmrl.config.program import ProgramConfig, ProgramResult
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.programs.programs import ProgramEnvs
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.tasks.loading import load_task
from vlmrl.types import EngineSession, Rollout

CLIENT = """
import json, os, sys, time, urllib.error, urllib.request

def ask(problem, *messages, **body):
    "The message of the answer."
    request = urllib.request.Request(
        problem["base_url"] + "/chat/completions",
        json.dumps({"model": "policy", "messages": list(messages), **body}).encode(),
        {"Authorization": "Bearer " + problem["api_key"], "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]

def user(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}
"""

ONE = CLIENT + "problem = json.loads(sys.stdin.readline())\n"
"""The start of a program that plays one problem."""

MANY = CLIENT + "problems = map(json.loads, sys.stdin)\n"
"""The start of a program that plays one after another."""


@dataclass(eq=False)
class DirectEngine:
    """An `InferenceEngine` whose sessions answer at once, by `script(prompt)`."""

    script: Callable[[str], str] = lambda prompt: "yes"
    awaited: list[bool] = field(default_factory=list)
    sessions: list[ScriptedSession] = field(default_factory=list)

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> EngineSession:
        self.awaited.append(is_awaited)
        self.sessions.append(ScriptedSession(self.script))
        return self.sessions[-1]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


def python(script: str) -> str:
    """The command that runs a Python script."""
    return shlex.join([sys.executable, "-I", "-S", "-u", "-c", script])


def config_of(script: str, **settings: Any) -> ProgramConfig:
    settings = {"timeout_s": 60.0, **settings}
    return ProgramConfig(command=python(script), **settings)


def play(
    script: str | ProgramConfig,
    problems: Sequence[int] = (0,),
    *,
    group_size: int = 1,
    engine: DirectEngine | None = None,
    max_turns: int = 5,
    max_model_len: int = 1000,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    renderer: Any = None,
    during: Callable[[ProgramEnvs], Any] | None = None,
    **settings: Any,
) -> list[Rollout]:
    """The rollouts of a program, after which nothing of it is left. `during` is awaited while it plays."""
    config = config_of(script, **settings) if isinstance(script, str) else script

    async def main() -> list[Rollout]:
        task = load_task(config, seed=0)
        envs = ProgramEnvs(config, task, EndpointOfRun("policy", temperature=1.0))
        runner = RolloutRunner(
            envs=envs,
            renderer=renderer or ChatRenderer(),
            engine=engine or DirectEngine(),
            seed=0,
            max_turns=max_turns,
            max_new_tokens=max_new_tokens,
            max_model_len=max_model_len,
        )
        playing = runner.run_groups(
            split="train",
            step=1,
            problems=await ProblemStream(task, "train").again(problems),
            group_size=group_size,
            temperature=temperature,
        )
        try:
            async with asyncio.timeout(120):
                if during is None:
                    groups = await playing
                else:
                    groups, _ = await asyncio.gather(playing, during(envs))
        finally:
            await envs.stop()
        return [rollout for group in groups for rollout in group.rollouts]

    return asyncio.run(main())


__all__ = ["MANY", "ONE", "DirectEngine", "ProgramResult", "config_of", "play", "python"]
