"""The check that engine and trainer give the sampled tokens the same probability, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vlmrl.runs.verdicts import Verdict, judged
from vlmrl.trainer.loss import mismatch_kl
from vlmrl.types import FloatArray

FLOAT32_KL = 1e-8
"""Largest mean mismatch_kl that rounding explains in float32: logprobs that are 1e-4 apart. Measured with the tiny
model: 1e-13, for the embedded engine and for vLLM."""

ROUNDING_FACTOR = 5.0
"""In bfloat16, mismatch_kl between engine and trainer may be this many times the mismatch_kl of the trainer's own
rounding. mismatch_kl is half the mean square of the difference, so two roundings of the same size that are independent
give 2. Measured: 1.5 with vLLM on an H200 (2 B parameters, logits 20 times those of random weights;
benchmarks/mismatch.py), 0.8 with the tiny model and vLLM on a CPU, and 2000 where the tiny model's pixels were
normalized twice."""


@dataclass(frozen=True)
class LogprobDifference:
    """How far two computations of the same tokens' logprobs are apart."""

    tokens: int
    kl: float
    """Mean `mismatch_kl`, nats."""
    mean: float
    """Mean |difference|, nats."""
    max: float
    """Largest |difference|, nats."""

    @staticmethod
    def between(trainer: FloatArray, other: FloatArray) -> LogprobDifference:
        """Both are float32 [tokens], natural logs, with at least one token."""
        total = float(mismatch_kl(torch.from_numpy(trainer), torch.from_numpy(other))[0])
        apart = np.abs(trainer.astype(np.float64) - other)
        return LogprobDifference(len(trainer), total / len(trainer), float(apart.mean()), float(apart.max()))


def logprobs(name: str, found: LogprobDifference, bound: float) -> Verdict:
    """Engine and trainer give the sampled tokens the same probability, up to rounding: mismatch_kl is at most
    `bound`."""
    finding = f"{found.tokens} tokens: mismatch_kl {found.kl:.1e}, |delta| mean {found.mean:.1e} max {found.max:.1e}"
    return judged(
        name,
        found.kl <= bound,
        finding,
        f"mismatch_kl <= {bound:.1e}",
        mismatch_kl=found.kl,
        mean_delta=found.mean,
        max_delta=found.max,
        limit=bound,
        tokens=found.tokens,
    )
