"""Decide which rewards of a group are compared with each other. advantages.py computes advantages from them.

    siblings ─▶ algorithm.credit: a reward for each episode or each turn ─▶ sets of them ─▶ Comparison ─▶ advantages

`algorithm.credit` says which reward that is. r_t is the reward of turn t (`Reply.turn_reward`), γ `algorithm.discount`:

    episode    the reward of the episode, for all its turns
    turn       r_t
    return     R_t = r_t + γ r_{t+1} + γ² r_{t+2} + …

The t-th turns of the siblings are compared with each other. A return leaves out the rewards before its turn, which the
turn could not change (Sutton and Barto, 2nd edition, equation 3.8).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.config.algorithm import AlgorithmConfig, Credit
from vlmrl.types import FloatArray, IntArray, Rollout


@dataclass(frozen=True, eq=False)
class Comparison:
    """Episodes or turns of one group whose rewards are compared with each other. N of them; S siblings in the group.

    The rollouts are the run's own records: read them, and do not change them.
    """

    rewards: FloatArray
    """float32 [N]; by `algorithm.credit` the rewards of episodes, the rewards of turns, or returns."""
    siblings: tuple[Rollout, ...]
    """[S]; every rollout of the group that counts: no faults, and none without a reward. Each has its turns, rewards,
    metrics, tokens and stop reason."""
    index: IntArray
    """int64 [N]; whose reward it is, an index of `siblings`."""
    turn: IntArray
    """int64 [N]; the turn whose reward it is, from 0. −1 for a whole episode."""

    @property
    def rollouts(self) -> list[Rollout]:
        """[N]; whose reward it is."""
        return [self.siblings[index] for index in self.index]

    @property
    def lengths(self) -> IntArray:
        """int64 [N]; how many tokens the policy sampled in the turn, or in the whole episode."""
        sampled = [[len(turn.completion.token_ids) for turn in rollout.turns] for rollout in self.rollouts]
        pairs = zip(sampled, self.turn.tolist(), strict=True)
        return np.array([sum(lengths) if turn < 0 else lengths[turn] for lengths, turn in pairs], np.int64)


@dataclass(frozen=True)
class Judged:
    """One reward that is compared with others."""

    sibling: int
    """Index of its rollout among the siblings."""
    turn: int
    """From 0; −1 for a whole episode."""
    reward: float


def comparisons(siblings: Sequence[Rollout], config: AlgorithmConfig) -> list[Comparison]:
    """The sets of rewards that `algorithm.credit` compares. Every turn of every sibling is in exactly one of them, by
    itself or as a part of its episode. Empty where there are no siblings."""
    if config.credit is Credit.episode:
        episodes = [Judged(index, -1, rollout.reward) for index, rollout in enumerate(siblings)]
        return [_comparison(siblings, episodes)] if episodes else []
    at_turn: dict[int, list[Judged]] = defaultdict(list)
    for index, rollout in enumerate(siblings):
        rewards = [turn.reward for turn in rollout.turns]
        for t, reward in enumerate(rewards if config.credit is Credit.turn else returns(rewards, config.discount)):
            at_turn[t].append(Judged(index, t, reward))
    return [_comparison(siblings, turns) for turns in at_turn.values()]


def returns(rewards: Sequence[float], discount: float) -> list[float]:
    """R_t = r_t + γ R_{t+1} of each turn, from the turns' rewards.

    >>> returns([0.0, 1.0, 4.0], discount=0.5)
    [1.5, 3.0, 4.0]
    """
    found: list[float] = []
    later = 0.0
    for reward in reversed(rewards):
        later = reward + discount * later
        found.append(later)
    return found[::-1]


def _comparison(siblings: Sequence[Rollout], judged: Sequence[Judged]) -> Comparison:
    return Comparison(
        rewards=np.array([each.reward for each in judged], np.float32),
        siblings=tuple(siblings),
        index=np.array([each.sibling for each in judged], np.int64),
        turn=np.array([each.turn for each in judged], np.int64),
    )
