"""Compute one advantage per turn from the rewards of a group, and decide which rollouts are dropped.

    group ─▶ credit.py: Comparison ─▶ Estimator ─▶ turn.advantage ─▶ filters.py: rollout.filtered ─▶ rollout.dropped

Letters: N rewards that are compared with each other. A rollout counts as a sibling if it is not a fault, has at least
one turn, and has a reward (it is not dropped as `no_reward`). A rollout that is dropped for what it sampled (a stray
image token, staleness) was played and rewarded, so it still counts. A rollout whose last answer was cut is paid 0 or
what the task says, or does not count (`algorithm.truncated`). Distances and lengths take something off a reward where
`algorithm.kl.reward` and `algorithm.overlong` say so (credit.py).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmrl.config.algorithm import Advantage, AlgorithmConfig, FilterMode, Truncated
from vlmrl.config.import_paths import assert_takes, import_named
from vlmrl.errors import ConfigError, UserFault, fenced, safe_repr
from vlmrl.orchestrator.credit import Comparison, comparisons, is_masked, siblings_of
from vlmrl.orchestrator.filters import filters_in
from vlmrl.orchestrator.gae import assign_gae
from vlmrl.types import DropReason, FloatArray, Group, Rollout

log = logging.getLogger(__name__)

Estimator: TypeAlias = Callable[[Comparison, AlgorithmConfig], FloatArray]
"""What is compared, and the settings (`config.args` are those of a function of your own) → float32 [N] advantages, one
per reward. Those of the built-in ones sum to zero and are exactly 0.0 where N < 2 or all rewards are equal."""

EPS = 1e-6
"""Added to the standard deviation, in units of the reward, so that rewards which differ only by rounding do not get
large advantages."""


def group_normalized(rewards: FloatArray) -> FloatArray:
    """(r − mean) / (std + 1e-6), with the population std of the group (GRPO, arXiv 2402.03300, section 4.1.2).

    >>> group_normalized(np.array([1, 0, 0, 1], np.float32)).round(3).tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    centered = _centered(rewards)
    std = np.sqrt(np.sum(centered**2) / max(1, len(rewards)))
    advantages: FloatArray = (centered / (std + EPS)).astype(np.float32)
    return advantages


def group_centered(rewards: FloatArray) -> FloatArray:
    """r − mean (Dr. GRPO, arXiv 2503.20783, section 3.2): a problem weighs as much as its rewards differ.

    >>> group_centered(np.array([1, 0, 0, 1], np.float32)).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    return _centered(rewards).astype(np.float32)


def leave_one_out(rewards: FloatArray) -> FloatArray:
    """r minus the mean of the other rewards, which equals (r − mean) · G / (G − 1) (RLOO, arXiv 2402.14740).

    >>> leave_one_out(np.array([1, 0, 0], np.float32)).tolist()
    [1.0, -0.5, -0.5]
    """
    return (_centered(rewards) * (len(rewards) / max(1, len(rewards) - 1))).astype(np.float32)


def none(rewards: FloatArray) -> FloatArray:
    """0 for every reward: rewards teach nothing (distillation, `algorithm.kl.advantage`).

    >>> none(np.array([1, 0], np.float32)).tolist()
    [0.0, 0.0]
    """
    return np.zeros(len(rewards), np.float32)


OF_REWARDS: dict[str, Callable[[FloatArray], FloatArray]] = {
    Advantage.group_normalized: group_normalized,
    Advantage.group_centered: group_centered,
    Advantage.leave_one_out: leave_one_out,
    Advantage.none: none,
}
"""The built-in ways need the rewards alone: float32 [N] → float32 [N]. An estimator of your own may call them."""


@functools.cache
def estimator_named(name: str) -> Estimator:
    """The function that `algorithm.advantage` names: a built-in one, or a user's function, imported.

    Raises `ConfigError` where the function does not exist or cannot be called as an `Estimator`. A user's function is
    wrapped so that it raises `ConfigError` unless it returns one finite number per reward.
    """
    if name in OF_REWARDS:
        of_rewards = OF_REWARDS[name]
        return lambda compared, config: of_rewards(compared.rewards)
    function = import_named("algorithm.advantage", name, "advantage function", callable, inspect.isfunction)
    assert_takes("algorithm.advantage", name, function, "compared", "config")

    def checked(compared: Comparison, config: AlgorithmConfig) -> FloatArray:
        rewards = compared.rewards
        consequence = "so some turns would have no valid advantage: return one finite number per reward"
        returned: Any = None
        try:
            with fenced("it"):
                returned = function(replace(compared, rewards=rewards.copy()), config)
                advantages = np.asarray(returned, np.float32)
        except UserFault as fault:
            log.error("algorithm.advantage=%s failed:\n%s", name, fault.traceback)
            if returned is None:
                raise ConfigError(f"algorithm.advantage={name}: {fault.text}, {consequence}") from fault
            if inspect.iscoroutine(returned):
                returned.close()
            raise ConfigError(
                f"algorithm.advantage={name} returned {safe_repr(returned)} of type {type(returned).__name__}, which "
                f"is not an array of float32, {consequence}"
            ) from fault
        if advantages.shape != rewards.shape or not np.isfinite(advantages).all():
            raise ConfigError(
                f"algorithm.advantage={name} returned {advantages.tolist()} for the rewards {rewards.tolist()}, "
                f"{consequence}"
            )
        return advantages

    return checked


def assign_advantages(group: Group, config: AlgorithmConfig) -> None:
    """Fill `turn.advantage` of every rollout and `group.compares_equal`, and pay a cut answer no reward above 0 where
    `truncated=zero`, in place.

    credit.py says which rewards are compared; with `algorithm.advantage=gae` none are (gae.py). Faults get 0.0; so do
    cut answers with `truncated=mask`.
    """
    for rollout in group.rollouts:
        for turn in rollout.turns:
            turn.advantage, turn.token_advantages, turn.returns = 0.0, None, None
        if rollout.is_cut and config.truncated is Truncated.zero:
            rollout.turns[-1].reward = min(rollout.turns[-1].reward, 0.0)
            rollout.reward = min(rollout.reward, 0.0)
    siblings = siblings_of(group, config)
    if config.advantage == Advantage.gae:
        assign_gae(siblings, config)
        return
    compared = comparisons(siblings, config)
    is_equal = len(siblings) > 1 and all(each.rewards.min() == each.rewards.max() for each in compared)
    group.compares_equal = is_equal and config.advantage != Advantage.none
    estimator = estimator_named(config.advantage)
    for each in compared:
        for place, advantage in enumerate(estimator(each, config).tolist()):
            for turn in each.learning_turns(place):
                turn.advantage = advantage


def has_signal(group: Group) -> bool:
    """Whether any turn of the group has an advantage that is not zero, and with it a gradient."""
    return any(turn.advantage for rollout in group.rollouts for turn in rollout.turns)


def mark_dropped(
    group: Group,
    config: AlgorithmConfig,
    image_token_ids: Collection[int],
    version: int,
    max_staleness: int,
) -> None:
    """Set `rollout.dropped` of every rollout, in place: the first reason of `DropReason` that applies, or None.

    Rollouts without a reward were marked before, by scoring.py.

    Call after `find_filtered`, and only when the trainer takes the batch: `version` is the trainer's policy version,
    and time that a rollout waits in a queue adds to its staleness. `image_token_ids` are the ids of image tokens.
    """
    filters = filters_in(config.filters, FilterMode.drop)
    for rollout in group.rollouts:
        if rollout.stop_reason.is_fault:
            rollout.dropped = DropReason.FAULT
        elif not rollout.turns:
            rollout.dropped = DropReason.EMPTY
        elif rollout.dropped is DropReason.NO_REWARD:
            continue
        elif _sampled_any(rollout, image_token_ids):
            rollout.dropped = DropReason.STRAY_IMAGE_TOKEN
        elif version - _oldest_version(rollout) > max_staleness:
            rollout.dropped = DropReason.STALE
        elif is_masked(rollout, config):
            rollout.dropped = DropReason.TRUNCATED
        elif config.refill.is_on and not has_signal(group):
            rollout.dropped = DropReason.ZERO_ADVANTAGE
        else:
            rollout.dropped = next((reason for reason in rollout.filtered if reason in filters), None)


def _centered(rewards: FloatArray) -> NDArray[np.float64]:
    """float64 [N]; r − mean, exactly 0.0 everywhere if all rewards are equal (their computed mean may be rounded)."""
    if len(rewards) < 2 or rewards.min() == rewards.max():
        return np.zeros(len(rewards))
    exact = rewards.astype(np.float64)
    return exact - float(exact.mean())


def _sampled_any(rollout: Rollout, token_ids: Collection[int]) -> bool:
    return any((turn.completion.token_ids == token_id).any() for turn in rollout.turns for token_id in token_ids)


def _oldest_version(rollout: Rollout) -> int:
    return min(int(turn.completion.versions.min()) for turn in rollout.turns)
