"""Rollouts that are opened before their weights are out.

    draw ─▶ env.reset ─▶ first prompt ─▶ its images to the servers ┊ weights are out ─▶ generate ─▶ …
    └──────────── while the step before is learned ───────────────┘

None of this depends on the weights, so it costs a step no time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from vlmrl.orchestrator.envs.base import EnvHandle
from vlmrl.types import Message, Prompt

FirstTurn: TypeAlias = tuple[tuple[Message, ...], Prompt]
"""The first messages of an env, and the prompt that the renderer made of them."""


@dataclass(frozen=True, eq=False)
class Opening:
    """A rollout whose env is reset, and whose first prompt is rendered, before the rollout begins."""

    env: EnvHandle
    first_turn: asyncio.Task[FirstTurn]
    """Raises what `EnvHandle.reset` and the renderer raise."""

    def __post_init__(self) -> None:
        # Its rollout raises the error. Where there is none, because the run has ended, it is of no interest.
        self.first_turn.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def discard(self) -> None:
        """Close the env. Does nothing where the rollout has been played."""
        self.first_turn.cancel()
        await asyncio.wait({self.first_turn})
        self.env.end()
