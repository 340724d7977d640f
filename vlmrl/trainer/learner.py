"""One rank's part in learning: its model, its optimizer, its forward and backward passes.

    share ─▶ pack ─▶ each micro-batch: encode images, forward, loss, backward ─▶ all finite? ─▶ clip ─▶ optimizer step

All ranks call the same methods in the same order, each with its own share. No rank may stop in the middle, because the
others would wait for it. So the passes continue after a loss that is not finite, and before anything is changed the
ranks agree on whether there was one.

All micro-batches are launched before any scalar is read back (outcome.py), and each is packed while the device computes
the ones before it.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vlmrl.config.algorithm import Advantage, AlgorithmConfig
from vlmrl.config.trainer import Packing, Sharding, TrainerConfig
from vlmrl.errors import CheckpointError
from vlmrl.models.parts import part_of_each
from vlmrl.models.policy import Policy
from vlmrl.models.value_head import add_value_head
from vlmrl.trainer.forward import PolicyScores, loss_logprobs, policy_scores, scores_without_gradient
from vlmrl.trainer.loss import BatchTotals, LossOutput
from vlmrl.trainer.objective import policy_loss, supervised
from vlmrl.trainer.optimizer import LossScale, make_optimizer, set_learning_rate
from vlmrl.trainer.outcome import Outcome, PassResult
from vlmrl.trainer.packing import MicroBatch, pack_share
from vlmrl.trainer.reference import Reference
from vlmrl.trainer.shares import Share
from vlmrl.trainer.training_state import begin_to_save, not_finite, restore
from vlmrl.trainer.weights import PlainWeights, ShardedWeights
from vlmrl.types import BoolArray, ReferenceScores, TokenMetrics, TopTokens

T = TypeVar("T")

CHECKPOINT_TIMEOUT = timedelta(hours=2)
"""How much longer one rank may take to write its part of a checkpoint than another."""


@dataclass(frozen=True)
class StepSettings:
    """What every rank must know about an optimizer step."""

    totals: BatchTotals | None
    """Sizes of the whole batch of samples that are learned from by reward; None where there are no such samples."""
    demonstrated_tokens: int
    """Loss tokens of all demonstrations on all ranks."""
    demonstration_weight: float
    """Factor of the demonstrations' loss."""
    learning_rate: float
    largest_kl: float | None = None
    """The step is left out, and with it the rest of its batch, where KL(π_old ‖ π) of its tokens is above this, in nats
    per token."""
    ends_batch: bool = True
    """Whether it is the last optimizer step on its batch."""
    learns_values: bool = False
    """Whether its samples have returns, from which the value head learns."""


class Learner:
    """Model, optimizer and step counters of one rank."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        max_new_tokens: int,
        ranks: int = 1,
        reference: Reference | None = None,
    ) -> None:
        """With several ranks, torch.distributed must be initialized, and all ranks must call this at the same time."""
        self.policy = policy
        self.config = config
        self._algorithm = algorithm
        self._temperature = temperature
        self.max_new_tokens = max_new_tokens
        self._ranks = ranks
        self._reference = reference
        self._has_begun = False
        """Whether the reference has seen the weights with which reinforcement learning begins."""
        self._has_values = algorithm.advantage == Advantage.gae
        if self._has_values:
            add_value_head(policy.model, policy.device)
        self._loss_scale = LossScale(next(policy.model.parameters()).dtype)
        self._weights: PlainWeights | ShardedWeights
        if ranks > 1 and config.sharding is not Sharding.none:
            kept_whole = config.sharding is Sharding.optimizer
            self._weights = ShardedWeights(
                policy.model, policy.device, offload=config.cpu_offload, kept_whole=kept_whole
            )
        else:
            self._weights = PlainWeights(policy.model, offload=config.cpu_offload, ranks=ranks)
        self._checkpoint_group = dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT) if ranks > 1 else None
        self.version = 0
        self.supervised_steps = 0

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Built for the first step: until then there is no float32 copy of the weights either."""
        return make_optimizer(self.config, self._weights.trainable(), part_of_each(self.policy.model))

    def learn(self, share: Share | None, demonstrations: Share | None, step: StepSettings) -> Outcome:
        """One optimizer step. Where a loss or the gradient is not finite, or the policy has moved too far on this batch
        (`largest_kl`), no weight changes and the outcome says so."""
        optimizer = self._optimizer  # creates the float32 weights before there is a gradient for them
        while True:
            outcome = self._passes(share, demonstrations, step)
            if self._any_rank(outcome.broken_loss is not None):
                optimizer.zero_grad()
                return outcome
            self._weights.sum_gradients()
            if step.largest_kl is not None and step.totals is not None:
                outcome.moved_too_far = self._sum(outcome.policy_kl or 0.0) > step.largest_kl * step.totals.tokens
            if outcome.moved_too_far:
                break
            outcome.grad_norm = self._clip()
            if math.isfinite(outcome.grad_norm) or not self._loss_scale.shrink():
                break
            optimizer.zero_grad()
        if math.isfinite(outcome.grad_norm):
            set_learning_rate(optimizer, step.learning_rate)
            optimizer.step()
            self._weights.publish()
            self._loss_scale.keep()
            outcome.stepped = True
        optimizer.zero_grad()
        if outcome.moved_too_far or (outcome.stepped and step.ends_batch):
            self._count_step(supervised=share is None)
        outcome.peak_bytes = peak_bytes(self.policy.device)
        outcome.loss_scale = self._loss_scale.factor
        return outcome

    def _count_step(self, *, supervised: bool) -> None:
        """Count a step after its last optimizer step, and let the reference follow an RL step."""
        self.version += not supervised
        self.supervised_steps += supervised
        if self._reference is not None and not supervised and self._reference.reads(self.version):
            self._reference.follow(self.version, self._weights.whole())

    def skip(self, *, supervised: bool = False) -> int:
        """Count a step that had no samples → `peak_bytes`."""
        self.version += not supervised
        self.supervised_steps += supervised
        return peak_bytes(self.policy.device)

    def token_metrics(self, share: Share) -> list[TokenMetrics]:
        """Of each sample's loss tokens, without changing anything."""
        found = [TokenMetrics(np.empty(0, np.float32), np.empty(0, np.float32))] * len(share.samples)
        with torch.no_grad():
            for batch, is_last in self._pack(share):
                plain = replace(batch, reference_top_ids=None)
                scores = self._policy_scores(plain, is_last=is_last, with_values=self._has_values)
                kinds = [scores.logprobs, scores.entropies, *([] if scores.values is None else [scores.values])]
                numbers = torch.stack(kinds).float().cpu().numpy()
                for index, tokens in _by_sample(batch):
                    found[index] = TokenMetrics(*numbers[:, tokens])
        return found

    def reference_scores(self, share: Share) -> list[ReferenceScores]:
        """The reference's scores of each sample's loss tokens. It is shown the policy's weights before it scores the
        first batch."""
        assert self._reference is not None
        if not self._has_begun and self._reference.reads(0):
            self._reference.follow(0, self._weights.whole())
        self._has_begun = True
        found = [ReferenceScores(np.empty(0, np.float32))] * len(share.samples)
        with self._reference.scoring() as policy, torch.no_grad():
            for batch, is_last in self._pack(share, policy):
                scores = self._scores(batch, policy, is_last=is_last)
                for index, tokens in _by_sample(batch):
                    top = None if scores.top is None else scores.top[tokens]
                    found[index] = ReferenceScores(scores.logprobs[tokens], top)
        return found

    def _scores(self, batch: MicroBatch, policy: Policy, *, is_last: bool) -> ReferenceScores:
        """The scores of a reference, `policy`, for all loss tokens of a micro-batch."""
        k = self._algorithm.distill.top_k
        logprobs, found = self._compute(
            lambda policy: scores_without_gradient(policy, batch, self._temperature, k), is_last=is_last, policy=policy
        )
        if found is None:
            return ReferenceScores(logprobs.cpu().numpy())
        ids, top = found
        of_rows = TopTokens(ids.int().cpu().numpy(), top.cpu().numpy())
        return ReferenceScores(logprobs.cpu().numpy(), of_rows[batch.entry.cpu().numpy()])

    def whole_weights(self) -> dict[str, Tensor]:
        """The whole tensors that the forward pass computes with, by name. While one rank calls this, all other ranks
        call this or `give_weights`."""
        return dict(self._weights.whole())

    def sample(self, function: Callable[[], T]) -> T:
        """Call `function`, which samples from whole weights. All ranks do so at the same time."""
        return self._weights.with_whole(function)

    def give_weights(self) -> None:
        """Contribute this rank's slices to `whole_weights` of another rank, and keep none of the whole tensors."""
        for _ in self._weights.whole():
            pass

    def save(self, folder: str) -> str | Future[None]:
        """Copy the training state and begin to write the copy → a future that ends when all ranks have written theirs.

        Where a weight of any rank is not finite, nothing is written and all ranks return a string: the name of the
        weight, or "" on ranks whose own weights are finite.
        """
        broken = not_finite(self._weights.state())
        if self._any_rank(broken is not None):
            return broken or ""
        weights = self._weights
        return begin_to_save(
            Path(folder),
            weights.state(),
            self._optimizer,
            weights.trainable(),
            self._counters,
            self._checkpoint_group,
            reference=self._reference_state,
        )

    def load(self, folder: str) -> str | None:
        """Restore what `save` wrote with any number of ranks.

        Where any rank cannot, all ranks return why, or "" on ranks that could; the weights are then undefined, and
        another checkpoint may be loaded.
        """
        weights, group = self._weights, self._checkpoint_group
        wrong = None
        try:
            counters = restore(
                Path(folder),
                weights.state(),
                self._optimizer,
                weights.trainable(),
                list(self._counters),
                group,
                reference=self._reference_state,
            )
        except CheckpointError as error:
            wrong = str(error)
        if self._any_rank(wrong is not None):
            return wrong or ""
        weights.publish()
        if self._reference is not None:
            self._reference.restored()
        self.version, self.supervised_steps = counters["version"], counters["supervised_steps"]
        self._has_begun = self.version > 0
        self._loss_scale.state = counters
        return None

    @property
    def _reference_state(self) -> dict[str, Tensor]:
        return {} if self._reference is None else self._reference.state()

    @property
    def _counters(self) -> dict[str, int]:
        """What state.json counts."""
        return {"version": self.version, "supervised_steps": self.supervised_steps, **self._loss_scale.state}

    # ── passes ──────────────────────────────────────────────────────────────────────────────────────────────

    def _passes(self, share: Share | None, demonstrations: Share | None, step: StepSettings) -> Outcome:
        """Run all forward and backward passes of a step."""
        self.policy.take_image_counters()  # reset: the engine, or a step that failed, may have counted images
        outcome = Outcome()
        if share is not None:
            self._backward_policy(share, step, outcome, is_last=demonstrations is None)
        outcome.images = self.policy.take_image_counters()
        if demonstrations is not None:
            self._backward_supervised(demonstrations, step, outcome)
        return outcome

    def _backward_policy(self, share: Share, step: StepSettings, outcome: Outcome, *, is_last: bool) -> None:
        """Add the gradient of the policy loss. `is_last`: the step has no passes after these."""
        assert step.totals is not None
        results: list[PassResult] = []
        for batch, ends_share in self._pack(share):
            outcome.rows += len(batch.token_ids)
            outcome.micro_batches += 1
            scores = self._policy_scores(batch, is_last=is_last and ends_share, with_values=step.learns_values)
            if batch.is_filler:
                _backward(scores.zero)
                continue
            output = policy_loss(scores.loss_tokens(batch), step.totals, self._algorithm)
            _backward(self._loss_scale.factor * output.loss)
            results.append(PassResult.detached(batch, output, scores.logprobs, scores.entropies))
        outcome.add_policy(results, share)

    def _backward_supervised(self, share: Share, step: StepSettings, outcome: Outcome) -> None:
        """Add the gradient of `demonstration_weight` × the mean negative log-likelihood of the loss tokens."""
        results: list[PassResult] = []
        for batch, is_last in self._pack(share):
            logprobs, entropies = self._logprobs(batch, is_last=is_last)
            if batch.is_filler:
                _backward(0.0 * logprobs.sum())
                continue
            part = supervised(logprobs, step.demonstrated_tokens)
            _backward(self._loss_scale.factor * step.demonstration_weight * part)
            results.append(PassResult.detached(batch, LossOutput(part), logprobs, entropies))
        outcome.add_supervised(results, share)

    def _pack(self, share: Share, policy: Policy | None = None) -> Iterator[tuple[MicroBatch, bool]]:
        """Each micro-batch, planned for `policy` (by default the one that learns), and whether it is the last."""
        policy, packing = policy or self.policy, self.config.packing
        kernel = policy.kernel(shared=packing is Packing.tree)
        batches = pack_share(share, packing, policy.positions, policy.device, kernel, policy.rules)
        for number, batch in enumerate(batches, 1):
            yield batch, number == len(share.passes)

    def _logprobs(self, batch: MicroBatch, *, is_last: bool) -> tuple[Tensor, Tensor]:
        return self._compute(lambda policy: loss_logprobs(policy, batch, self._temperature), is_last=is_last)

    def _policy_scores(self, batch: MicroBatch, *, is_last: bool, with_values: bool) -> PolicyScores:
        """The scores of the policy that learns."""
        return self._compute(
            lambda policy: policy_scores(policy, batch, self._temperature, with_values=with_values), is_last=is_last
        )

    def _compute(self, function: Callable[[Policy], T], *, is_last: bool, policy: Policy | None = None) -> T:
        """Run a forward pass of `policy`, by default of the one that learns."""
        if policy is not None and policy is not self.policy:  # it holds its weights whole
            return function(policy)
        return self._weights.compute(lambda: function(self.policy), last=is_last)

    def _clip(self) -> float:
        """Undo the loss scale and clip the gradient → its L2 norm before clipping."""
        trainable = self._weights.trainable().values()
        if self._loss_scale.factor != 1:
            for tensor in trainable:
                if tensor.grad is not None:
                    tensor.grad.div_(self._loss_scale.factor)
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.config.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _sum(self, here: float) -> float:
        """The sum of `here` over the ranks, the same on all of them; all ranks call this at the same time."""
        if self._ranks == 1:
            return here
        total = torch.tensor(here, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _any_rank(self, here: bool) -> bool:
        """Whether `here` is true on any rank; all ranks call this at the same time."""
        if self._ranks == 1:
            return here
        anywhere = torch.tensor(here, dtype=torch.int32)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return bool(anywhere)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: what torch allocated on the GPU, or without a GPU what this process occupied."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _by_sample(batch: MicroBatch) -> Iterator[tuple[int, BoolArray]]:
    """Each sample of a micro-batch, as an index into the share, and which of the N loss tokens are its: bool [N]."""
    sample_index = batch.sample_index.cpu().numpy()
    for index in [] if batch.is_filler else np.unique(sample_index):
        yield int(index), sample_index == index


def _backward(loss: Tensor) -> None:
    """Run the backward pass, unless no trainable parameter had a part in the loss: where only the vision tower is
    trainable, a micro-batch without images has no gradient."""
    if loss.requires_grad:
        torch.autograd.backward(loss)
