"""The check that two computations give the same tokens the same probability, and its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlmrl.runs.verdicts import Verdict, judged
from vlmrl.trainer.objective import mismatch_kl
from vlmrl.types import FloatArray, TrainingSample

ROUNDING_FACTOR = 5.0
"""In bfloat16, mismatch_kl between engine and trainer may be this many times the mismatch_kl of the trainer's own
rounding. mismatch_kl is half the mean square of the difference, so two roundings of the same size that are independent
give 2. Measured: 1.5 with vLLM on an H200 (2 B parameters, logits 20 times those of random weights;
benchmarks/mismatch.py), 0.8 with the tiny model and vLLM on a CPU, and 2000 where the tiny model's pixels were
normalized twice. The largest difference may be as many times the largest of the trainer's own rounding."""


@dataclass(frozen=True)
class LogprobDifference:
    """How far two computations of the same tokens' logprobs are apart."""

    tokens: int
    kl: float
    """Mean `mismatch_kl` (k3), nats."""
    mean: float
    """Mean |difference|, nats."""
    max: float
    """Largest |difference|, nats."""
    compared: str = ""
    """What was compared, in words before the number of tokens."""

    @staticmethod
    def between(trainer: FloatArray, other: FloatArray) -> LogprobDifference:
        """Both are float32 [tokens], natural logs, with at least one token."""
        total = float(mismatch_kl(torch.from_numpy(trainer), torch.from_numpy(other))[0])
        apart = np.abs(trainer.astype(np.float64) - other)
        return LogprobDifference(len(trainer), total / len(trainer), float(apart.mean()), float(apart.max()))


@dataclass(frozen=True)
class Bound:
    """The largest difference that rounding explains. The mean alone would not show a single token that is wrong."""

    kl: float
    """Of the mean mismatch_kl, nats."""
    max: float
    """Of the largest |difference|, nats."""

    def __str__(self) -> str:
        return f"mismatch_kl <= {self.kl:.1e}, max |delta| <= {self.max:.1e}"

    def holds(self, found: LogprobDifference) -> bool:
        """Whether `found` is not larger; False for NaN."""
        return found.kl <= self.kl and found.max <= self.max

    @staticmethod
    def of_rounding(rounding: LogprobDifference) -> Bound:
        """The bound where `rounding` is the difference that another number format makes in the trainer."""
        return Bound(
            max(FLOAT32.kl, ROUNDING_FACTOR * rounding.kl),
            max(FLOAT32.max, ROUNDING_FACTOR * rounding.max),
        )


FLOAT32 = Bound(1e-8, 1e-4)
"""In float32. Measured with the tiny models of 25 families: 1e-13 and 1e-5, for the embedded engine and for vLLM."""


def over_supports(samples: Sequence[TrainingSample]) -> str:
    """Which of the loss tokens were sampled from a truncated distribution, in words; empty where none was."""
    known = [sample.supports.sizes for sample in samples if sample.supports is not None]
    sizes = np.concatenate([np.zeros(0, np.int64), *(each[each > 0] for each in known)])
    return f"{len(sizes)} over supports of {sizes.mean():.1f} tokens on average, of " if len(sizes) else ""


def logprobs(name: str, found: LogprobDifference, bound: Bound, compared: str = "") -> Verdict:
    """Two computations give the sampled tokens the same probability, up to rounding: the difference keeps `bound`.
    `compared` says of what, where it is not all samples."""
    apart = f"mismatch_kl {found.kl:.1e}, |delta| mean {found.mean:.1e} max {found.max:.1e}"
    finding = f"{compared or found.compared}{found.tokens} tokens: {apart}"
    return judged(
        name,
        bound.holds(found),
        finding,
        str(bound),
        mismatch_kl=found.kl,
        mean_delta=found.mean,
        max_delta=found.max,
        limit=bound.kl,
        max_limit=bound.max,
        tokens=found.tokens,
    )
