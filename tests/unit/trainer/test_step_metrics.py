"""Metrics that are computed from tokens and versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.helpers import Sampled, sample
from vlmrl.trainer.step_metrics import after_update_metrics
from vlmrl.types import IntArray, TokenMetrics, TrainingSample


def answered(*versions: list[int]) -> TrainingSample:
    """A sample with an answer for each list, whose tokens have these versions; logprobs −1, −2, …"""
    parts = [part for answer in versions for part in ([5, 6], Sampled([100] * len(answer)))]
    made = sample("r", *parts)
    of_tokens = np.concatenate([np.array(answer, np.int64) for answer in versions])
    all_versions: IntArray = np.full(len(made.token_ids), -1)
    all_versions[made.loss_mask] = of_tokens
    logprobs = np.zeros(len(made.token_ids), np.float32)
    logprobs[made.loss_mask] = -1.0 - np.arange(len(of_tokens))
    return replace(made, versions=all_versions, inference_logprobs=logprobs)


def scored(sample: TrainingSample, ratios: list[float]) -> TokenMetrics:
    """The trainer's logprobs, with these differences from the engine's."""
    logprobs = sample.inference_logprobs[sample.loss_mask] + np.array(ratios, np.float32)
    return TokenMetrics(logprobs, np.zeros_like(logprobs))


def test_mismatch_after_an_update_in_the_middle_of_an_answer() -> None:
    """Not of an answer that the newest weights began, nor of tokens of weights in between."""
    first = answered([3, 3, 4], [4, 4], [2, 3, 4, 4])
    second = answered([3, 3])
    before = [scored(first, [9, 9, 0.5, 9, 9, 9, 9, -0.25, 0]), scored(second, [9, 9])]
    late = np.array([0.5, -0.25, 0.0])
    wanted = float(np.mean(np.exp(late) - late - 1))
    found = after_update_metrics([first, second], before, version=4)
    assert found == {"mismatch_kl/after_update": pytest.approx(wanted, rel=1e-6)}
    assert after_update_metrics([first, second], before, version=5) == {}
    assert after_update_metrics([second], [before[1]], version=3) == {}
