"""Find degenerate rollouts by their tokens and advantages, and list the matching filters in `rollout.filtered`.

    assign_advantages ─▶ find_filtered: rollout.filtered ─▶ mark_dropped: drops those whose filter is set to `drop`

Letters: μ_t the sampler's probability of its token t, V the size of the vocabulary; s, o, n and p are config values.

    gibberish        a token with id ≥ s V and log μ_t < −log V − o      s = rare_from, o = rare_logprob_offset
    repetition       n tokens in a row of one completion with μ_t > p    n = repetition_window,
                                                                         p = repetition_probability
    zero_advantage   every advantage of the group is zero

- gibberish: byte-level BPE numbers its tokens in the order of their merges, so high ids are rare words and fragments of
  other scripts. If such a token was sampled although it was less likely than under a uniform distribution, it is noise.
  Code World Model, arXiv 2510.02387, section 5.2.
- repetition: a policy that repeats itself is nearly certain of every token, whatever the repeated text is. So the
  filter looks for certainty, not for equal strings. MiniMax-M1, arXiv 2506.13585, section 3.2, stops a completion after
  3,000 tokens above 0.99.
- zero_advantage: a group whose rollouts are all equally good has no gradient. If it is dropped, it does not count in
  the normalization of the loss either. DAPO's dynamic sampling, arXiv 2503.14476, section 3.2; refill.py samples
  others in their place.

A filtered rollout was played and rewarded, so it still counts in the baseline of its siblings.

Left out on purpose: stopping a completion while it is sampled. A filter here costs microseconds per rollout and works
with every engine, and the length of a completion is bounded anyway.
"""

from __future__ import annotations

import math

import numpy as np

from vlmrl.config.algorithm import FilterConfig, FilterMode
from vlmrl.types import Completion, DropReason, Group

FILTERS = {reason.value: reason for reason in (DropReason.GIBBERISH, DropReason.REPETITION, DropReason.ZERO_ADVANTAGE)}
"""Name of a filter in `FilterConfig` → its drop reason. If several filters match, the first one is the reason."""


def filters_in(config: FilterConfig, *modes: FilterMode) -> tuple[DropReason, ...]:
    """The filters whose mode is one of `modes`.

    >>> filters_in(FilterConfig(gibberish=FilterMode.drop, repetition=FilterMode.track), FilterMode.drop)
    (<DropReason.GIBBERISH: 'gibberish'>,)
    """
    return tuple(reason for name, reason in FILTERS.items() if getattr(config, name) in modes)


def find_filtered(group: Group, config: FilterConfig, vocab_size: int) -> None:
    """Set `rollout.filtered` of every rollout, in place: the enabled filters that match it.

    Call after `assign_advantages`. `vocab_size` is the number of tokens that the sampler chooses from.
    """
    enabled = filters_in(config, FilterMode.track, FilterMode.drop)
    no_signal = not any(turn.advantage for rollout in group.rollouts for turn in rollout.turns)
    for rollout in group.rollouts:
        completions = [turn.completion for turn in rollout.turns]
        played = bool(completions) and not rollout.stop_reason.is_fault
        found = {
            DropReason.GIBBERISH: any(is_gibberish(completion, config, vocab_size) for completion in completions),
            DropReason.REPETITION: any(is_repetition(completion, config) for completion in completions),
            DropReason.ZERO_ADVANTAGE: no_signal and played,
        }
        rollout.filtered = tuple(reason for reason in enabled if found[reason])


def is_gibberish(completion: Completion, config: FilterConfig, vocab_size: int) -> bool:
    """Whether the completion contains a rare token that was less likely than under a uniform distribution.

    With 1,000 tokens, ids from 660 on are rare. A uniform distribution gives log 1/1000 = −6.9; minus 2 is −8.9:

    >>> def sampled(token_id: int, logprob: float) -> Completion:
    ...     one = np.array([token_id])
    ...     return Completion(one, np.array([logprob], np.float32), np.zeros(1, np.int64), "stop")
    >>> [is_gibberish(sampled(*token), FilterConfig(), 1000) for token in ((800, -9.0), (800, -8.0), (300, -9.0))]
    [True, False, False]
    """
    rare = completion.token_ids >= config.rare_from * vocab_size
    unlikely = completion.logprobs < -math.log(vocab_size) - config.rare_logprob_offset
    return bool((rare & unlikely).any())


def is_repetition(completion: Completion, config: FilterConfig) -> bool:
    """Whether at least `repetition_window` tokens in a row had a probability above `repetition_probability`.

    >>> logprobs = np.log(np.array([0.5, 0.999, 0.999, 0.995, 0.5], np.float32))
    >>> completion = Completion(np.arange(5), logprobs, np.zeros(5, np.int64), "length")
    >>> [is_repetition(completion, FilterConfig(repetition_window=n)) for n in (3, 4)]
    [True, False]
    """
    certain = completion.logprobs > math.log(config.repetition_probability)
    ends = np.flatnonzero(np.diff(np.concatenate(([False], certain, [False])).astype(np.int8)))
    return bool((ends[1::2] - ends[::2]).max(initial=0) >= config.repetition_window)
