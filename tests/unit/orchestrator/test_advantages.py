from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.config.algorithm import Advantage, AlgorithmConfig, Credit, FilterConfig, FilterMode, Truncated
from vlmrl.orchestrator.advantages import (
    EPS,
    OF_REWARDS,
    assign_advantages,
    group_centered,
    group_normalized,
    leave_one_out,
    mark_dropped,
)
from vlmrl.orchestrator.filters import find_filtered
from vlmrl.types import Completion, DropReason, FloatArray, Group, Prompt, Rollout, StopReason, Turn

IMAGE_TOKEN = 99

group_rewards = st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=2, max_size=16).map(
    lambda values: np.array(values, np.float32)
)
any_estimator = pytest.mark.parametrize("advantage", sorted(OF_REWARDS))


def turn(reward: float, *, token_ids: Sequence[int] = (5, 6), version: int = 0, cut: bool = False) -> Turn:
    completion = Completion(
        token_ids=np.array(token_ids, np.int64),
        logprobs=np.full(len(token_ids), -1.0, np.float32),
        versions=np.full(len(token_ids), version, np.int64),
        finish_reason="length" if cut else "stop",
    )
    return Turn(Prompt(np.array([1, 2]), (), ()), completion, "", [], branch=0, reward=reward)


def rollout(turns: list[Turn], reward: float = 0.0, stop_reason: StopReason = StopReason.TERMINATED) -> Rollout:
    return Rollout("train/000001/00/00", "p", 0, turns, reward, {}, stop_reason)


def advantages_of(group: Group) -> list[list[float]]:
    return [[t.advantage for t in r.turns] for r in group.rollouts]


# ── estimators ──────────────────────────────────────────────────────────────────────────────────────────────


@any_estimator
@given(rewards=group_rewards)
def test_advantages_of_a_group_sum_to_zero(advantage: str, rewards: FloatArray) -> None:
    found = OF_REWARDS[advantage](rewards)
    assert found.dtype == np.float32
    assert found.shape == rewards.shape
    assert abs(found.sum(dtype=np.float64)) <= 1e-6 * max(1.0, np.abs(found).sum())


@any_estimator
@given(rewards=group_rewards, shift=st.integers(-16, 16))
def test_a_constant_added_to_all_rewards_changes_nothing(advantage: str, rewards: FloatArray, shift: int) -> None:
    np.testing.assert_allclose(
        OF_REWARDS[advantage](rewards + np.float32(shift)), OF_REWARDS[advantage](rewards), rtol=1e-6, atol=1e-6
    )


@given(rewards=group_rewards, scale=st.sampled_from([0.25, 0.5, 2.0, 16.0]))
def test_scaled_rewards_scale_the_advantages_unless_they_are_normalized(rewards: FloatArray, scale: float) -> None:
    scaled = rewards * np.float32(scale)
    np.testing.assert_array_equal(group_centered(scaled), group_centered(rewards) * np.float32(scale))
    np.testing.assert_array_equal(leave_one_out(scaled), leave_one_out(rewards) * np.float32(scale))
    np.testing.assert_allclose(group_normalized(scaled), group_normalized(rewards), rtol=1e-4)


@any_estimator
@given(rewards=group_rewards, data=st.data())
def test_the_order_of_siblings_does_not_matter(advantage: str, rewards: FloatArray, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(rewards)))))
    estimator = OF_REWARDS[advantage]
    np.testing.assert_allclose(estimator(rewards[order]), estimator(rewards)[order], rtol=1e-6, atol=1e-7)


@any_estimator
@given(reward=st.floats(-1e3, 1e3, width=32), size=st.integers(0, 33))
def test_equal_rewards_give_exactly_zero(advantage: str, reward: float, size: int) -> None:
    found = OF_REWARDS[advantage](np.full(size, reward, np.float32))
    assert found.tolist() == [0.0] * size


@given(rewards=group_rewards)
def test_normalized_advantages_have_unit_spread(rewards: FloatArray) -> None:
    spread = float(rewards.astype(np.float64).std())
    assert group_normalized(rewards).std() == pytest.approx(spread / (spread + EPS), rel=1e-5)


@given(rewards=group_rewards)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards: FloatArray) -> None:
    expected = [r - np.mean(np.delete(rewards, i), dtype=np.float64) for i, r in enumerate(rewards)]
    np.testing.assert_allclose(leave_one_out(rewards), expected, rtol=1e-5, atol=1e-6)


# ── credit ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_episode_credit_gives_every_turn_the_episodes_advantage() -> None:
    group = Group("p", [rollout([turn(1.0), turn(0.0)], reward=1.0), rollout([turn(1.0)], reward=0.0)])
    assign_advantages(group, AlgorithmConfig(advantage=Advantage.group_centered, credit=Credit.episode))
    assert advantages_of(group) == [[0.5, 0.5], [-0.5]]


def test_turn_credit_compares_a_turn_with_the_same_turn_of_siblings_that_have_one() -> None:
    group = Group(
        "p", [rollout([turn(1.0), turn(0.5), turn(0.7)]), rollout([turn(0.0), turn(0.0)]), rollout([turn(0.5)])]
    )
    assign_advantages(group, AlgorithmConfig(advantage=Advantage.group_centered, credit=Credit.turn))
    assert advantages_of(group) == [[0.5, 0.25, 0.0], [-0.5, -0.25], [0.0]]


@any_estimator
@given(turn_rewards=st.lists(st.lists(st.integers(0, 8).map(lambda e: e / 8), max_size=4), max_size=8), data=st.data())
def test_turn_advantages_sum_to_zero_at_each_turn_and_faults_are_no_siblings(
    advantage: str, turn_rewards: list[list[float]], data: st.DataObject
) -> None:
    rollouts = [
        rollout([turn(r) for r in rewards], stop_reason=data.draw(st.sampled_from(list(StopReason))))
        for rewards in turn_rewards
    ]
    sound = [r for r in rollouts if not r.stop_reason.is_fault]
    config = AlgorithmConfig(advantage=advantage, credit=Credit.turn)

    assign_advantages(Group("p", rollouts), config)
    with_faults = advantages_of(Group("p", sound))
    assign_advantages(Group("p", sound), config)

    assert with_faults == advantages_of(Group("p", sound))
    assert all(t.advantage == 0.0 for r in rollouts if r.stop_reason.is_fault for t in r.turns)
    for index in range(4):
        column = [r.turns[index].advantage for r in sound if len(r.turns) > index]
        assert abs(sum(column)) <= 1e-5
        if len(column) < 2:
            assert column in ([], [0.0])


def test_a_rollout_without_turns_is_no_sibling() -> None:
    played = [rollout([turn(0.0)], reward=r) for r in (1.0, 0.5)]
    group = Group("p", [*played, rollout([], stop_reason=StopReason.CONTEXT_FULL)])
    assign_advantages(group, AlgorithmConfig(advantage=Advantage.group_centered))
    assert advantages_of(group) == [[0.25], [-0.25], []]


def test_a_lone_survivor_of_a_group_has_advantage_zero() -> None:
    fault = rollout([turn(0.0)], stop_reason=StopReason.TASK_ERROR)
    group = Group("p", [rollout([turn(1.0)], reward=1.0), fault, fault])
    assign_advantages(group, AlgorithmConfig())
    assert advantages_of(group) == [[0.0], [0.0], [0.0]]


def test_assigning_again_overwrites_old_advantages() -> None:
    group = Group("p", [rollout([turn(1.0)], reward=1.0), rollout([turn(0.0)], reward=0.0)])
    assign_advantages(group, AlgorithmConfig())
    group.rollouts[1].stop_reason = StopReason.BAD_REWARD
    assign_advantages(group, AlgorithmConfig())
    assert advantages_of(group) == [[0.0], [0.0]]


def scored(*episodes: tuple[float, list[float]], fault: bool = False) -> Group:
    """A group of rollouts: the episode's reward and those of its turns. `fault`: the last one failed."""
    rollouts = [rollout([turn(each) for each in turns], reward) for reward, turns in episodes]
    if fault:
        rollouts[-1].stop_reason = StopReason.TASK_ERROR
    return Group("p", rollouts)


@pytest.mark.parametrize(
    ("group", "equal"),  # with credit=episode, turn and return
    [
        (scored((1.0, [0.0, 0.0]), (0.0, [0.0, 0.0])), (False, True, True)),  # the task never sets turn_reward
        (scored((0.5, [1.0, 0.0]), (0.5, [0.0, 1.0])), (True, False, False)),
        (scored((0.5, [1.0, 0.0]), (0.5, [1.0])), (True, True, True)),
        (scored((0.5, [1.0, 1.0]), (0.5, [1.0])), (True, True, False)),  # the later turn is a part of the return
        (scored((0.0, [0.0]), (1.0, [1.0])), (False, False, False)),
        (scored((0.0, [0.0]), (0.0, [0.0]), (1.0, [1.0]), fault=True), (True, True, True)),  # a fault is not compared
        (scored((0.0, [0.0]), (1.0, [1.0]), fault=True), (False, False, False)),  # nothing is left to compare
    ],
)
def test_equal_rewards_are_looked_for_where_they_are_compared(group: Group, equal: tuple[bool, bool, bool]) -> None:
    for credit, expected in zip((Credit.episode, Credit.turn, Credit["return"]), equal, strict=True):
        assign_advantages(group, AlgorithmConfig(credit=credit))
        assert group.compares_equal is expected, credit


# ── dropping ────────────────────────────────────────────────────────────────────────────────────────────────


def dropped(group: Group, config: AlgorithmConfig, version: int = 0, max_staleness: int = 0) -> list[DropReason | None]:
    assign_advantages(group, config)
    find_filtered(group, config.filters, vocab_size=100)
    mark_dropped(group, config, [IMAGE_TOKEN], version, max_staleness)
    return [r.dropped for r in group.rollouts]


def test_each_reason_by_name() -> None:
    group = Group(
        "p",
        [
            rollout([turn(0.0, version=3)], reward=1.0),
            rollout([turn(0.0, version=3)], stop_reason=StopReason.ENGINE_ERROR),
            rollout([], stop_reason=StopReason.CONTEXT_FULL),
            rollout([turn(0.0, version=3), turn(0.0, token_ids=[5, IMAGE_TOKEN, 6], version=3)]),
            rollout([turn(0.0, version=3), turn(0.0, version=1)]),
        ],
    )
    assert dropped(group, AlgorithmConfig(), version=4, max_staleness=2) == [
        None,
        DropReason.FAULT,
        DropReason.EMPTY,
        DropReason.STRAY_IMAGE_TOKEN,
        DropReason.STALE,
    ]


@pytest.mark.parametrize(("version", "reason"), [(5, None), (6, None), (7, DropReason.STALE)])
def test_staleness_up_to_the_bound_is_kept(version: int, reason: DropReason | None) -> None:
    group = Group("p", [rollout([turn(0.0, version=5)])])
    assert dropped(group, AlgorithmConfig(), version=version, max_staleness=1) == [reason]


def test_a_rollout_that_became_stale_in_a_queue_is_dropped() -> None:
    group = Group("p", [rollout([turn(0.0, version=0)], reward=r) for r in (0.0, 1.0)])
    assert dropped(group, AlgorithmConfig(), version=1, max_staleness=1) == [None, None]
    assert dropped(group, AlgorithmConfig(), version=2, max_staleness=1) == [DropReason.STALE, DropReason.STALE]


def test_a_stray_image_token_counts_in_the_statistics_and_is_dropped() -> None:
    stray = rollout([turn(0.0, token_ids=[IMAGE_TOKEN])], reward=0.0)
    group = Group("p", [rollout([turn(0.0)], reward=1.0), stray])
    assert dropped(group, AlgorithmConfig(advantage=Advantage.group_centered)) == [None, DropReason.STRAY_IMAGE_TOKEN]
    assert advantages_of(group) == [[0.5], [-0.5]]


@pytest.mark.parametrize(
    ("rewards", "mode", "expected"),
    [
        ((1.0, 1.0, 1.0), FilterMode.drop, [DropReason.ZERO_ADVANTAGE] * 3),
        ((1.0, 1.0, 1.0), FilterMode.track, [None] * 3),
        ((1.0, 1.0, 1.0), FilterMode.none, [None] * 3),
        # The middle rollout has advantage zero, but its group has a gradient.
        ((0.0, 0.5, 1.0), FilterMode.drop, [None] * 3),
    ],
)
def test_groups_without_a_signal_are_dropped_where_the_algorithm_filters(
    rewards: tuple[float, ...], mode: FilterMode, expected: list[DropReason | None]
) -> None:
    group = Group("p", [rollout([turn(0.0)], reward=r) for r in rewards])
    assert dropped(group, AlgorithmConfig(filters=FilterConfig(zero_advantage=mode))) == expected


# ── cut answers ─────────────────────────────────────────────────────────────────────────────────────────────


def with_a_cut_answer() -> Group:
    """Two whole answers, worth 1 and 0, and one that was cut in its second turn, worth 1 by what the task says."""
    return Group(
        "p",
        [
            rollout([turn(1.0), turn(1.0)], 1.0),
            rollout([turn(0.0), turn(0.0)], 0.0),
            rollout([turn(1.0), turn(1.0, cut=True)], 1.0, StopReason.MAX_NEW_TOKENS),
        ],
    )


@pytest.mark.parametrize("credit", Credit)
@pytest.mark.parametrize(
    ("truncated", "last_turn", "dropped"),
    [
        # r − mean of the last turns' rewards, or of the episodes': (1, 0, 0), (1, 0, 1) and (1, 0)
        (Truncated.zero, [2 / 3, -1 / 3, -1 / 3], None),
        (Truncated.keep, [1 / 3, -2 / 3, 1 / 3], None),
        (Truncated.mask, [0.5, -0.5, 0.0], DropReason.TRUNCATED),
    ],
)
def test_a_cut_answer_is_paid_the_same_under_every_credit(
    credit: Credit, truncated: Truncated, last_turn: list[float], dropped: DropReason | None
) -> None:
    config = AlgorithmConfig(advantage=Advantage.group_centered, credit=credit, truncated=truncated)
    group = with_a_cut_answer()
    assign_advantages(group, config)
    mark_dropped(group, config, {IMAGE_TOKEN}, version=0, max_staleness=0)
    assert [r.turns[-1].advantage for r in group.rollouts] == pytest.approx(last_turn)
    assert [r.dropped for r in group.rollouts] == [None, None, dropped]
    assert group.rollouts[2].reward == (0.0 if truncated is Truncated.zero else 1.0)


@pytest.mark.parametrize("truncated", [Truncated.zero, Truncated.keep])
def test_a_cut_answer_is_no_way_around_a_penalty(truncated: Truncated) -> None:
    group = with_a_cut_answer()
    group.rollouts[2].reward = group.rollouts[2].turns[-1].reward = -1.0
    assign_advantages(group, AlgorithmConfig(advantage=Advantage.group_centered, truncated=truncated))
    assert (group.rollouts[2].reward, group.rollouts[2].turns[-1].reward) == (-1.0, -1.0)
    assert [r.turns[-1].advantage for r in group.rollouts] == pytest.approx([1.0, 0.0, -1.0])


@pytest.mark.parametrize("stop_reason", [StopReason.MAX_TURNS, StopReason.CONTEXT_FULL])
@pytest.mark.parametrize("truncated", Truncated)
def test_a_whole_answer_keeps_its_reward_however_the_episode_ended(
    stop_reason: StopReason, truncated: Truncated
) -> None:
    config = AlgorithmConfig(advantage=Advantage.group_centered, truncated=truncated)
    group = Group("p", [rollout([turn(1.0)], 1.0, stop_reason), rollout([turn(0.0)], 0.0)])
    assign_advantages(group, config)
    mark_dropped(group, config, {IMAGE_TOKEN}, version=0, max_staleness=0)
    assert [(r.turns[0].advantage, r.dropped) for r in group.rollouts] == [(0.5, None), (-0.5, None)]


def test_without_an_advantage_equal_rewards_are_no_news() -> None:
    """With `algorithm.advantage=none` rewards teach nothing, so the monitor need not warn that they are equal."""
    for advantage, expected in (("group_centered", True), ("none", False)):
        group = scored((1.0, [1.0]), (1.0, [1.0]))
        assign_advantages(group, AlgorithmConfig(advantage=advantage))
        assert group.compares_equal is expected
        assert {turn.advantage for rollout in group.rollouts for turn in rollout.turns} == {0.0}
