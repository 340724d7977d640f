"""Decide which rewards of a group are compared with each other. advantages.py computes advantages from them.

    siblings ─▶ algorithm.credit: a reward for each episode or each turn ─▶ sets of them ─▶ Comparison ─▶ advantages

`algorithm.credit` says which reward that is. r_t is the reward of turn t (`Reply.turn_reward`), γ `algorithm.discount`:

    episode    the reward of the episode, for all its turns
    turn       r_t
    return     R_t = r_t + γ r_{t+1} + γ² r_{t+2} + …

With `algorithm.kl.reward`, what the distance to the reference costs is taken off each of these rewards before, and
with `algorithm.overlong.tokens` what the length of the answers costs (`overlong_share`).

A return leaves out the rewards before its turn, which the turn could not change (Sutton and Barto, 2nd edition, section
3.3). `algorithm.compare` says which turns are compared:

    turn     the t-th turns of the siblings
    state    all turns of the group that showed the policy the same (`shown`), at whatever t: the anchor states of GiGPO
             (arXiv 2505.10978). Their rewards differ by what the policy did, and not by how far the episode had come

A turn in a state that no other sibling was shown is compared by its number: the siblings at the same turn have as many
turns left. Other visits of its own rollout are no comparison, because their rewards are parts of the same return.
(GiGPO falls back on the return of the whole episode, which also counts the rewards before the turn.)

Example: what three siblings are shown in three turns, and what is compared with what.

    sibling 0    A  B  C          {A A A}      compare=state
    sibling 1    A  B  D          {B B B B}    compare=state: sibling 2 comes back to B, and both visits count
    sibling 2    A  B  B          {C D b}      C and D alone: compare=turn. b is there only to be compared with
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.config.algorithm import AlgorithmConfig, Compare, Credit, OverlongConfig, Truncated
from vlmrl.types import BoolArray, DropReason, FloatArray, Group, IntArray, Rollout, Text, Turn


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
    learns: BoolArray
    """bool [N]; False where a turn is here only for others to be compared with: its own advantage comes from another
    comparison, and the one that is computed here is not used."""
    by: Compare
    """Whether the N have their turn or their state in common. `turn` for episodes, too."""

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

    def learning_turns(self, place: int) -> Sequence[Turn]:
        """The turns that get the advantage of number `place`: one, all turns of an episode, or none."""
        turns, t = self.siblings[self.index[place]].turns, self.turn[place]
        return () if not self.learns[place] else turns if t < 0 else (turns[t],)


@dataclass(frozen=True)
class Judged:
    """One reward that is compared with others."""

    sibling: int
    """Index of its rollout among the siblings."""
    turn: int
    """From 0; −1 for a whole episode."""
    reward: float


def siblings_of(group: Group, config: AlgorithmConfig) -> list[Rollout]:
    """The rollouts of a group whose rewards are compared: played without a fault, rewarded, and not masked."""
    return [
        rollout
        for rollout in group.rollouts
        if rollout.turns
        and not rollout.stop_reason.is_fault
        and rollout.dropped is not DropReason.NO_REWARD
        and not is_masked(rollout, config)
    ]


def is_masked(rollout: Rollout, config: AlgorithmConfig) -> bool:
    """Whether the rollout is left out because its last answer was cut (`algorithm.truncated=mask`)."""
    return rollout.is_cut and config.truncated is Truncated.mask


def comparisons(siblings: Sequence[Rollout], config: AlgorithmConfig) -> list[Comparison]:
    """The sets of rewards that `algorithm.credit` and `algorithm.compare` compare. Every turn of every sibling learns
    from exactly one of them, by itself or as a part of its episode. Empty where there are no siblings."""
    if config.credit is Credit.episode:
        rewards = [rollout.reward - _penalty(rollout.turns, config) for rollout in siblings]
        episodes = [Judged(index, -1, reward) for index, reward in enumerate(rewards)]
        return [_comparison(siblings, episodes, Compare.turn)] if episodes else []
    at_turn: dict[int, list[Judged]] = defaultdict(list)
    in_state: dict[object, list[Judged]] = defaultdict(list)
    for index, rollout in enumerate(siblings):
        rewards = [turn.reward - _penalty([turn], config) for turn in rollout.turns]
        for t, reward in enumerate(rewards if config.credit is Credit.turn else returns(rewards, config.discount)):
            judged = Judged(index, t, reward)
            at_turn[t].append(judged)
            if config.compare is Compare.state:
                in_state[shown(rollout.turns[t])].append(judged)
    met = [turns for turns in in_state.values() if len({each.sibling for each in turns}) > 1]
    found = {(each.sibling, each.turn) for turns in met for each in turns}
    by_state = [_comparison(siblings, turns, Compare.state) for turns in met]
    by_turn = [_comparison(siblings, turns, Compare.turn, found) for turns in at_turn.values()]
    return [each for each in (*by_state, *by_turn) if each.learns.any()]


def kl_to_reference(turns: Iterable[Turn]) -> float:
    """Σ log μ − log reference over the tokens of the turns that a reference has scored, in nats: the k1 estimate of
    KL(μ ‖ reference), where μ is the sampler."""
    return float(
        sum(
            (turn.completion.logprobs.astype(np.float64) - turn.reference_logprobs).sum()
            for turn in turns
            if turn.reference_logprobs is not None
        )
    )


def _penalty(turns: Sequence[Turn], config: AlgorithmConfig) -> float:
    """What the distance to the reference and the length of the answers take off the reward of these turns."""
    distance = config.kl.reward * kl_to_reference(turns) if config.kl.reward else 0.0
    return distance + config.overlong.penalty * overlong_share(turns, config.overlong)


def overlong_share(turns: Iterable[Turn], config: OverlongConfig) -> float:
    """−R_length of DAPO (arXiv 2503.14476, eq. 13), added up over the turns' answers; 0.0 where it is off. With L_max =
    `longest` and L_cache = `tokens`, an answer of n tokens has

        0                             n ≤ L_max − L_cache
        (n − L_max + L_cache)/L_cache          n ≤ L_max
        1                                      n > L_max

    It counts the tokens that the policy sampled, the one that ends the answer included.
    """
    if not config.is_on:
        return 0.0
    assert config.longest is not None, "a run fills it in (AlgorithmConfig.for_answers_up_to)"
    over = [len(turn.completion.token_ids) - config.longest + config.tokens for turn in turns]
    return sum(min(max(each, 0), config.tokens) / config.tokens for each in over)


def reference_metrics(rollouts: Sequence[Rollout], config: AlgorithmConfig) -> dict[str, float]:
    """`reference_kl/penalty`: the mean over the rollouts of what is taken off their rewards. Empty without
    `algorithm.kl.reward`."""
    if not config.kl.reward:
        return {}
    distances = [kl_to_reference(rollout.turns) for rollout in rollouts]
    return {"reference_kl/penalty": config.kl.reward * sum(distances) / max(1, len(rollouts))}


def overlong_metrics(groups: Sequence[Group], config: AlgorithmConfig) -> dict[str, float]:
    """`overlong/penalty`, the mean over the siblings of what the length of their answers takes off their rewards, and
    `overlong/share`, the share of their answers that lose something. Empty without `algorithm.overlong.tokens`."""
    if not config.overlong.is_on:
        return {}
    siblings = [rollout for group in groups for rollout in siblings_of(group, config)]
    shares = [overlong_share([turn], config.overlong) for rollout in siblings for turn in rollout.turns]
    return {
        "overlong/penalty": config.overlong.penalty * sum(shares) / max(1, len(siblings)),
        "overlong/share": sum(share > 0 for share in shares) / max(1, len(shares)),
    }


def shown(turn: Turn) -> tuple[str, ...]:
    """What the policy is shown in a turn: the images and videos of the messages since its last answer, by the hash of
    their pixels; where there are none, the texts. Two turns are in the same state where these are equal.

    Texts next to an image do not count: they often tell the turn's number or the moves so far, which would make a state
    of its own of every turn. Where such a text does matter, the comparison is coarser, as that by turns is.
    """
    answers = [number for number, message in enumerate(turn.messages) if message.role == "assistant"]
    new = [part for message in turn.messages[answers[-1] + 1 if answers else 0 :] for part in message.content]
    count = sum(not isinstance(part, Text) for part in new)
    items = turn.prompt.mm_items[len(turn.prompt.mm_items) - count :]  # the newest messages end the prompt
    return tuple(item.hash for item in items) or tuple(part.text for part in new if isinstance(part, Text))


def credit_metrics(groups: Sequence[Group], config: AlgorithmConfig) -> dict[str, float]:
    """`credit/same_state`, the share of turns that were compared in the same state, unless `compare=turn`; and
    `overlong_metrics`."""
    overlong = overlong_metrics(groups, config)
    if config.compare is not Compare.state:
        return overlong
    found = [each for group in groups for each in comparisons(siblings_of(group, config), config)]
    by_state = sum(int(each.learns.sum()) for each in found if each.by is Compare.state)
    return {"credit/same_state": by_state / max(1, sum(int(each.learns.sum()) for each in found)), **overlong}


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


def _comparison(
    siblings: Sequence[Rollout],
    judged: Sequence[Judged],
    by: Compare,
    learns_elsewhere: Collection[tuple[int, int]] = (),
) -> Comparison:
    return Comparison(
        rewards=np.array([each.reward for each in judged], np.float32),
        siblings=tuple(siblings),
        index=np.array([each.sibling for each in judged], np.int64),
        turn=np.array([each.turn for each in judged], np.int64),
        learns=np.array([(each.sibling, each.turn) not in learns_elsewhere for each in judged], np.bool_),
        by=by,
    )
