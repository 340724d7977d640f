"""Advantages from a value function equal the sums of the paper, and each turn gets its own part of them.

The references add up the errors of arXiv 1506.02438, eq. 16, one by one in float64. verl's and TRL's loops, read in
2026-11, compute the same: one γ from the last token of a turn to the first of the next one, nothing after the last
token, returns before whitening.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from support.rollout_builders import prompt, turn
from vlmrl.config.algorithm import Advantage, AlgorithmConfig, Credit, KLConfig, OverlongConfig
from vlmrl.config.critic import GAEConfig, GAELevel
from vlmrl.orchestrator import gae as module
from vlmrl.orchestrator.advantages import assign_advantages
from vlmrl.orchestrator.credit import returns
from vlmrl.orchestrator.gae import gae, whiten
from vlmrl.orchestrator.samples import make_samples, note_before
from vlmrl.types import DropReason, Group, Rollout, StopReason, TokenMetrics, Turn, TurnSampling

Array = NDArray[np.float64]
RETURN = Credit["return"]


def paper(rewards: Array, values: Array, discounts: Array, lam: float) -> Array:
    """A_t = Σ_l λ^l (d_t … d_{t+l−1}) δ_{t+l}, δ_t = r_t + d_t V_{t+1} − V_t (eq. 16, with a discount per action)."""
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    errors = [rewards[t] + discounts[t] * ahead[t] - values[t] for t in range(n)]
    return np.array(
        [sum(lam**k * np.prod(discounts[t : t + k]) * errors[t + k] for k in range(n - t)) for t in range(n)]
    )


def assert_is_the_paper(function: Callable[[Array, Array, Array, float], Array]) -> None:
    random = np.random.default_rng(0)
    for n, lam in ((1, 0.9), (2, 0.0), (7, 0.95), (12, 1.0)):
        rewards, values = random.normal(size=(2, n))
        discounts = random.uniform(0.5, 1.0, n)
        np.testing.assert_allclose(function(rewards, values, discounts, lam), paper(rewards, values, discounts, lam))


def test_it_is_the_sum_of_the_paper() -> None:
    assert_is_the_paper(gae)


GAE_MISTAKES: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "sign of the value": lambda r, v, d, lam: gae(r, -v, d, lam),
    "a token late": lambda r, v, d, lam: gae(r, np.roll(v, 1), d, lam),
    "lambda twice": lambda r, v, d, lam: gae(r, v, d, lam * lam) if 0 < lam < 1 else gae(r, v, d, lam),
    "the discount of the next": lambda r, v, d, lam: gae(r, v, np.roll(d, 1), lam),
    "divided by the length": lambda r, v, d, lam: gae(r, v, d, lam) / len(r),
}


@pytest.mark.parametrize("mistake", GAE_MISTAKES)
def test_a_mistake_in_it_is_found(mistake: str) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_paper(GAE_MISTAKES[mistake])


# ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


def played(lengths: Sequence[int], rewards: Sequence[float], values: Sequence[float], reward: float = 0.0) -> Rollout:
    """Turns of so many tokens with these rewards, and a value for each token of all turns."""
    turns: list[Turn] = []
    for number, (length, paid) in enumerate(zip(lengths, rewards, strict=True)):
        made = turn(prompt([1, 2], [], turns[-1] if turns else None), [], tokens=length, seed=number)
        made.reward = paid
        start = sum(lengths[:number])
        own = np.array(values[start : start + length], np.float32)
        made.before = TokenMetrics(made.completion.logprobs, np.ones_like(own), own)
        turns.append(made)
    return Rollout("train/1/0/0", "p", 0, turns, reward, {}, StopReason.TERMINATED)


def config(credit: Credit = RETURN, discount: float = 1.0, **settings: object) -> AlgorithmConfig:
    chosen = GAEConfig(**{"whiten": False, **settings})  # type: ignore[arg-type]
    return AlgorithmConfig(advantage=Advantage.gae, credit=credit, discount=discount, gae=chosen)


def advantages(rollout: Rollout, algorithm: AlgorithmConfig) -> list[list[float]]:
    assign_advantages(Group("p", [rollout]), algorithm)
    return [[] if t.token_advantages is None else t.token_advantages.tolist() for t in rollout.turns]


VALUES = (0.5, 0.25, -0.5, 0.75, 0.125, 1.0)


@pytest.mark.parametrize(
    ("credit", "discount", "rewards", "discounts"),
    [
        (Credit.episode, 1.0, [0, 0, 0, 0, 0, 3.0], [0.9, 0.9, 0.9, 0.9, 0.9, 0]),
        (RETURN, 0.5, [0, 1.0, 0, 0, -1.0, 2.0], [0.9, 0.45, 0.9, 0.9, 0.45, 0]),
        (Credit.turn, 1.0, [0, 1.0, 0, 0, -1.0, 2.0], [0.9, 0, 0.9, 0.9, 0, 0]),
    ],
)
def test_rewards_come_at_the_last_token_and_turns_follow_each_other_by_the_credit(
    credit: Credit, discount: float, rewards: list[float], discounts: list[float]
) -> None:
    rollout = played([2, 3, 1], [1.0, -1.0, 2.0], VALUES, reward=3.0)
    found = advantages(rollout, config(credit, discount, gamma=0.9, lam=0.8))
    wanted = paper(np.array(rewards), np.array(VALUES), np.array(discounts), 0.8)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        np.concatenate([t.returns for t in rollout.turns if t.returns is not None]), wanted + VALUES, rtol=1e-6
    )
    assert [t.advantage for t in rollout.turns] == pytest.approx([wanted[:2].mean(), wanted[2:5].mean(), wanted[5]])


def test_a_turn_as_one_action_is_valued_before_its_first_token() -> None:
    rollout = played([2, 3, 1], [1.0, -1.0, 2.0], VALUES)
    found = advantages(rollout, config(RETURN, 0.5, level=GAELevel.turn, lam=0.8))
    before = np.array([VALUES[0], VALUES[2], VALUES[5]])
    wanted = paper(np.array([1.0, -1.0, 2.0]), before, np.array([0.5, 0.5, 0]), 0.8)
    assert found == [pytest.approx([wanted[0]] * 2), pytest.approx([wanted[1]] * 3), pytest.approx([wanted[2]])]
    targets = [t.returns.tolist() for t in rollout.turns if t.returns is not None]
    assert targets[1] == pytest.approx([wanted[1] + before[1]] * 3)


@pytest.mark.parametrize("level", GAELevel)
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_without_values_it_is_reinforce_with_returns(level: GAELevel, discount: float) -> None:
    """γ = λ = 1 and V = 0: each token gets the return of its turn, as `algorithm.credit=return` has it."""
    rollout = played([2, 3, 1], [1.0, -1.0, 2.0], [0.0] * 6)
    found = advantages(rollout, config(RETURN, discount, level=level))
    assert found == [[r] * n for r, n in zip(returns([1.0, -1.0, 2.0], discount), (2, 3, 1), strict=True)]


def test_a_turn_that_cannot_be_learned_from_is_the_environments() -> None:
    """Its reward goes to the turn before it, a turn later; nothing is known of its value."""
    rollout = played([2, 3, 1], [1.0, -1.0, 2.0], VALUES)
    rollout.turns[1].before, rollout.turns[1].sampling = None, TurnSampling(temperature=0.0)
    found = advantages(rollout, config(RETURN, 0.5, gamma=0.9, lam=0.8))
    wanted = paper(np.array([0, 1.0 - 0.5, 2.0]), np.array([0.5, 0.25, 1.0]), np.array([0.9, 0.9 * 0.25, 0.0]), 0.8)
    np.testing.assert_allclose(np.concatenate([found[0], found[2]]), wanted, rtol=1e-6)
    assert found[1] == []
    assert rollout.turns[1].advantage == 0.0


def test_each_token_pays_for_its_own_distance_and_each_answer_for_its_length() -> None:
    rollout = played([2, 3], [1.0, 2.0], VALUES[:5])
    for each in rollout.turns:
        each.reference_logprobs = each.completion.logprobs - np.arange(1, len(each.completion.logprobs) + 1)
    algorithm = replace(
        config(Credit.turn, lam=0.8),
        kl=KLConfig(reward=0.1),
        overlong=OverlongConfig(tokens=2, longest=4, penalty=0.6),
    )
    found = advantages(rollout, algorithm)
    rewards = np.array([-0.1, 1.0 - 0.2, -0.1, -0.2, 2.0 - 0.3 - 0.3])
    wanted = paper(rewards, np.array(VALUES[:5]), np.array([1.0, 0, 1.0, 1.0, 0]), 0.8)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5)


def test_faults_and_rollouts_that_nothing_is_known_of_have_no_advantage() -> None:
    fault, unseen = played([2], [1.0], [0.0, 0.0]), played([2], [1.0], [0.0, 0.0])
    fault.stop_reason = StopReason.ENGINE_ERROR
    unseen.turns[0].before = None
    group = Group("p", [fault, unseen])
    assign_advantages(group, config())
    assert [r.turns[0].token_advantages for r in group.rollouts] == [None, None]
    assert not group.compares_equal


def test_whitening_is_over_the_tokens_that_are_trained_on() -> None:
    groups = [Group("p", [played([2, 3], [1.0, 2.0], VALUES[:5])]), Group("q", [played([4], [9.0], VALUES[:4])])]
    algorithm = config(whiten=True)
    for group in groups:
        assign_advantages(group, algorithm)
    groups[1].rollouts[0].dropped = DropReason.STALE
    kept = [t for t in groups[0].rollouts[0].turns if t.token_advantages is not None]
    before = np.concatenate([t.token_advantages for t in kept if t.token_advantages is not None]).astype(np.float64)
    untouched = groups[1].rollouts[0].turns[0].token_advantages
    whiten(groups, config())
    assert kept[0].token_advantages is not None
    assert kept[0].token_advantages.tolist() == before[:2].tolist(), "algorithm.gae.whiten=false"
    whiten(groups, algorithm)
    after = np.concatenate([t.token_advantages for t in kept if t.token_advantages is not None])
    np.testing.assert_allclose(after, (before - before.mean()) / np.sqrt(before.var(ddof=1)), rtol=1e-5)
    assert kept[1].advantage == pytest.approx(after[2:].mean())
    assert groups[1].rollouts[0].turns[0].token_advantages is untouched
    whiten([], algorithm)


def test_the_samples_have_them_token_by_token() -> None:
    rollout = played([2, 3], [1.0, 2.0], VALUES[:5])
    before = [TokenMetrics.joined([t.before for t in rollout.turns if t.before is not None])]
    for each in rollout.turns:
        each.before = None
    note_before([rollout], before)
    wanted = np.concatenate(advantages(rollout, config(lam=0.8)))
    (sample,) = make_samples(rollout)
    assert sample.advantages[sample.loss_mask].tolist() == wanted.tolist()
    assert (sample.advantages[~sample.loss_mask] == 0).all()
    assert sample.before is not None
    assert sample.before.values is not None
    assert sample.before.values.tolist() == list(VALUES[:5])
    assert sample.returns is not None
    np.testing.assert_allclose(sample.returns[sample.loss_mask], wanted + VALUES[:5], rtol=1e-6)


RIGHT = module._rewards

ROLLOUT_MISTAKES: dict[str, Callable[..., object]] = {
    "reward at the first token": lambda rollout, algorithm: _moved(rollout, algorithm, 0),
    "reward one token early": lambda rollout, algorithm: _moved(rollout, algorithm, -2),
    "sign": lambda rollout, algorithm: (
        [-each for each in RIGHT(rollout, algorithm)[0]],
        RIGHT(rollout, algorithm)[1],
    ),
    "no discount between turns": lambda rollout, algorithm: (RIGHT(rollout, algorithm)[0], [1.0] * 3),
}


def _moved(rollout: Rollout, algorithm: AlgorithmConfig, place: int) -> tuple[list[Array], list[float]]:
    rewards, after = RIGHT(rollout, algorithm)
    moved = []
    for each in rewards:
        own = np.zeros_like(each)
        own[max(place, -len(own))] = each.sum()
        moved.append(own)
    return moved, after


@pytest.mark.parametrize("mistake", ROLLOUT_MISTAKES)
def test_a_mistake_in_the_rewards_is_found(mistake: str) -> None:
    with patch.object(module, "_rewards", ROLLOUT_MISTAKES[mistake]), pytest.raises(AssertionError):
        test_rewards_come_at_the_last_token_and_turns_follow_each_other_by_the_credit(
            RETURN, 0.5, [0, 1.0, 0, 0, -1.0, 2.0], [0.9, 0.45, 0.9, 0.9, 0.45, 0]
        )
