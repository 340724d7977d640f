"""The filters on hand-written tokens, and their effect on a group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.config.algorithm import AlgorithmConfig, FilterConfig, FilterMode
from vlmrl.orchestrator.advantages import assign_advantages, mark_dropped
from vlmrl.orchestrator.filters import FILTERS, find_filtered, is_gibberish, is_repetition
from vlmrl.types import Completion, DropReason, Group, Prompt, Rollout, StopReason, Turn

VOCABULARY = 1000
UNIFORM = -math.log(VOCABULARY)


def completion(token_ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
    versions = np.zeros(len(token_ids), np.int64)
    return Completion(np.array(token_ids, np.int64), np.array(logprobs, np.float32), versions, "stop")


def rollout(*completions: Completion, reward: float = 0.0, stop: StopReason = StopReason.TERMINATED) -> Rollout:
    turns = [Turn(Prompt(np.array([1]), (), ()), each, "", [], branch=0, reward=0.0) for each in completions]
    return Rollout("r", "p", 0, turns, reward, {}, stop)


def test_every_filter_has_a_mode_and_a_reason() -> None:
    modes = {name for name, value in vars(FilterConfig()).items() if isinstance(value, FilterMode)}
    assert modes == set(FILTERS)
    assert all(reason.value == name for name, reason in FILTERS.items())


@pytest.mark.parametrize(
    ("token_id", "logprob", "expected"),
    [
        (700, UNIFORM - 2.01, True),
        (700, UNIFORM - 1.99, False),
        (700, -0.1, False),
        (659, UNIFORM - 9.0, False),
        (660, UNIFORM - 9.0, True),
    ],
)
def test_gibberish_is_rare_and_unlikely(token_id: int, logprob: float, expected: bool) -> None:
    sampled = completion([5, token_id, 6], [-0.5, logprob, -0.5])
    assert is_gibberish(sampled, FilterConfig(), VOCABULARY) is expected


def test_the_same_token_must_be_rare_and_unlikely() -> None:
    assert not is_gibberish(completion([700, 5], [-0.1, UNIFORM - 9.0]), FilterConfig(), VOCABULARY)


@given(st.lists(st.sampled_from([0.999, 0.5]), max_size=30), st.integers(1, 6))
def test_repetition_measures_the_longest_run(probabilities: list[float], window: int) -> None:
    text = "".join("x" if probability > 0.99 else "." for probability in probabilities)
    sampled = completion(range(len(text)), [math.log(probability) for probability in probabilities])
    assert is_repetition(sampled, FilterConfig(repetition_window=window)) is ("x" * window in text)


def test_a_run_does_not_continue_in_the_next_turn() -> None:
    half = completion([1, 2], [-1e-4, -1e-4])
    config = FilterConfig(repetition=FilterMode.drop, repetition_window=3)
    group = Group("p", [rollout(half, half), rollout(completion([1, 2, 3], [-1e-4] * 3))])
    find_filtered(group, config, VOCABULARY)
    assert [each.filtered for each in group.rollouts] == [(), (DropReason.REPETITION,)]


LOOPING, NOISE, SOUND = (
    completion([1] * 4, [-1e-4] * 4),
    completion([900], [UNIFORM - 5]),
    completion([3, 4], [-0.5, -0.7]),
)


@pytest.mark.parametrize(
    ("gibberish", "repetition", "filtered", "dropped"),
    [
        ("none", "none", [(), (), ()], [None, None, None]),
        ("track", "none", [("gibberish",), (), ()], [None, None, None]),
        ("track", "drop", [("gibberish",), ("repetition",), ()], [None, "repetition", None]),
        ("drop", "drop", [("gibberish",), ("repetition",), ()], ["gibberish", "repetition", None]),
    ],
)
def test_track_counts_and_drop_drops(
    gibberish: str,
    repetition: str,
    filtered: list[tuple[str, ...]],
    dropped: list[str | None],
) -> None:
    filters = FilterConfig(gibberish=FilterMode[gibberish], repetition=FilterMode[repetition], repetition_window=4)
    config = AlgorithmConfig(filters=filters)
    group = Group("p", [rollout(NOISE), rollout(LOOPING), rollout(SOUND, reward=1.0)])
    assign_advantages(group, config)
    find_filtered(group, filters, VOCABULARY)
    mark_dropped(group, config, (), version=0, max_staleness=0)
    assert [each.filtered for each in group.rollouts] == filtered
    assert [each.dropped for each in group.rollouts] == dropped
    assert all(each.turns[0].advantage for each in group.rollouts), "filtered rollouts still count in the baseline"


def test_a_fault_does_not_count_as_zero_advantage() -> None:
    config = AlgorithmConfig(filters=FilterConfig(zero_advantage=FilterMode.drop))
    group = Group("p", [rollout(SOUND), rollout(SOUND, stop=StopReason.TASK_ERROR), rollout()])
    assign_advantages(group, config)
    find_filtered(group, config.filters, VOCABULARY)
    mark_dropped(group, config, (), version=0, max_staleness=0)
    assert [each.filtered for each in group.rollouts] == [(DropReason.ZERO_ADVANTAGE,), (), ()]
    assert [each.dropped for each in group.rollouts] == [DropReason.ZERO_ADVANTAGE, DropReason.FAULT, DropReason.EMPTY]
