"""One rank's part in learning. All ranks call the same methods, in the same order, each with its own share.

    share ─▶ pack ─▶ each pass: encode images, forward, loss, backward ─▶ is all of it finite? ─▶ clip ─▶ optimizer

Nobody may leave in the middle: the other ranks would wait for it. So the passes go on whatever a loss is, and before
anything is changed the ranks agree on whether one was not finite.

Nothing of a pass is read before the last has been asked for: a GPU that is asked for figures in between runs empty, and
micro-batches are packed while it works on the ones before.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import Packing, Sharding, TrainerConfig
from vlmrl.models.policy import Policy
from vlmrl.trainer.checkpoint import begin_to_save, not_finite, restore
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.loss import BatchTotals, LossOutput, LossTokens, mismatch_kl, policy_loss, supervised
from vlmrl.trainer.loss_scale import LossScale
from vlmrl.trainer.optimizer import make_optimizer, set_learning_rate
from vlmrl.trainer.packing import MicroBatch, pack_share
from vlmrl.trainer.shares import Share
from vlmrl.trainer.weights import PlainWeights, ShardedWeights
from vlmrl.types import FloatArray, TokenMetrics

WRITING = timedelta(hours=2)
"""How much longer one rank may write at a checkpoint than another."""


@dataclass(frozen=True)
class Step:
    """What every rank must know of an optimizer step."""

    totals: BatchTotals | None
    """Of the samples that are learned from by reward; None where there are none."""
    demonstrated_tokens: int
    """Loss tokens of all demonstrations."""
    demonstration_weight: float
    learning_rate: float


@dataclass
class Outcome:
    """What one rank adds to the figures of a step, and what all of them found."""

    loss: float = 0.0
    demonstration_loss: float = 0.0
    entropy: float = 0.0
    """Nats, summed over the loss tokens."""
    kl_sum: float = 0.0
    kl_max: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    """Of `LossOutput`, over the micro-batches."""
    rows: int = 0
    """That the forward passes computed."""
    micro_batches: int = 0
    images: dict[str, float] = field(default_factory=dict)
    """`Policy.take_image_counters`."""
    tokens: list[TokenMetrics] = field(default_factory=list)
    """Of each sample of the share."""
    peak_bytes: int = 0
    """See `peak_bytes`."""
    grad_norm: float = math.nan
    """L2, of all ranks together."""
    broken_loss: float | None = None
    """The first that is not finite."""
    broken: list[str] = field(default_factory=list)
    """Names of the samples with a figure that is not finite, or else of the micro-batch where the loss is not."""
    names_are_exact: bool = False
    loss_scale: int = 1
    """`LossScale.factor` after the step."""
    stepped: bool = False
    """Whether the weights were changed; of all ranks or of none."""


Scalars: TypeAlias = dict[str, Tensor | float]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A micro-batch that is behind us, or will be: its figures are read when all are."""

    batch: MicroBatch
    output: LossOutput
    logprobs: Tensor
    """float32 [N]."""
    entropies: Tensor
    """float32 [N]; nats."""

    @staticmethod
    def behind(batch: MicroBatch, output: LossOutput, logprobs: Tensor, entropies: Tensor) -> _Pass:
        """Without gradients, whose graphs would keep memory; `entropies` [U] as the head gives them."""
        output = replace(output, loss=output.loss.detach())
        return _Pass(batch, output, logprobs.detach(), entropies[batch.entry])

    def figures(self) -> tuple[Scalars, Scalars, Scalars]:
        """Of the pass itself, and `sums` and `maxima` of its `LossOutput`."""
        total, largest = mismatch_kl(self.logprobs, self.batch.inference_logprobs)
        own: Scalars = {"loss": self.output.loss, "entropy": self.entropies.sum()}
        return own | {"kl_sum": total, "kl_max": largest}, self.output.sums, self.output.maxima


class Learner:
    """Model, optimizer and counters of one rank."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        max_new_tokens: int,
        ranks: int = 1,
    ) -> None:
        """Of several ranks, all make theirs at the same time; torch.distributed must be up."""
        self.policy = policy
        self.config = config
        self._algorithm = algorithm
        self._temperature = temperature
        self.max_new_tokens = max_new_tokens
        self._ranks = ranks
        self._loss_scale = LossScale(next(policy.model.parameters()).dtype)
        self._weights: PlainWeights | ShardedWeights
        if ranks > 1 and config.sharding is not Sharding.none:
            kept_whole = config.sharding is Sharding.optimizer
            self._weights = ShardedWeights(
                policy.model, policy.device, offload=config.cpu_offload, kept_whole=kept_whole
            )
        else:
            self._weights = PlainWeights(policy.model, offload=config.cpu_offload, ranks=ranks)
        self._checkpoint_group = dist.new_group(backend="gloo", timeout=WRITING) if ranks > 1 else None
        self.version = 0
        self.supervised_steps = 0

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Made when something is learned: until then there is no second copy of the weights either."""
        return make_optimizer(self.config, list(self._weights.learning().values()))

    def learn(self, share: Share | None, demonstrations: Share | None, step: Step) -> Outcome:
        """One optimizer step. Where a loss or the gradient is not finite, nothing is changed; the outcome says so."""
        optimizer = self._optimizer  # and with it the weights that learn, before there is a gradient for them
        while True:
            outcome = self._passes(share, demonstrations, step)
            if self._any_rank(outcome.broken_loss is not None):
                optimizer.zero_grad()
                return outcome
            self._weights.sum_gradients()
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
            self.version += share is not None
            self.supervised_steps += share is None
        optimizer.zero_grad()
        outcome.peak_bytes = peak_bytes(self.policy.device)
        outcome.loss_scale = self._loss_scale.factor
        return outcome

    def _passes(self, share: Share | None, demonstrations: Share | None, step: Step) -> Outcome:
        """All forward and backward passes of a step."""
        self.policy.take_image_counters()  # what the engine or a step that failed have counted
        outcome = Outcome()
        if share is not None:
            assert step.totals is not None
            self._backward_policy(share, step.totals, outcome, is_last=demonstrations is None)
        outcome.images = self.policy.take_image_counters()
        if demonstrations is not None:
            self._backward_supervised(demonstrations, step, outcome)
        return outcome

    def skip(self) -> int:
        """A step that had nothing to learn from → `peak_bytes`."""
        self.version += 1
        return peak_bytes(self.policy.device)

    def logprobs(self, share: Share) -> list[FloatArray]:
        """Natural-log probabilities of each sample's loss tokens, float32 [its loss tokens]."""
        found = [np.empty(0, np.float32)] * len(share.samples)
        with torch.no_grad():
            for batch, is_last in self._pack(share):
                logprobs = self._logprobs(batch, is_last=is_last)[0].cpu().numpy()
                sample_index = batch.sample_index.cpu().numpy()
                for index in [] if batch.is_filler else np.unique(sample_index):
                    found[index] = logprobs[sample_index == index]
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        """The tensors that are computed with, whole."""
        return dict(self._weights.whole())

    def give_weights(self) -> None:
        """This rank's slices of all of them, for `whole_weights` of another."""
        for _ in self._weights.whole():
            pass

    def save(self, folder: str) -> str | Future[None]:
        """Copy the training state and begin to write the copy; the future ends when all of it, of all ranks, is on the
        disk. Or the name of a weight that is not finite: then nothing is written."""
        broken = not_finite(self._weights.state())
        if self._any_rank(broken is not None):
            return broken or ""
        counters = {"version": self.version, "supervised_steps": self.supervised_steps, **self._loss_scale.state}
        return begin_to_save(Path(folder), self._weights.state(), self._optimizer, counters, self._checkpoint_group)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote, by however many ranks. Raises `CheckpointError`."""
        weights = self._weights
        counters = restore(Path(folder), weights.state(), self._optimizer, weights.learning(), self._checkpoint_group)
        weights.publish()
        self.version, self.supervised_steps = counters["version"], counters["supervised_steps"]
        self._loss_scale.state = counters

    # ── passes ──────────────────────────────────────────────────────────────────────────────────────────────

    def _backward_policy(self, share: Share, totals: BatchTotals, outcome: Outcome, *, is_last: bool) -> None:
        """`is_last`: no other passes of the step follow."""
        passed: list[_Pass] = []
        for batch, ends_share in self._pack(share):
            outcome.rows += len(batch.token_ids)
            outcome.micro_batches += 1
            logprobs, entropies = self._logprobs(batch, is_last=is_last and ends_share)
            if batch.is_filler:
                _backward(0.0 * logprobs.sum())
                continue
            tokens = LossTokens(
                logprobs=logprobs,
                inference_logprobs=batch.inference_logprobs,
                advantages=batch.advantages,
                sample_index=batch.sample_index,
            )
            output = policy_loss(tokens, totals, self._algorithm)
            _backward(self._loss_scale.factor * output.loss)
            passed.append(_Pass.behind(batch, output, logprobs, entropies))
        self._note_broken(passed, share, outcome)
        for figures, sums, maxima in _read([each.figures() for each in passed]):
            outcome.loss += figures["loss"]
            outcome.entropy += figures["entropy"]
            outcome.kl_sum += figures["kl_sum"]
            outcome.kl_max = max(outcome.kl_max, figures["kl_max"])
            for key, value in sums.items():
                outcome.sums[key] = outcome.sums.get(key, 0.0) + value
            for key, value in maxima.items():
                outcome.maxima[key] = max(outcome.maxima.get(key, value), value)
        outcome.tokens = _by_sample(passed, len(share.samples)) if passed else []

    def _backward_supervised(self, share: Share, step: Step, outcome: Outcome) -> None:
        """Add the gradient of the weight times the mean negative log-likelihood of the loss tokens."""
        passed: list[_Pass] = []
        for batch, is_last in self._pack(share):
            logprobs, entropies = self._logprobs(batch, is_last=is_last)
            if batch.is_filler:
                _backward(0.0 * logprobs.sum())
                continue
            part = supervised(logprobs, step.demonstrated_tokens)
            _backward(self._loss_scale.factor * step.demonstration_weight * part)
            passed.append(_Pass.behind(batch, LossOutput(part), logprobs, entropies))
        self._note_broken(passed, share, outcome)
        losses = _read([({"loss": each.output.loss},) for each in passed])
        outcome.demonstration_loss = sum(figures["loss"] for (figures,) in losses)

    def _pack(self, share: Share) -> Iterator[tuple[MicroBatch, bool]]:
        """Each micro-batch, and whether it is the last."""
        policy, packing = self.policy, self.config.packing
        kernel = policy.kernel(shared=packing is Packing.tree)
        batches = pack_share(share, packing, policy.positions, policy.device, kernel)
        for number, batch in enumerate(batches, 1):
            yield batch, number == len(share.passes)

    def _logprobs(self, batch: MicroBatch, *, is_last: bool) -> tuple[Tensor, Tensor]:
        return self._weights.compute(lambda: loss_logprobs(self.policy, batch, self._temperature), last=is_last)

    def _clip(self) -> float:
        learning = self._weights.learning().values()
        if self._loss_scale.factor != 1:
            for tensor in learning:
                if tensor.grad is not None:
                    tensor.grad.div_(self._loss_scale.factor)
        norm = torch.nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    # ── what is not finite ──────────────────────────────────────────────────────────────────────────────────

    def _note_broken(self, passed: Sequence[_Pass], share: Share, outcome: Outcome) -> None:
        """The first of `passed` whose loss is not finite, unless there was one before."""
        if not passed or outcome.broken_loss is not None:
            return
        is_broken = (~torch.isfinite(torch.stack([each.output.loss for each in passed]))).tolist()
        if not any(is_broken):
            return
        first = passed[is_broken.index(True)]
        batch = first.batch
        figures = torch.stack([first.logprobs, batch.inference_logprobs, batch.advantages])
        broken = batch.sample_index[~torch.isfinite(figures).all(0)].tolist()
        outcome.broken_loss = float(first.output.loss)
        outcome.names_are_exact = bool(broken)
        outcome.broken = [share.samples[i].rollout_id for i in sorted(set(broken or batch.sample_index.tolist()))]

    def _any_rank(self, here: bool) -> bool:
        if self._ranks == 1:
            return here
        anywhere = torch.tensor(here, dtype=torch.int32)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return bool(anywhere)


def _backward(loss: Tensor) -> None:
    """Nothing, where no part of the model that learns had a part in the loss: a vision tower alone, and no images."""
    if loss.requires_grad:
        torch.autograd.backward(loss)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was taken so far: of the GPU by torch, or by this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _by_sample(passed: Sequence[_Pass], samples: int) -> list[TokenMetrics]:
    """Logprobs and entropies, sorted back to the samples; one transfer from the device."""
    index = torch.cat([each.batch.sample_index for each in passed])
    order = index.argsort(stable=True)  # tokens of a sample stand in order, and a sample is never split
    figures = torch.cat([torch.stack([each.logprobs.float(), each.entropies.float()]) for each in passed], dim=1)
    logprobs, entropies = figures[:, order].cpu().numpy()
    ends = index.bincount(minlength=samples).cumsum(0)[:-1].tolist()
    return [TokenMetrics(*both) for both in zip(np.split(logprobs, ends), np.split(entropies, ends), strict=True)]


def _read(passes: Sequence[tuple[Scalars, ...]]) -> list[tuple[dict[str, float], ...]]:
    """The same with numbers in place of tensors; one transfer from the device."""
    tensors = [value for scalars in passes for part in scalars for value in part.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack([value.detach().double() for value in tensors]).tolist() if tensors else [])

    def read(part: Scalars) -> dict[str, float]:
        return {key: next(numbers) if isinstance(value, Tensor) else value for key, value in part.items()}

    return [tuple(map(read, scalars)) for scalars in passes]
