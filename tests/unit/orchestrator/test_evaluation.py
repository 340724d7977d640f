"""Held-out evaluation: when it is due, when the target is reached, and how faults count."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.drawn_problems import NumberedProblems
from vlmrl.config.orchestrator import EvalConfig
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.metrics import mean_reward
from vlmrl.orchestrator.stream import Drawn
from vlmrl.types import Group, Rollout, StopReason

NOBODY: Any = None


def evaluator(history: list[tuple[float, float]], **config: Any) -> Evaluator:
    return Evaluator(EvalConfig(**config), NOBODY, NOBODY, temperature=1.0, history=history)


def rollout(index: int, reward: float, stop_reason: StopReason = StopReason.TERMINATED, **metrics: float) -> Rollout:
    return Rollout(f"eval/{index}", "p", 0, [], reward, metrics, stop_reason)


@pytest.mark.parametrize(
    ("history", "reached"),
    [
        ([], False),
        ([(1.0, 1.0)], False),
        ([(1.0, 1.0), (0.9, 0.9)], True),
        ([(1.0, 1.0), (1.0, 0.89)], False),
        ([(0.89, 1.0), (1.0, 1.0)], False),
        ([(1.0, 1.0), (0.0, 0.0), (1.0, 1.0)], False),
        ([(0.0, 0.0), (0.95, 0.9), (0.9, 0.95)], True),
    ],
)
def test_the_target_is_met_by_both_rewards_at_consecutive_evaluations(
    history: list[tuple[float, float]], reached: bool
) -> None:
    assert evaluator(history, target=0.9, consecutive=2).reached_target is reached
    assert not evaluator(history, target=None, consecutive=2).reached_target


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))), st.integers(1, 4))
def test_reached_target_agrees_with_its_definition(history: list[tuple[float, float]], consecutive: int) -> None:
    tail = history[max(0, len(history) - consecutive) :]
    wanted = len(tail) == consecutive and min((reward for both in tail for reward in both), default=0) >= 0.5
    assert evaluator(history, target=0.5, consecutive=consecutive).reached_target is wanted


def test_an_evaluation_is_due_every_n_steps_and_after_the_last() -> None:
    every_four = evaluator([], every=4)
    assert [step for step in range(1, 11) if every_four.is_due(step, last_step=10)] == [4, 8, 10]
    assert not any(evaluator([], every=0).is_due(step, last_step=10) for step in range(11))


def test_a_fault_counts_as_zero() -> None:
    assert mean_reward([rollout(0, 1.0), rollout(1, 0.0, StopReason.IMAGE_ERROR)]) == 0.5


class ScriptedRunner:
    """All greedy rollouts get reward 1; every second sampled rollout is a fault without task metrics."""

    async def run_groups(self, *, split: str, step: int, problems: list[Drawn], **asked: Any) -> list[Group]:
        assert (split, step, asked["group_size"]) == ("eval", 7, 1)
        greedy = asked["temperature"] == 0.0
        assert greedy or asked["temperature"] == 0.8
        return [
            Group(
                "p",
                [rollout(i, 1.0, share=0.75) if greedy or i % 2 else rollout(i, 0.0, StopReason.TASK_ERROR)],
            )
            for i in (drawn.index for drawn in problems)
        ]


def test_a_run_is_sampled_and_greedy_on_the_same_problems_and_is_remembered() -> None:
    runner: Any = ScriptedRunner()
    problems: Any = NumberedProblems(split="eval")
    held_out = Evaluator(EvalConfig(problems=6, target=0.5, consecutive=2), runner, problems, temperature=0.8)
    evaluated = asyncio.run(held_out.run(7))
    metrics, rollouts = evaluated.metrics, evaluated.rollouts
    assert metrics == {
        "eval/reward": 0.5,
        "eval/reward_greedy": 1.0,
        "eval/task/share": 0.75,
        "eval/task/share_greedy": 0.75,
    }
    assert [r.rollout_id for r in rollouts["eval_sampled"]] == [r.rollout_id for r in rollouts["eval_greedy"]]
    assert len(rollouts["eval_greedy"]) == 6
    assert held_out.history == [(0.5, 1.0)]
    assert not held_out.is_unfinished
    assert not held_out.reached_target
    asyncio.run(held_out.run(7))
    assert held_out.reached_target
