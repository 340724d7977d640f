"""Turn rollouts into training samples: one per branch, as flat arrays aligned by token.

    turn 0   [prompt 0        ][completion 0]
    turn 1   [prompt 0        ][completion 0][reply     ][completion 1]      ─▶  the sample of this branch
    loss     0 0 0 0 0 0 0 0 0  1 1 1 1 1 1   0 0 0 0 0 0 1 1 1 1 1 1

Where the renderer could not extend a prompt (bridge break), a new branch starts with a prompt that renders the whole
history again. Earlier completions are environment tokens there; each one is trained on once, in the branch where it was
sampled. The loss mask follows from positions, never from token ids, so a sampled image token cannot be confused with a
placeholder.

A client may sample a turn its own way (`Turn.sampling`). Its tokens keep their own temperature, which the trainer uses
for them. Tokens that were sampled from a truncated distribution keep their supports, over which the trainer computes
their logprobs. A turn that was decoded greedily, or from a truncated distribution whose supports are not known, cannot
be learned from: its tokens are like those of the environment. A branch without any other turn makes no sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import numpy as np

from vlmrl.types import (
    ReferenceScores,
    Rollout,
    Supports,
    TokenMetrics,
    TopTokens,
    TrainingSample,
    Turn,
    extends,
    mm_token_type_ids,
)


def make_samples(rollout: Rollout, kl_advantage: float = 0.0) -> list[TrainingSample]:
    """Make one sample per branch of a rollout, in the order of its branches. Where a reference has scored its tokens,
    each token's advantage is lower by `kl_advantage` × (log μ − log reference), `algorithm.kl.advantage`.

    Raises `ContractError` where placeholders and images of a prompt do not match. Asserts that the rollout is not
    dropped and that each later prompt of a branch starts with the prompt and the completion before it.
    """
    assert rollout.dropped is None, f"{rollout.rollout_id} was dropped ({rollout.dropped}) and must not be trained on"
    return [_branch_sample(rollout.rollout_id, turns, kl_advantage) for turns in learned_branches(rollout)]


def note_learned(rollouts: Iterable[Rollout], metrics: Sequence[TokenMetrics]) -> None:
    """Set `Turn.learned` of each turn that was trained on to the trainer's metrics of its tokens. Turns that cannot be
    learned from have none.

    `metrics` has one entry per sample that `make_samples` made of the rollouts, in order; dropped rollouts have none.
    """
    branches = (turns for rollout in rollouts if rollout.dropped is None for turns in learned_branches(rollout))
    for turns, found in zip(branches, metrics, strict=True):
        for turn, part in parts_of(turns, len(found.entropies)):
            turn.learned = TokenMetrics(found.trainer_logprobs[part], found.entropies[part])


def note_reference(rollouts: Iterable[Rollout], scores: Sequence[ReferenceScores]) -> None:
    """Set `reference_logprobs` and `reference_top` of each turn that can be learned from. `scores` has one entry per
    sample that `make_samples` made of the rollouts, in order."""
    branches = (turns for rollout in rollouts for turns in learned_branches(rollout))
    for turns, found in zip(branches, scores, strict=True):
        for turn, part in parts_of(turns, len(found.logprobs)):
            turn.reference_logprobs = found.logprobs[part]
            turn.reference_top = None if found.top is None else found.top[part]


def note_before(rollouts: Iterable[Rollout], metrics: Sequence[TokenMetrics]) -> None:
    """Set `Turn.before` of each turn that can be learned from. `metrics` has one entry per sample that `make_samples`
    made of the rollouts, in order."""
    branches = (turns for rollout in rollouts for turns in learned_branches(rollout))
    for turns, found in zip(branches, metrics, strict=True):
        for turn, part in parts_of(turns, len(found.entropies)):
            turn.before = found[part]


def parts_of(turns: Sequence[Turn], count: int) -> Iterator[tuple[Turn, slice]]:
    """Each turn of a branch that can be learned from, and its part of the `count` loss tokens of the sample."""
    start = 0
    for turn in filter(lambda turn: turn.is_learnable, turns):
        yield turn, slice(start, start := start + len(turn.completion.token_ids))
    assert start == count, f"{start} tokens were sampled, but {count} have values"


def learned_branches(rollout: Rollout) -> list[list[Turn]]:
    """The turns of each branch in which at least one can be learned from."""
    branches = [list(turns) for _, turns in groupby(rollout.turns, lambda turn: turn.branch)]
    return [turns for turns in branches if any(turn.is_learnable for turn in turns)]


def _branch_sample(rollout_id: str, turns: list[Turn], kl_advantage: float) -> TrainingSample:
    for turn, later in pairwise(turns):
        assert extends(later.prompt, turn.prompt, turn.completion.token_ids), (
            f"{rollout_id}: a prompt of branch {turn.branch} does not start with the turn before it"
        )
    prompt = turns[-1].prompt
    token_ids = np.concatenate([prompt.token_ids, turns[-1].completion.token_ids])
    length = len(token_ids)
    loss_mask = np.zeros(length, np.bool_)
    advantages = np.zeros(length, np.float32)
    inference_logprobs = np.zeros(length, np.float32)
    versions = np.full(length, -1, np.int64)
    temperatures = np.full(length, np.nan, np.float32)
    is_scored = all(turn.reference_logprobs is not None for turn in turns if turn.is_learnable)
    reference_logprobs = np.zeros(length, np.float32) if is_scored else None
    learnable = [turn for turn in turns if turn.is_learnable]
    tops = [turn.reference_top for turn in learnable if turn.reference_top is not None]
    before = [turn.before for turn in learnable if turn.before is not None]
    returns = np.zeros(length, np.float32) if all(turn.returns is not None for turn in learnable) else None
    for turn in learnable:
        start = len(turn.prompt.token_ids)
        sampled = slice(start, start + len(turn.completion.token_ids))
        loss_mask[sampled] = True
        advantages[sampled] = turn.advantage if turn.token_advantages is None else turn.token_advantages
        inference_logprobs[sampled] = turn.completion.logprobs
        versions[sampled] = turn.completion.versions
        if returns is not None and turn.returns is not None:
            returns[sampled] = turn.returns
        if reference_logprobs is not None and turn.reference_logprobs is not None:
            reference_logprobs[sampled] = turn.reference_logprobs
            advantages[sampled] -= kl_advantage * (turn.completion.logprobs - turn.reference_logprobs)
        if turn.sampling is not None and turn.sampling.temperature is not None:
            temperatures[sampled] = turn.sampling.temperature
    return TrainingSample(
        rollout_id=rollout_id,
        token_ids=token_ids,
        mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
        loss_mask=loss_mask,
        advantages=advantages,
        inference_logprobs=inference_logprobs,
        versions=versions,
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
        reference_logprobs=reference_logprobs,
        reference_top=TopTokens.joined(tops) if len(tops) == len(learnable) else None,
        temperatures=None if np.isnan(temperatures).all() else temperatures,
        supports=_supports(length, turns),
        before=TokenMetrics.joined(before) if len(before) == len(learnable) else None,
        returns=returns,
    )


def _supports(length: int, turns: Sequence[Turn]) -> Supports | None:
    """The supports of the `length` tokens of a branch; None where no token that can be learned from has one."""
    known = [
        (len(turn.prompt.token_ids), turn.completion.supports)
        for turn in turns
        if turn.is_learnable and turn.completion.supports is not None
    ]
    if not known:
        return None
    sizes = np.zeros(length, np.int64)
    for start, supports in known:
        sizes[start : start + len(supports)] = supports.sizes
    token_ids = np.concatenate([supports.token_ids for _, supports in known])
    return Supports(token_ids, np.concatenate([np.zeros(1, np.int64), sizes.cumsum()]))
