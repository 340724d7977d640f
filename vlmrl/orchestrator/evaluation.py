"""Held-out evaluation: play the same problems each time, without training on them.

The main evaluation plays `orchestrator.eval.problems` problems of the run's task once sampled and once greedy. Named
sets (`orchestrator.eval.sets`, eval_sets.py) come after it, in the order of the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmrl.config.orchestrator import EvalConfig
from vlmrl.orchestrator.best import BestWatch
from vlmrl.orchestrator.eval_scores import scores
from vlmrl.orchestrator.eval_sets import SetPlayer, asked_of
from vlmrl.orchestrator.metrics import (
    by_task,
    mean_reward,
    mean_rewards,
    mean_task_metrics,
    replay_metrics,
    task_means,
    tool_metrics,
)
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import FixedProblems
from vlmrl.record.evaluation import MAIN, SetResult
from vlmrl.record.splits import RecordedSplit, eval_split
from vlmrl.types import Rollout


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: the main one, named sets, or both."""

    metrics: dict[str, float]
    """`eval/…`."""
    rollouts: dict[RecordedSplit, Sequence[Rollout]]
    results: tuple[SetResult, ...]


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
    """(sampled, greedy) held-out reward of each main evaluation so far; saved in checkpoints."""
    is_unfinished: bool = False
    """Whether an evaluation was begun and not finished, because the run was stopped meanwhile. Saved in checkpoints: a
    resumed run makes the evaluation again, from its start."""
    sets: Sequence[SetPlayer] = ()
    """The named sets."""
    best: BestWatch = field(default_factory=BestWatch)
    count: int = 0
    """Evaluations so far, of any set; saved in checkpoints."""

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after `step`: before the first step, every `eval.every` steps, and after the last. A set
        may have steps of its own."""
        return self._is_main_due(step, last_step) or any(each.is_due(step, last_step) for each in self.sets)

    def _is_main_due(self, step: int, last_step: int) -> bool:
        every = self.config.every if self.config.problems else 0
        return every > 0 and (step % every == 0 or step == last_step)

    @property
    def reached_target(self) -> bool:
        """Whether both rewards were at least `eval.target` in the last `eval.consecutive` evaluations."""
        target, last = self.config.target, self.history[-self.config.consecutive :]
        if target is None or len(last) < self.config.consecutive:
            return False
        return all(min(both) >= target for both in last)

    async def run(self, step: int, last_step: int | None = None, also: Mapping[str, float] | None = None) -> Evaluated:
        """Evaluate the weights after `step`: everything, or with `last_step`, the last step of the run, what is due.
        Metrics of this evaluation that were measured elsewhere (`also`) are part of it.

        May be cancelled: the history knows only whole evaluations.
        """
        self.is_unfinished = True
        metrics: dict[str, float] = dict(also or {})
        rollouts: dict[RecordedSplit, Sequence[Rollout]] = {}
        results: list[SetResult] = []
        rewards: tuple[float, float] | None = None
        if self.config.problems and (last_step is None or self._is_main_due(step, last_step)):
            played = await self._play(step)
            rewards = mean_reward(played["sampled"]), mean_reward(played["greedy"])
            metrics |= _main_metrics(rewards, played)
            rollouts |= {eval_split("", "sampled"): played["sampled"], eval_split("", "greedy"): played["greedy"]}
            results.append(_main_result(self.temperature, played))
        for each in self.sets:
            if last_step is None or each.is_due(step, last_step):
                of_set = await each.play(step)
                metrics |= of_set.metrics
                rollouts |= of_set.rollouts
                results.append(of_set.result)
        if rewards is not None:
            self.history.append(rewards)
        self.count += 1
        self.is_unfinished = False
        self.best.note(step, metrics)
        return Evaluated(metrics, rollouts, tuple(results))

    async def _play(self, step: int) -> dict[str, list[Rollout]]:
        """The rollouts of the main evaluation, "sampled" and "greedy"."""
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
        return rollouts


def _main_metrics(rewards: tuple[float, float], played: Mapping[str, Sequence[Rollout]]) -> dict[str, float]:
    metrics = {"eval/reward": rewards[0], "eval/reward_greedy": rewards[1]}
    for kind, suffix in (("sampled", ""), ("greedy", "_greedy")):
        means = mean_rewards(played[kind]) | mean_task_metrics(played[kind]) | by_task(played[kind], task_means)
        means |= tool_metrics(played[kind])
        metrics |= {f"eval/{key}{suffix}": value for key, value in means.items()}
    both = [*played["sampled"], *played["greedy"]]
    return metrics | {f"eval/{key}": value for key, value in replay_metrics(both).items()}


def _main_result(temperature: float, played: Mapping[str, Sequence[Rollout]]) -> SetResult:
    asked = tuple(
        asked_of(sampled.problem_id, [sampled], [greedy])
        for sampled, greedy in zip(played["sampled"], played["greedy"], strict=True)
    )
    settings = {"split": "eval", "problems": len(asked), "samples": 1, "greedy": True, "temperature": temperature}
    return SetResult(MAIN, 1.0, asked, scores(asked, 1.0), settings=settings)
