"""Which rewards are compared, against sums and means that are written out one turn at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, first, following
from support.video_rollouts import video, video_rollout
from vlmrl.config.algorithm import Advantage, AlgorithmConfig, Compare, Credit, KLConfig, OverlongConfig, Truncated
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.orchestrator.advantages import assign_advantages, group_normalized
from vlmrl.orchestrator.credit import (
    Comparison,
    comparisons,
    credit_metrics,
    kl_to_reference,
    overlong_share,
    reference_metrics,
    returns,
    shown,
)
from vlmrl.rendering.renderer import make_renderer
from vlmrl.types import Completion, FloatArray, Group, Image, Message, Prompt, Rollout, StopReason, Turn

RETURN = Credit["return"]

eighths = st.integers(-8, 8).map(lambda n: n / 8)
episodes = st.lists(st.lists(eighths, min_size=1, max_size=5), min_size=1, max_size=6)
discounts = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def turn(reward: float, length: int = 1, seen: str = "") -> Turn:
    """A turn in which the policy is shown a text."""
    tokens = np.ones(length, np.int64)
    completion = Completion(tokens, np.full(length, -1.0, np.float32), 0 * tokens, "stop")
    prompt = Prompt(np.array([1]), (), ())
    return Turn(prompt, completion, "", [Message.of("user", seen)], branch=0, reward=reward)


def group_of(episodes: Sequence[Sequence[float]], seen: Sequence[str] | None = None) -> Group:
    """`seen`: what each episode shows, a letter per turn."""
    shows = seen or ["?" * len(rewards) for rewards in episodes]
    rollouts = [
        Rollout(f"r{i}", "p", i, list(map(turn, rewards, [1] * 99, shows[i])), sum(rewards), {}, StopReason.TERMINATED)
        for i, rewards in enumerate(episodes)
    ]
    return Group("p", rollouts)


def advantages_of(group: Group) -> list[list[float]]:
    return [[turn.advantage for turn in rollout.turns] for rollout in group.rollouts]


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
    assert advantages_of(group) == [[-0.125, -0.25, -0.5], [0.125, 0.25, 0.5]]


def test_the_discount_leaves_other_credits_alone() -> None:
    for credit in (Credit.episode, Credit.turn):
        found = []
        for discount in (0.5, 1.0):
            group = group_of([[0.0, 1.0], [1.0, 1.0]])
            assign_advantages(group, AlgorithmConfig(credit=credit, discount=discount))
            found.append(advantages_of(group))
        assert found[0] == found[1]


# ── the same state ──────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[list[float]], list[str]]:
    """Rewards of each turn of each sibling, and what it was shown there: few states, so that siblings meet."""
    rewards = draw(episodes)
    return rewards, [draw(st.text("ABC", min_size=len(each), max_size=len(each))) for each in rewards]


@given(walk=walks(), discount=discounts, credit=st.sampled_from([Credit.turn, RETURN]))
def test_turns_are_compared_with_those_that_siblings_took_in_the_same_state(
    walk: tuple[list[list[float]], list[str]], discount: float, credit: Credit
) -> None:
    rewards, seen = walk
    places = [(i, t) for i, each in enumerate(rewards) for t in range(len(each))]
    value = {
        (i, t): rewards[i][t] if credit is Credit.turn else plain_return(rewards[i], t, discount) for i, t in places
    }
    group = group_of(rewards, seen)
    config = AlgorithmConfig(credit=credit, discount=discount, compare=Compare.state, advantage=Advantage.leave_one_out)
    assign_advantages(group, config)
    shared = 0
    for i, t in places:
        equal = [(j, u) for j, u in places if seen[j][u] == seen[i][t]]
        if any(j != i for j, _ in equal):
            shared += 1
        else:
            equal = [(j, u) for j, u in places if u == t]
        others = [value[place] for place in equal if place != (i, t)]
        expected = value[i, t] - mean(others) if others else 0.0
        assert group.rollouts[i].turns[t].advantage == pytest.approx(expected, abs=1e-5)
    assert credit_metrics([group], config) == {"credit/same_state": pytest.approx(shared / len(places))}


def test_the_example_of_the_module() -> None:
    """Sibling 2 comes back to B. C and D are seen by one sibling each."""
    group = group_of([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5]], ["ABC", "ABD", "ABB"])
    config = AlgorithmConfig(credit=RETURN, compare=Compare.state, advantage=Advantage.group_centered)
    found = [
        (each.by, each.rewards.tolist(), each.index.tolist(), each.turn.tolist(), each.learns.tolist())
        for each in comparisons(group.rollouts, config)
    ]
    assert found == [
        (Compare.state, [1.0, 0.0, 0.5], [0, 1, 2], [0, 0, 0], [True] * 3),
        (Compare.state, [1.0, 0.0, 0.5, 0.5], [0, 1, 2, 2], [1, 1, 1, 2], [True] * 4),
        (Compare.turn, [1.0, 0.0, 0.5], [0, 1, 2], [2, 2, 2], [True, True, False]),
    ]
    assign_advantages(group, config)
    assert advantages_of(group) == [[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [0.0, 0.0, 0.0]]


def test_coming_back_alone_is_no_comparison() -> None:
    """A rollout that nobody else meets is not judged by its own later visits, whose rewards are parts of its return."""
    group = group_of([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], ["AAA", "BBB"])
    assign_advantages(group, AlgorithmConfig(credit=RETURN, compare=Compare.state, advantage="group_centered"))
    assert advantages_of(group) == [[1.5, 1.0, 0.5], [-1.5, -1.0, -0.5]]


def test_other_comparisons_have_no_metric() -> None:
    assert credit_metrics([group_of([[1.0]])], AlgorithmConfig(credit=RETURN)) == {}


def gigpo(compared: Comparison, config: AlgorithmConfig) -> FloatArray:
    """An estimator as docs/your_loss.md shows it: GiGPO's sum of an advantage of the episode and one of the state."""
    of_episode = group_normalized(np.array([sum(t.reward for t in r.turns) for r in compared.siblings], np.float32))
    of_state = group_normalized(compared.rewards) if compared.by is Compare.state else 0.0
    return of_episode[compared.index] + of_state


def test_an_estimator_can_add_the_advantage_of_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrl.orchestrator.advantages.estimator_named", lambda name: gigpo)
    group = group_of([[0.0, 1.0], [0.0, 0.0]], ["AB", "AC"])
    assign_advantages(group, AlgorithmConfig(credit=RETURN, compare=Compare.state))
    assert np.round(advantages_of(group), 3).tolist() == [[2.0, 1.0], [-2.0, -1.0]]


def test_what_is_shown_is_what_came_since_the_last_answer(tiny_folder: Path) -> None:
    """Through the real renderer: the pixels of the newest messages, also where the conversation starts over."""
    renderer = make_renderer(
        RendererConfig(), MODEL, load_tokenizer(tiny_folder), load_image_processor(tiny_folder), 448, PLACEHOLDER_TOKENS
    )

    def frame(shade: int) -> Image:
        return Image(np.full((32, 32, 3), shade, np.uint8))

    def turn_of(prompt: Prompt, messages: Sequence[Message]) -> Turn:
        completion = Completion(np.array([5]), np.zeros(1, np.float32), np.zeros(1, np.int64), "stop")
        return Turn(prompt, completion, "", list(messages), branch=0, reward=0.0)

    opening = (Message.of("system", "Walk."), Message.of("user", "See:", frame(10)))
    start = first(renderer, opening)
    later = (Message.of("user", frame(20), "Go on.", frame(30)),)
    prompt, _ = following(renderer, start, np.array([5]), [*opening, Message.of("assistant", "a")], later)
    state = shown(turn_of(prompt, later))
    hashes = [image.hash for image in prompt.images]
    assert len(set(hashes)) == 3
    assert state == (hashes[1], hashes[2])
    assert shown(turn_of(start, opening)) == (hashes[0],)

    again = (*opening, Message.of("assistant", "b"), *later)
    assert shown(turn_of(first(renderer, again), again)) == state, "earlier frames and answers are no part of the state"

    def seen(*parts: Image | str) -> tuple[str, ...]:
        message = Message.of("user", *parts)
        return shown(turn_of(first(renderer, (message,)), (message,)))

    pixels = Image(PILImage.fromarray(np.full((32, 32, 3), 20, np.uint8)))
    assert seen(pixels, frame(30)) == state, "equal pixels, however they were given"
    assert seen("Turn 7:", frame(20), frame(30)) == state, "a text that differs at every turn"
    for other in ((frame(20), frame(31)), (frame(30), frame(20)), (frame(20),), (frame(20), frame(20), frame(30))):
        assert seen(*other) != state
    assert seen("You are in a cave.") == seen("You are in a cave.") != seen("You are in a hall.")


@given(walk=walks())
def test_every_turn_learns_once(walk: tuple[list[list[float]], list[str]]) -> None:
    """Whatever is compared, each turn of each sibling gets exactly one advantage."""
    group = group_of(*walk)
    for credit, compare in ((Credit.episode, Compare.turn), *product((Credit.turn, RETURN), Compare)):
        found = comparisons(group.rollouts, AlgorithmConfig(credit=credit, compare=compare))
        learning = [turn for each in found for place in range(len(each.rewards)) for turn in each.learning_turns(place)]
        assert len(learning) == len(set(map(id, learning))) == sum(map(len, walk[0]))


# ── estimators ──────────────────────────────────────────────────────────────────────────────────────────────


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


# ── the distance to the reference ───────────────────────────────────────────────────────────────────────────


def scored(made: Turn, *below: float) -> Turn:
    """A turn whose tokens the reference finds less likely than the sampler did, by so many nats."""
    made.reference_logprobs = made.completion.logprobs - np.array(below, np.float32)
    return made


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (Credit.episode, [[3.0 - 0.5 * 3.5, 4.0]]),
        (Credit.turn, [[1.0 - 0.5 * 3.0, 4.0], [2.0 - 0.5 * 0.5]]),
        (Credit["return"], [[3.0 - 0.5 * 3.5, 4.0], [2.0 - 0.5 * 0.5]]),
    ],
)
def test_the_distance_of_what_is_rewarded_is_taken_off_its_reward(credit: Credit, expected: list[list[float]]) -> None:
    turns = [scored(turn(1.0, 2), 1.0, 2.0), scored(turn(2.0, 3), 0.5, 0.25, -0.25)]
    first = Rollout("a", "p", 0, turns, 3.0, {}, StopReason.TERMINATED)
    second = Rollout("b", "p", 1, [scored(turn(4.0), 0.0)], 4.0, {}, StopReason.TERMINATED)
    config = AlgorithmConfig(credit=credit, kl=KLConfig(reward=0.5))
    assert [each.rewards.tolist() for each in comparisons([first, second], config)] == expected
    assert (first.reward, [each.reward for each in turns]) == (3.0, [1.0, 2.0]), "the record keeps the task's rewards"
    assert kl_to_reference(turns) == pytest.approx(3.5)
    assert reference_metrics([first, second], config) == {"reference_kl/penalty": pytest.approx(0.875)}
    assert reference_metrics([first, second], AlgorithmConfig()) == {}


def test_a_turn_that_nobody_scored_costs_nothing() -> None:
    assert kl_to_reference([turn(1.0, 2)]) == 0.0


# ── long answers ────────────────────────────────────────────────────────────────────────────────────────────

# R_length of arXiv 2503.14476, eq. 13, by hand for L_max = 20 and L_cache = 4: tokens → reward.
BY_HAND = {1: 0.0, 15: 0.0, 16: 0.0, 17: -0.25, 18: -0.5, 19: -0.75, 20: -1.0, 21: -1.0, 99: -1.0}


def lengths_disagree(share: Callable[[Sequence[Turn], OverlongConfig], float]) -> list[int]:
    """The lengths at which a function differs from the table."""
    config = OverlongConfig(tokens=4, longest=20)
    return [n for n, reward in BY_HAND.items() if share([turn(0.0, n)], config) != pytest.approx(-reward)]


def test_the_punishment_of_a_length_is_that_of_the_paper() -> None:
    assert lengths_disagree(overlong_share) == []
    assert overlong_share([turn(0.0, 17), turn(0.0, 20), turn(0.0, 3)], OverlongConfig(tokens=4, longest=20)) == 1.25
    assert overlong_share([turn(0.0, 99)], OverlongConfig()) == 0.0


@pytest.mark.parametrize(
    "planted",
    [
        lambda n, longest, tokens: (longest - tokens - n) / tokens,  # sign
        lambda n, longest, tokens: (n + 1 - longest + tokens) / tokens,  # off by one
        lambda n, longest, tokens: (n - longest + tokens) / longest,  # wrong normalization
    ],
)
def test_the_table_finds_a_wrong_punishment(planted: Callable[[int, int, int], float]) -> None:
    def wrong(turns: Sequence[Turn], config: OverlongConfig) -> float:
        return min(max(planted(len(turns[0].completion.token_ids), 20, config.tokens), 0.0), 1.0)

    assert lengths_disagree(wrong)


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (Credit.episode, [[3.0 - 2.0 * 1.25, 4.0]]),
        (Credit.turn, [[1.0 - 2.0 * 0.25, 4.0], [2.0 - 2.0 * 1.0]]),
        (Credit["return"], [[(1.0 - 2.0 * 0.25) + 0.5 * (2.0 - 2.0 * 1.0), 4.0], [2.0 - 2.0 * 1.0]]),
    ],
)
def test_the_length_of_what_is_rewarded_is_taken_off_its_reward(credit: Credit, expected: list[list[float]]) -> None:
    turns = [turn(1.0, 17), turn(2.0, 20)]
    first = Rollout("a", "p", 0, turns, 3.0, {}, StopReason.TERMINATED)
    second = Rollout("b", "p", 1, [turn(4.0, 16)], 4.0, {}, StopReason.TERMINATED)
    config = AlgorithmConfig(credit=credit, discount=0.5, overlong=OverlongConfig(tokens=4, penalty=2.0))
    config = config.for_answers_up_to(20)
    assert [each.rewards.tolist() for each in comparisons([first, second], config)] == expected
    assert (first.reward, [each.reward for each in turns]) == (3.0, [1.0, 2.0]), "the record keeps the task's rewards"
    metrics = {"overlong/penalty": pytest.approx(2.0 * 1.25 / 2), "overlong/share": pytest.approx(2 / 3)}
    assert credit_metrics([Group("p", [first, second])], config) == metrics
    assert credit_metrics([Group("p", [first, second])], AlgorithmConfig()) == {}


@pytest.mark.parametrize(
    ("truncated", "expected"),
    [
        (Truncated.keep, [1.0 - 0.0, 1.0 - 0.5, 1.0 - 1.0]),
        (Truncated.zero, [1.0 - 0.0, 1.0 - 0.5, 0.0 - 1.0]),
        (Truncated.mask, [1.0 - 0.0, 1.0 - 0.5]),
    ],
)
def test_long_answers_are_punished_and_cut_ones_paid_as_before(truncated: Truncated, expected: list[float]) -> None:
    """One answer is short, one is long and ends, one is cut at `max_new_tokens`; the task pays each of them 1."""
    group = Group("p", [Rollout(str(n), "p", 0, [turn(1.0, n)], 1.0, {}, StopReason.TERMINATED) for n in (5, 18, 20)])
    cut = group.rollouts[2].turns[0]
    cut.completion = replace(cut.completion, finish_reason="length")
    overlong = OverlongConfig(tokens=4)
    config = AlgorithmConfig(truncated=truncated, overlong=overlong, advantage=Advantage.group_centered)
    assign_advantages(group, config.for_answers_up_to(20))
    centered = [reward - np.mean(expected) for reward in expected]
    found = [each.turns[0].advantage for each in group.rollouts]
    assert found == pytest.approx(centered + [0.0] * (3 - len(expected)))


def test_a_length_of_ones_own_stays() -> None:
    config = AlgorithmConfig(overlong=OverlongConfig(tokens=4, longest=12))
    assert config.for_answers_up_to(20).overlong.longest == 12
    assert config.for_answers_up_to(20) == config


def test_turns_that_show_a_video_are_in_its_state() -> None:
    """The state is the video's hash, not the text next to it, and not the images of the turns before."""
    turns = video_rollout().turns
    assert shown(turns[0]) == tuple(item.hash for item in turns[0].prompt.mm_items)
    assert shown(turns[1]) == (video(2).hash,)
    backwards = video(2, video(2).frames[::-1])
    assert shown(video_rollout((backwards,)).turns[0]) != shown(turns[1])
