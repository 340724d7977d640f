"""Where verifiers is installed: in the virtual environment whose Python VLMRL_VERIFIERS_PYTHON names."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from support.agents import DirectEngine
from support.chat import ChatRenderer
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.programs.episodes import VerifiersEnvs
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.tasks.loading import load_task
from vlmrl.types import Rollout

PYTHON = os.environ.get("VLMRL_VERIFIERS_PYTHON")
ENVS = Path(__file__).with_name("other_packages")

needs_verifiers = pytest.mark.skipif(
    PYTHON is None, reason="VLMRL_VERIFIERS_PYTHON does not name the Python of an environment with verifiers"
)


def config_of(env: str, **settings: Any) -> VerifiersConfig:
    return VerifiersConfig(env=env, python=PYTHON, **{"timeout_s": 120.0, **settings})


def play(
    config: VerifiersConfig,
    count: int = 2,
    *,
    group_size: int = 1,
    engine: DirectEngine | None = None,
    renderer: Any = None,
    max_turns: int = 8,
    max_new_tokens: int = 60,
    times: int = 1,
) -> list[Rollout]:
    """The rollouts of the first tasks, after which no worker is left. They are played so many `times`, one after the
    other, and the last ones count."""

    async def main() -> list[Rollout]:
        task = load_task(config, seed=0)
        envs = VerifiersEnvs(config, task, EndpointOfRun("policy", temperature=1.0))
        runner = RolloutRunner(
            envs=envs,
            renderer=renderer or ChatRenderer(),
            engine=engine or DirectEngine(),
            seed=0,
            max_turns=max_turns,
            max_new_tokens=max_new_tokens,
            max_model_len=2000,
        )
        problems = await ProblemStream(task, "train").draw(1, count)
        try:
            async with asyncio.timeout(400):
                for step in range(times):
                    groups = await runner.run_groups(
                        split="train", step=step + 1, problems=problems, group_size=group_size, temperature=1.0
                    )
        finally:
            await envs.stop()
        return [rollout for group in groups for rollout in group.rollouts]

    return asyncio.run(main())
