"""Held-out evaluation: play the same problems each time, once sampled and once greedy, without training on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmrl.config.orchestrator import EvalConfig
from vlmrl.orchestrator.metrics import mean_rewards, mean_task_metrics, replay_metrics
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import FixedProblems
from vlmrl.types import DropReason, Rollout


@dataclass(eq=False)
class Evaluator:
    """Evaluates the policy, and knows from past evaluations whether the target is reached."""

    config: EvalConfig
    runner: RolloutRunner
    problems: FixedProblems
    """The held-out problems."""
    temperature: float
    """Temperature of the sampled evaluation; the greedy one uses 0."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """(sampled, greedy) held-out reward of each evaluation so far; saved in checkpoints."""
    is_unfinished: bool = False
    """Whether an evaluation was begun and not finished, because the run was stopped meanwhile. Saved in checkpoints: a
    resumed run makes the evaluation again, from its start."""

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after `step`: before the first step, every `eval.every` steps, and after the last."""
        return self.config.every > 0 and (step % self.config.every == 0 or step == last_step)

    @property
    def reached_target(self) -> bool:
        """Whether both rewards were at least `eval.target` in the last `eval.consecutive` evaluations."""
        target, last = self.config.target, self.history[-self.config.consecutive :]
        if target is None or len(last) < self.config.consecutive:
            return False
        return all(min(both) >= target for both in last)

    async def run(self, step: int) -> tuple[dict[str, float], dict[str, list[Rollout]]]:
        """Evaluate; return metrics (`eval/…`) and rollouts by kind ("sampled", "greedy"). May be cancelled: the history
        knows only whole evaluations."""
        self.is_unfinished = True
        rollouts: dict[str, list[Rollout]] = {}
        problems = await self.problems.first(self.config.problems, step)
        for kind, temperature in (("sampled", self.temperature), ("greedy", 0.0)):
            groups = await self.runner.run_groups(
                split="eval",
                step=step,
                problems=problems,
                group_size=1,
                temperature=temperature,
            )
            rollouts[kind] = [rollout for group in groups for rollout in group.rollouts]
        sampled, greedy = (mean_reward(rollouts[kind]) for kind in ("sampled", "greedy"))
        self.history.append((sampled, greedy))
        self.is_unfinished = False
        metrics = {"eval/reward": sampled, "eval/reward_greedy": greedy}
        for kind, suffix in (("sampled", ""), ("greedy", "_greedy")):
            means = mean_rewards(rollouts[kind]) | mean_task_metrics(rollouts[kind])
            metrics |= {f"eval/{key}{suffix}": value for key, value in means.items()}
        metrics |= {
            f"eval/{key}": value for key, value in replay_metrics(rollouts["sampled"] + rollouts["greedy"]).items()
        }
        return metrics, rollouts


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Mean reward. A fault counts as 0.0, because the problem was not solved; a rollout that no reward term scored does
    not count. 0.0 where none counts."""
    rewards = [rollout.reward for rollout in rollouts if rollout.dropped is not DropReason.NO_REWARD]
    return float(np.mean(rewards)) if rewards else 0.0
