"""Play the envs of `support.counted_envs` with a scripted renderer and engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.counted_envs import CountedTask
from support.lockstep import CharRenderer, LockstepEngine, Policy
from vlmrl import ImportedTaskConfig
from vlmrl.orchestrator.envs.base import Envs
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.types import Group, Rollout


def config_of(folder: Path, *kinds: str, **settings: Any) -> ImportedTaskConfig:
    """The config of the task."""
    args = {"events": str(folder)} | ({"kinds": list(kinds)} if kinds else {})
    return ImportedTaskConfig(target="support.counted_envs:CountedTask", args=args, **settings)


def counted(folder: Path, *kinds: str) -> CountedTask:
    return CountedTask(config_of(folder, *kinds), seed=0)


def answer(rollout_id: str, prompt: str) -> str:
    """Completions of eight tokens are cut; of kind `full` the second prompt fills the context."""
    return "a long answer" if prompt.startswith("user:cut") else "yes"


def runner_of(envs: Envs, policy: Policy = answer) -> RolloutRunner:
    return RolloutRunner(
        envs=envs,
        renderer=CharRenderer(),
        engine=LockstepEngine(policy, 64),
        seed=0,
        max_turns=3,
        max_new_tokens=8,
        max_model_len=64,
    )


async def played(runner: RolloutRunner, problems: Sequence[int], group_size: int = 2) -> list[Group]:
    async with asyncio.timeout(60):
        return await runner.run_groups(
            split="train",
            step=1,
            problems=await ProblemStream(runner.envs.task, "train").again(problems),
            group_size=group_size,
            temperature=1.0,
        )


def play(envs: Envs, problems: Sequence[int], group_size: int = 2, policy: Policy = answer) -> list[Rollout]:
    groups = asyncio.run(played(runner_of(envs, policy), problems, group_size))
    return [rollout for group in groups for rollout in group.rollouts]
