"""Weight each turn's advantage by what its answer owes to the images (`algorithm.vision_advantage`).

    samples ─▶ the same with images of other problems ─▶ trainer.logprobs ─▶ a gap per turn ─▶ turn.advantage × weight

The gap of a turn t is how much less likely its answer is when its images are those of another problem, a mean over its
tokens in nats (μ: the sampler, π: the trainer's weights before the step):

    g_t = 1/|t| Σ (log μ(a | its images) − log π(a | images of another problem))
    w_t = 1 + weight · min(max(g_t, 0), cap)
    A_t ← A_t · w_t / w̄            w̄: the mean of w over all turns that were measured

So what was read off the image is reinforced more, and corrected more, than what would have been said anyway. The mean
of the factors is 1: `weight` moves the gradient between turns, and the learning rate stays what it was. Turns without
an advantage are not measured and have no part in w̄. A turn that cannot be measured keeps its advantage: it was shown
no image, or one of its images has no replacement of the same size in the step.

The form is that of VPPO's trajectory-level shaping (arXiv 2510.09285), which scales advantages by a visual dependency
between two bounds; its dependency is a KL of whole distributions under blackened patches. The gap here is that of the
blind control (vision_gap.py): the estimate of that KL from the sampled tokens, under real images. PAPO (arXiv
2507.06448) adds such a KL to the loss instead, which a policy can raise without a reward; a weight on an advantage of
zero is zero.

Siblings get the same replacement for the same image, so that they go on sharing a prefix: the pass computes each
distinct token of the prefix tree once, without gradient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from vlmrl.config.algorithm import VisionAdvantageConfig
from vlmrl.orchestrator.samples import learned_branches, make_samples, parts_of
from vlmrl.orchestrator.vision_gap import swap_images
from vlmrl.types import FloatArray, Group, Trainer, Turn


def weigh_by_vision(groups: Sequence[Group], trainer: Trainer, config: VisionAdvantageConfig) -> dict[str, float]:
    """Multiply `turn.advantage` of the rollouts that are trained on by the weights of their turns, in place.

    Returns `vision_advantage/…` and `time/vision_advantage`; empty where it is off. Call it after `mark_dropped`.
    """
    if not config.is_on:
        return {}
    started = time.perf_counter()
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.dropped is None]
    branches = [turns for rollout in rollouts for turns in learned_branches(rollout)]
    samples = [sample for rollout in rollouts for sample in make_samples(rollout)]
    learned = [index for index, turns in enumerate(branches) if any(map(_has_advantage, turns))]
    swapped = list(swap_images([samples[index] for index in learned], samples))
    scored = trainer.logprobs([sample for _, sample in swapped])
    turns, gaps = [], []
    for (place, _), logprobs in zip(swapped, scored, strict=True):
        for turn, part in parts_of(branches[learned[place]], len(logprobs)):
            if turn.prompt.mm_items and _has_advantage(turn):
                turns.append(turn)
                gaps.append(float(np.mean(turn.completion.logprobs.astype(np.float64) - logprobs[part])))
    factors = weights(np.array(gaps, np.float32), config)
    for turn, factor in zip(turns, factors.tolist(), strict=True):
        turn.advantage *= factor
    count = sum(_has_advantage(turn) for each in branches for turn in each)
    return {
        "vision_advantage/gap": float(np.mean(gaps)) if gaps else 0.0,
        "vision_advantage/spread": float(factors.std()) if gaps else 0.0,
        "vision_advantage/measured": len(gaps) / max(1, count),
        "time/vision_advantage": time.perf_counter() - started,
    }


def weights(gaps: FloatArray, config: VisionAdvantageConfig) -> FloatArray:
    """The factors w / w̄ on the advantages of N turns, from their gaps in nats per token: float32 [N], of mean 1.

    >>> weights(np.array([-1.0, 0.0, 1.0, 9.0], np.float32), VisionAdvantageConfig(weight=1.0, cap=3.0)).tolist()
    [0.5, 0.5, 1.0, 2.0]
    """
    found = 1.0 + config.weight * np.clip(gaps.astype(np.float64), 0.0, config.cap)
    return (found / found.mean()).astype(np.float32) if len(found) else gaps


def _has_advantage(turn: Turn) -> bool:
    return turn.is_learnable and turn.advantage != 0.0
