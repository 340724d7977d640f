"""Which rewards are compared, against sums and means that are written out one turn at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.config.algorithm import Advantage, AlgorithmConfig, Credit
from vlmrl.orchestrator.advantages import assign_advantages
from vlmrl.orchestrator.credit import Comparison, comparisons, returns
from vlmrl.types import Completion, Group, Prompt, Rollout, StopReason, Turn

RETURN = Credit["return"]

eighths = st.integers(-8, 8).map(lambda n: n / 8)
episodes = st.lists(st.lists(eighths, min_size=1, max_size=5), min_size=1, max_size=6)
discounts = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def turn(reward: float, length: int = 1) -> Turn:
    tokens = np.ones(length, np.int64)
    completion = Completion(tokens, np.full(length, -1.0, np.float32), 0 * tokens, "stop")
    return Turn(Prompt(np.array([1]), (), ()), completion, "", [], branch=0, reward=reward)


def group_of(episodes: Sequence[Sequence[float]]) -> Group:
    rollouts = [
        Rollout(f"r{i}", "p", i, [turn(reward) for reward in rewards], sum(rewards), {}, StopReason.TERMINATED)
        for i, rewards in enumerate(episodes)
    ]
    return Group("p", rollouts)


def plain_return(rewards: Sequence[float], t: int, discount: float) -> float:
    return sum(discount ** (later - t) * rewards[later] for later in range(t, len(rewards)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@given(rewards=st.lists(eighths, max_size=8), discount=discounts)
def test_a_return_is_the_discounted_sum_of_the_rewards_from_its_turn_on(rewards: list[float], discount: float) -> None:
    assert returns(rewards, discount) == pytest.approx(
        [plain_return(rewards, t, discount) for t in range(len(rewards))], abs=1e-12
    )


@given(episodes=episodes, discount=discounts)
def test_returns_are_compared_with_the_same_turn_of_siblings(episodes: list[list[float]], discount: float) -> None:
    group = group_of(episodes)
    config = AlgorithmConfig(credit=RETURN, discount=discount, advantage=Advantage.leave_one_out)
    assign_advantages(group, config)
    for i, rewards in enumerate(episodes):
        for t in range(len(rewards)):
            others = [plain_return(o, t, discount) for j, o in enumerate(episodes) if j != i and len(o) > t]
            expected = plain_return(rewards, t, discount) - mean(others) if others else 0.0
            assert group.rollouts[i].turns[t].advantage == pytest.approx(expected, abs=1e-5)


def test_a_worked_example() -> None:
    """Two episodes; the second one wins with its third move. γ = 0.5."""
    group = group_of([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assign_advantages(group, AlgorithmConfig(credit=RETURN, discount=0.5, advantage=Advantage.group_centered))
    assert [[t.advantage for t in r.turns] for r in group.rollouts] == [[-0.125, -0.25, -0.5], [0.125, 0.25, 0.5]]


def test_the_discount_leaves_other_credits_alone() -> None:
    for credit in (Credit.episode, Credit.turn):
        found = []
        for discount in (0.5, 1.0):
            group = group_of([[0.0, 1.0], [1.0, 1.0]])
            assign_advantages(group, AlgorithmConfig(credit=credit, discount=discount))
            found.append([t.advantage for r in group.rollouts for t in r.turns])
        assert found[0] == found[1]


@given(episodes=episodes)
def test_every_turn_is_compared_once(episodes: list[list[float]]) -> None:
    """Whatever is compared, each turn of each sibling gets exactly one advantage."""
    group = group_of(episodes)
    for credit in Credit:
        seen: list[tuple[int, int]] = []
        for each in comparisons(group.rollouts, AlgorithmConfig(credit=credit)):
            for index, t in zip(each.index.tolist(), each.turn.tolist(), strict=True):
                seen += [(index, t)] if t >= 0 else [(index, all_) for all_ in range(len(episodes[index]))]
        assert sorted(seen) == [(i, t) for i, rewards in enumerate(episodes) for t in range(len(rewards))]


def test_nothing_is_compared_where_no_rollout_counts() -> None:
    assert all(comparisons([], AlgorithmConfig(credit=credit)) == [] for credit in Credit)


def test_what_an_estimator_sees() -> None:
    first = Rollout("a", "p", 0, [turn(1.0, 2), turn(2.0, 3)], 3.0, {"steps": 2.0}, StopReason.TERMINATED)
    second = Rollout("b", "p", 1, [turn(4.0, 7)], 4.0, {"steps": 1.0}, StopReason.MAX_TURNS)

    def seen(credit: Credit) -> list[Comparison]:
        return comparisons([first, second], AlgorithmConfig(credit=credit))

    (whole,) = seen(Credit.episode)
    assert (whole.rewards.tolist(), whole.lengths.tolist(), whole.turn.tolist()) == ([3.0, 4.0], [5, 7], [-1, -1])
    assert whole.rollouts == [first, second]
    at_start, later = seen(RETURN)
    assert (at_start.rewards.tolist(), at_start.lengths.tolist()) == ([3.0, 4.0], [2, 7])
    assert (later.rewards.tolist(), later.lengths.tolist()) == ([2.0], [3])
    assert (at_start.turn.tolist(), later.turn.tolist()) == ([0, 0], [1])
    assert later.rollouts == [first]
    assert later.siblings == (first, second)
    assert later.rewards.dtype == np.float32
