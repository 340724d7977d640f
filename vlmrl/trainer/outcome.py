"""The results of one rank's part in an optimizer step.

    each micro-batch ─▶ PassResult: tensors, still on the device ─▶ after the last one: Outcome, plain numbers

Reading a scalar (`.item()`) waits for the device and leaves a GPU idle, so all scalars of a step are read at once,
after its last backward pass was launched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmrl.config.algorithm import KLEstimator
from vlmrl.trainer.loss import LossOutput
from vlmrl.trainer.objective import mismatch_kl, reference_kl
from vlmrl.trainer.packing import MicroBatch
from vlmrl.trainer.shares import Share
from vlmrl.types import TokenMetrics

Scalars: TypeAlias = dict[str, Tensor | float]


@dataclass(frozen=True, eq=False)
class PassResult:
    """The result of one forward/backward pass, still on the device. It holds no graph, which would keep memory."""

    batch: MicroBatch
    output: LossOutput
    logprobs: Tensor
    """float32 [N]; natural log."""
    entropies: Tensor
    """float32 [N]; nats."""

    @staticmethod
    def detached(batch: MicroBatch, output: LossOutput, logprobs: Tensor, entropies: Tensor) -> PassResult:
        output = replace(output, loss=output.loss.detach())
        return PassResult(batch, output, logprobs.detach(), entropies.detach())

    def scalars(self) -> tuple[Scalars, Scalars, Scalars]:
        """The scalars of the pass itself, and `sums` and `maxima` of its `LossOutput`."""
        total, largest = mismatch_kl(self.logprobs, self.batch.inference_logprobs)
        own: Scalars = {"loss": self.output.loss, "entropy": self.entropies.sum()}
        if self.batch.reference_logprobs is not None:
            distance = reference_kl(self.logprobs.double(), self.batch.reference_logprobs.double(), KLEstimator.k3)
            own["reference_kl"] = distance.clamp_min(0.0).sum()
        if self.batch.old_logprobs is not None:
            own["policy_kl"], _ = mismatch_kl(self.logprobs, self.batch.old_logprobs)
        return own | {"kl_sum": total, "kl_max": largest}, self.output.sums, self.output.maxima


@dataclass
class Outcome:
    """What one rank contributes to the metrics of an optimizer step, and what all ranks agreed on."""

    loss: float = 0.0
    demonstration_loss: float = 0.0
    demonstration_rows: int = 0
    """Rows that the forward passes over the demonstrations computed."""
    demonstration_passes: int = 0
    entropy: float = 0.0
    """Nats, summed over the loss tokens."""
    kl_sum: float = 0.0
    """Of `mismatch_kl`, in nats, over the loss tokens."""
    kl_max: float = 0.0
    reference_kl: float | None = None
    """k3 of KL(π ‖ reference), in nats, summed over the loss tokens; None where no reference has scored them."""
    policy_kl: float | None = None
    """k3 of KL(π_old ‖ π), in nats, summed over the loss tokens; None in the first optimizer step of a batch."""
    sums: dict[str, float] = field(default_factory=dict)
    """`LossOutput.sums`, summed over the micro-batches."""
    maxima: dict[str, float] = field(default_factory=dict)
    """`LossOutput.maxima`, the largest over the micro-batches."""
    rows: int = 0
    """Rows that the forward passes computed."""
    micro_batches: int = 0
    images: dict[str, float] = field(default_factory=dict)
    """`Policy.take_image_counters`."""
    tokens: list[TokenMetrics] = field(default_factory=list)
    """One entry per sample of the share."""
    peak_bytes: int = 0
    """Peak memory; see `learner.peak_bytes`."""
    grad_norm: float = math.nan
    """L2 norm of the gradient of all ranks together, before clipping."""
    broken_loss: float | None = None
    """The first loss that is not finite; None where all are."""
    broken: list[str] = field(default_factory=list)
    """Rollout ids of the samples that have a logprob or advantage which is not finite; where no sample has one, of all
    samples of the micro-batch whose loss is not finite."""
    names_are_exact: bool = False
    """Whether `broken` names single samples rather than a whole micro-batch."""
    loss_scale: int = 1
    """`LossScale.factor` after the step."""
    moved_too_far: bool = False
    """Whether the step was left out because of `StepSettings.largest_kl`; the same on all ranks."""
    stepped: bool = False
    """Whether the weights were changed; the same on all ranks."""

    def add_policy(self, results: Sequence[PassResult], share: Share) -> None:
        """Add the results of all passes over the samples that are learned from by reward."""
        self._note_broken(results, share)
        for own, sums, maxima in _read([each.scalars() for each in results]):
            self.loss += own["loss"]
            self.entropy += own["entropy"]
            self.kl_sum += own["kl_sum"]
            self.kl_max = max(self.kl_max, own["kl_max"])
            if "reference_kl" in own:
                self.reference_kl = (self.reference_kl or 0.0) + own["reference_kl"]
            if "policy_kl" in own:
                self.policy_kl = (self.policy_kl or 0.0) + own["policy_kl"]
            for key, value in sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
            for key, value in maxima.items():
                self.maxima[key] = max(self.maxima.get(key, value), value)
        self.tokens = _by_sample(results, len(share.samples)) if results else []

    def add_supervised(self, results: Sequence[PassResult], share: Share) -> None:
        """Add the results of all passes over the demonstrations."""
        self._note_broken(results, share)
        self.demonstration_rows = sum(len(each.batch.token_ids) for each in results)
        self.demonstration_passes = len(results)
        losses = _read([({"loss": each.output.loss},) for each in results])
        self.demonstration_loss = sum(own["loss"] for (own,) in losses)

    def _note_broken(self, results: Sequence[PassResult], share: Share) -> None:
        """Record the first result whose loss is not finite, unless one is recorded already."""
        if not results or self.broken_loss is not None:
            return
        is_broken = (~torch.isfinite(torch.stack([each.output.loss for each in results]))).tolist()
        if not any(is_broken):
            return
        first = results[is_broken.index(True)]
        batch = first.batch
        inputs = torch.stack([first.logprobs, batch.inference_logprobs, batch.advantages])
        broken = batch.sample_index[~torch.isfinite(inputs).all(0)].tolist()
        self.broken_loss = float(first.output.loss)
        self.names_are_exact = bool(broken)
        self.broken = [share.samples[i].rollout_id for i in sorted(set(broken or batch.sample_index.tolist()))]


def _by_sample(results: Sequence[PassResult], samples: int) -> list[TokenMetrics]:
    """Logprobs and entropies of each sample's loss tokens, read from the device in one transfer."""
    index = torch.cat([each.batch.sample_index for each in results])
    order = index.argsort(stable=True)  # a sample's tokens are in order and in one micro-batch, so they stay in order
    values = torch.cat([torch.stack([each.logprobs.float(), each.entropies.float()]) for each in results], dim=1)
    logprobs, entropies = values[:, order].cpu().numpy()
    ends = index.bincount(minlength=samples).cumsum(0)[:-1].tolist()
    return [TokenMetrics(*both) for both in zip(np.split(logprobs, ends), np.split(entropies, ends), strict=True)]


def _read(passes: Sequence[tuple[Scalars, ...]]) -> list[tuple[dict[str, float], ...]]:
    """Replace all tensors by numbers, read from the device in one transfer."""
    tensors = [value for scalars in passes for part in scalars for value in part.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack([value.detach().double() for value in tensors]).tolist() if tensors else [])

    def read(part: Scalars) -> dict[str, float]:
        return {key: next(numbers) if isinstance(value, Tensor) else value for key, value in part.items()}

    return [tuple(map(read, scalars)) for scalars in passes]
