"""What the model answers now, before any training, and what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmrl.config.model import most_frames
from vlmrl.config.run import RunConfig
from vlmrl.errors import VlmrlError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.orchestrator.envs.make import make_envs
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.sampling import Truncation
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.stream import Drawn
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.every_rank import make_model, make_policy, seed_process
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.runs.tools import make_toolbox
from vlmrl.tasks.base import Task
from vlmrl.types import Rollout


@dataclass(frozen=True)
class Answered:
    """One answer of the model."""

    problem_id: str
    text: str
    reward: float
    rewards: dict[str, float | None]
    stop_reason: str
    error: str | None


async def answers_now(
    config: RunConfig, task: Task, renderer: Renderer, folder: Path, problems: Sequence[SeenProblem]
) -> tuple[list[Answered], str]:
    """One sampled answer to each problem, in this process. The text says why there are none, where there are none."""
    if not problems:
        return [], "preview.answers=0" if config.preview.answers == 0 else "there are no problems"
    try:
        seed_process(config)
        model = make_model(config, folder, None)
        policy = make_policy(config, model, renderer.banned_token_ids)
    except (VlmrlError, OSError) as error:
        return [], f"the model cannot be loaded: {error}"
    engine = EmbeddedEngine(policy, lambda: 0, config.inference.max_model_len, renderer.decode)
    envs = make_envs(config.task, task, EndpointOfRun.of(config), seed=config.seed)
    runner = RolloutRunner(
        envs=envs,
        renderer=renderer,
        engine=engine,
        seed=config.seed,
        max_turns=config.task.max_turns,
        max_new_tokens=config.orchestrator.max_new_tokens,
        max_model_len=min(config.inference.max_model_len, config.trainer.seq_len),
        max_frames=most_frames(config.model),
        truncated=config.algorithm.truncated,
        truncation=Truncation.of(config),
        stop=tuple(config.orchestrator.stop),
        scorer=Scorer.of(config.reward, config.task, TaskThreads().run),
        tools=make_toolbox(config),
    )
    await engine.start()
    try:
        groups = await runner.run_groups(
            split="train",
            step=0,
            problems=[Drawn(each.index, each.problem_id, each.problem) for each in problems],
            group_size=1,
            temperature=config.orchestrator.temperature,
        )
    finally:
        await envs.stop()
        await engine.stop()
    return [_answered(rollout) for group in groups for rollout in group.rollouts], ""


def _answered(rollout: Rollout) -> Answered:
    return Answered(
        problem_id=rollout.problem_id,
        text="\n".join(turn.text for turn in rollout.turns),
        reward=rollout.reward,
        rewards=rollout.rewards,
        stop_reason=rollout.stop_reason.value,
        error=rollout.error,
    )
