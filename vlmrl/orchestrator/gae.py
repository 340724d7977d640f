"""Advantages from a value function: generalized advantage estimation (GAE, arXiv 1506.02438, eq. 16).

    turn.before.values, rewards ─▶ gae ─▶ turn.token_advantages, turn.returns ─▶ whiten ─▶ samples

An action is a token, or a turn (`algorithm.gae.level`). With V_t the value before action t, r_t its reward and d_t the
discount from it to the next one:

    δ_t = r_t + d_t V_{t+1} − V_t
    A_t = δ_t + λ d_t A_{t+1}                λ: `algorithm.gae.lam`
    R_t = A_t + V_t                          what the value head is to predict

d_t is γ (`algorithm.gae.gamma`) within a turn, and from the last token of a turn to the next turn γ times
`algorithm.discount`. After the last action there is nothing: an episode that a budget cut ends like one that the task
has ended. Rewards come as in credit.py:

    episode    the reward of the episode at the last token of its last turn
    return     r of each turn at its last token; later turns count
    turn       the same; each turn is an episode of its own (d = 0 after it)

With γ = λ = 1 and V = 0, A is the return from the token on: REINFORCE. With `algorithm.kl.reward`, each token pays for
its own distance to the reference, as in RLHF (arXiv 2203.02155); `algorithm.overlong` is paid at the last token.

A turn that cannot be learned from has no values. It belongs to the environment, and the turn before it gets its reward,
discounted once per turn. Values are those before the step, computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmrl.config.algorithm import Advantage, AlgorithmConfig, Credit
from vlmrl.config.critic import GAELevel
from vlmrl.orchestrator.credit import overlong_share
from vlmrl.types import Group, Rollout, Turn

Array = NDArray[np.float64]

WHITEN_EPS = 1e-8
"""Added to the variance of the advantages."""


def gae(rewards: ArrayLike, values: ArrayLike, discounts: ArrayLike, lam: float) -> Array:
    """The advantages of the n actions of one episode: float64 [n]. `discounts` [n]: from each action to the next one;
    that of the last has no effect.

    >>> gae([0.0, 0.0, 1.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], lam=0.5).tolist()
    [0.125, 0.25, 0.5]
    """
    r, v, d = (np.asarray(each, np.float64) for each in (rewards, values, discounts))
    found = np.zeros(len(r))
    next_value = next_advantage = 0.0
    for t in reversed(range(len(r))):
        found[t] = r[t] + d[t] * next_value - v[t] + lam * d[t] * next_advantage
        next_value, next_advantage = v[t], found[t]
    return found


def assign_gae(rollouts: Sequence[Rollout], config: AlgorithmConfig) -> None:
    """Fill `token_advantages`, `returns` and `advantage` of every turn with values, in place."""
    for rollout in rollouts:
        turns = [turn for turn in rollout.turns if turn.before is not None]
        if not turns:
            continue
        rewards, after = _rewards(rollout, config)
        if config.gae.level is GAELevel.turn:
            advantages, returns = _by_turn(turns, rewards, after, config)
        else:
            advantages, returns = _by_token(turns, rewards, after, config)
        for turn, own, targets in zip(turns, advantages, returns, strict=True):
            turn.token_advantages, turn.returns = own.astype(np.float32), targets.astype(np.float32)
            turn.advantage = float(own.mean())


def whiten(groups: Sequence[Group], config: AlgorithmConfig) -> None:
    """(A − mean) / std over the tokens of the rollouts that are trained on, with the unbiased variance, in place. Call
    after `mark_dropped`."""
    if config.advantage != Advantage.gae or not config.gae.whiten:
        return
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.dropped is None]
    turns = [turn for rollout in rollouts for turn in rollout.turns if turn.token_advantages is not None]
    whole = np.concatenate(
        [np.empty(0), *(turn.token_advantages for turn in turns if turn.token_advantages is not None)]
    )
    if len(whole) < 2:
        return
    mean, scale = whole.mean(), 1 / np.sqrt(whole.var(ddof=1) + WHITEN_EPS)
    for turn in turns:
        assert turn.token_advantages is not None
        turn.token_advantages = ((turn.token_advantages - mean) * scale).astype(np.float32)
        turn.advantage = float(turn.token_advantages.mean())


def _rewards(rollout: Rollout, config: AlgorithmConfig) -> tuple[list[Array], list[float]]:
    """Of each turn with values: its tokens' rewards, float64 [C], and the discount from it to the next such turn."""
    step = {Credit.episode: 1.0, Credit.turn: 0.0, Credit["return"]: config.discount}[config.credit]
    last = len(rollout.turns) - 1
    rewards: list[Array] = []
    after: list[float] = []
    for number, turn in enumerate(rollout.turns):
        reward = turn.reward
        if config.credit is Credit.episode:
            reward = rollout.reward if number == last else 0.0
        reward -= config.overlong.penalty * overlong_share([turn], config.overlong)
        if turn.before is None:
            if after:  # the environment's: the turn before it is paid, and the next one is a turn further away
                rewards[-1][-1] += after[-1] * reward
                after[-1] *= step
            continue
        own = np.zeros(len(turn.completion.token_ids))
        if config.kl.reward and turn.reference_logprobs is not None:
            own -= config.kl.reward * (turn.completion.logprobs.astype(np.float64) - turn.reference_logprobs)
        own[-1] += reward
        rewards.append(own)
        after.append(step)
    return rewards, after


def _by_token(
    turns: Sequence[Turn], rewards: Sequence[Array], after: Sequence[float], config: AlgorithmConfig
) -> tuple[list[Array], list[Array]]:
    """Advantages and returns of each token, by turn."""
    values = np.concatenate([_values(turn) for turn in turns])
    discounts = np.full(len(values), config.gae.gamma)
    ends = np.cumsum([len(each) for each in rewards])
    discounts[ends - 1] *= after
    found = gae(np.concatenate(rewards), values, discounts, config.gae.lam)
    return np.split(found, ends[:-1]), np.split(found + values, ends[:-1])


def _by_turn(
    turns: Sequence[Turn], rewards: Sequence[Array], after: Sequence[float], config: AlgorithmConfig
) -> tuple[list[Array], list[Array]]:
    """Advantages and returns of each turn, repeated for its tokens."""
    values = np.array([_values(turn)[0] for turn in turns])
    found = gae([each.sum() for each in rewards], values, after, config.gae.lam)
    lengths = [len(each) for each in rewards]
    return tuple([np.full(n, x) for n, x in zip(lengths, each, strict=True)] for each in (found, found + values))  # type: ignore[return-value]


def _values(turn: Turn) -> Array:
    assert turn.before is not None
    assert turn.before.values is not None, "the trainer has no value head"
    return turn.before.values.astype(np.float64)
