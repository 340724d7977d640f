"""The learner: samples → packed forward and backward → one optimizer step. Knows no task and no engine.

    samples ─▶ pack ─▶ for each micro-batch: encode images, forward, loss, backward ─▶ clip ─▶ AdamW ─▶ version + 1

Losses are normalized by figures of the whole batch, so loss and gradient do not depend on how the samples are split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import NonFiniteLossError
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.config import AlgorithmConfig
from vlmrl.trainer.checkpoint import load_training_state, save_training_state
from vlmrl.trainer.config import Decay, Packing, TrainerConfig
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.loss import BatchTotals, LossTokens, loss_metrics, mismatch_kl, policy_loss, supervised
from vlmrl.trainer.packing import MicroBatch, pack
from vlmrl.types import FloatArray, StepResult, TokenFigures, TrainingSample

EMPTY_STEP = (
    "loss",
    "grad_norm",
    "entropy",
    "mismatch_kl/mean",
    "mismatch_kl/max",
    "staleness/mean",
    "staleness/max",
    "tokens/trained",
    "tokens/packed",
)
"""Figures of a step that had nothing to learn from; all 0.0."""


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Learning rate of RL step `step` (0-based): linear warm-up, then the chosen decay to `min_lr_ratio`.

    >>> config = TrainerConfig(max_steps=100, learning_rate=1.0, decay=Decay.linear, min_lr_ratio=0.0)
    >>> [round(learning_rate(config, step), 2) for step in (0, 50, 99)]
    [1.0, 0.5, 0.01]
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, config.max_steps - config.lr_warmup_steps))
    floor = config.min_lr_ratio
    share = {
        Decay.constant: 1.0,
        Decay.linear: 1.0 - (1.0 - floor) * progress,
        Decay.cosine: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.decay]
    return config.learning_rate * share


class LocalTrainer:
    """One process, one device."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        self._policy = policy
        self._config = config
        self._algorithm = algorithm
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._version = 0
        self._supervised_steps = 0

    @property
    def version(self) -> int:
        """RL steps contained in the weights; supervised steps do not count."""
        return self._version

    @property
    def supervised_steps(self) -> int:
        """Supervised steps contained in the weights."""
        return self._supervised_steps

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by their names in a checkpoint, each once: a head that is the embedding is not a second
        one. They are the ones that learn, not copies."""
        return dict(self._policy.model.named_parameters())

    def train_step(self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = ()) -> StepResult:
        """One RL step on `samples`, with `demonstrations` at their weight.

        Raises `NonFiniteLossError` before the weights are touched. Without samples (every rollout was dropped) the
        weights stay as they are and the step still counts.
        """
        if not samples:
            self._version += 1
            return StepResult(self._version, dict.fromkeys(EMPTY_STEP, 0.0))
        batches = self._pack(samples)
        self._policy.take_image_counters()  # what the engine or a step that failed have counted
        totals = BatchTotals(
            tokens=sum(len(batch.targets) for batch in batches),
            samples=len(samples),
            max_new_tokens=self._max_new_tokens,
        )
        loss, entropy, kl_sum, kl_max = 0.0, 0.0, 0.0, 0.0
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        figures: list[Tensor] = []
        """float32 [2, N] of each micro-batch: logprobs and entropies."""
        for batch in batches:
            logprobs, entropies = self._logprobs(batch)
            tokens = LossTokens(
                logprobs=logprobs,
                inference_logprobs=batch.inference_logprobs,
                advantages=batch.advantages,
                sample_index=batch.sample_index,
            )
            output = policy_loss(tokens, totals, self._algorithm)
            self._assert_finite(output.loss, logprobs, batch, samples)
            torch.autograd.backward(output.loss)
            loss += float(output.loss.detach())
            figures.append(torch.stack([logprobs.detach().float(), entropies[batch.entry].float()]))
            entropy += float(entropies[batch.entry].sum())
            total, largest = mismatch_kl(logprobs.detach(), batch.inference_logprobs)
            kl_sum, kl_max = kl_sum + total, max(kl_max, largest)
            for key, value in output.sums.items():
                sums[key] = sums.get(key, 0.0) + value
            for key, value in output.maxima.items():
                maxima[key] = max(maxima.get(key, value), value)
        images = self._policy.take_image_counters()
        lr = learning_rate(self._config, self._version)
        demonstration_weight = self._config.warmup.rl_weight * lr / self._config.learning_rate
        demonstration_loss = self._backward_supervised(demonstrations, demonstration_weight)
        versions = np.concatenate([batch.versions.cpu().numpy() for batch in batches])
        staleness = self._version - versions
        grad_norm = self._optimizer_step(lr, samples)
        self._version += 1
        return StepResult(
            version=self._version,
            metrics={
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": lr,
                "demonstration_loss": demonstration_loss,
                "entropy": entropy / totals.tokens,
                "mismatch_kl/mean": kl_sum / totals.tokens,
                "mismatch_kl/max": kl_max,
                "staleness/mean": float(staleness.mean()),
                "staleness/max": float(staleness.max()),
                "tokens/trained": float(totals.tokens),
                "tokens/packed": float(sum(len(batch.token_ids) for batch in batches)),
                "tokens/unpacked": float(sum(len(sample.token_ids) for sample in samples)),
                **images,
                "micro_batches": float(len(batches)),
                **loss_metrics(sums, maxima, totals.tokens),
            },
            tokens=_by_sample(batches, figures, len(samples)),
        )

    def supervised_step(self, samples: list[TrainingSample], lr: float) -> dict[str, float]:
        """One step of next-token likelihood on the samples' loss tokens. Does not count as a policy version."""
        loss = self._backward_supervised(samples, weight=1.0)
        grad_norm = self._optimizer_step(lr, samples)
        self._supervised_steps += 1
        return {"loss": loss, "grad_norm": grad_norm, "learning_rate": lr}

    def _backward_supervised(self, samples: Sequence[TrainingSample], weight: float) -> float:
        """Add the gradient of `weight` times the mean negative log-likelihood of the loss tokens → the mean itself."""
        batches = self._pack(samples)
        total = sum(len(batch.targets) for batch in batches)
        loss = 0.0
        for batch in batches:
            logprobs, _ = self._logprobs(batch)
            part = supervised(logprobs, total)
            self._assert_finite(part, logprobs, batch, samples)
            torch.autograd.backward(weight * part)
            loss += float(part.detach())
        return loss

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """See `vlmrl.types.Trainer.logprobs`."""
        found = [np.empty(0, np.float32)] * len(samples)
        with torch.no_grad():
            for batch in self._pack(samples):
                logprobs = self._logprobs(batch)[0].cpu().numpy()
                sample_index = batch.sample_index.cpu().numpy()
                for index in np.unique(sample_index):
                    found[index] = logprobs[sample_index == index]
        return found

    def save(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.save`."""
        counters = {"version": self._version, "supervised_steps": self._supervised_steps}
        save_training_state(Path(folder), self._policy.model, self._optimizer, counters)

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`."""
        counters = load_training_state(Path(folder), self._policy.model, self._optimizer)
        self._version, self._supervised_steps = counters["version"], counters["supervised_steps"]

    def _pack(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        config, policy = self._config, self._policy
        return pack(
            samples,
            config.packing,
            config.micro_batch_tokens,
            policy.positions,
            policy.device,
            kernel=policy.kernel(shared=config.packing is Packing.tree),
        )

    def _logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return loss_logprobs(self._policy, batch, self._temperature)

    def _optimizer_step(self, lr: float, samples: Sequence[TrainingSample]) -> float:
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad()
            raise NonFiniteLossError(
                f"gradient norm is {grad_norm} at version {self._version}: nothing was changed; samples of the batch: "
                f"{_names(samples)}"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return grad_norm

    def _assert_finite(
        self, loss: Tensor, logprobs: Tensor, batch: MicroBatch, samples: Sequence[TrainingSample]
    ) -> None:
        if torch.isfinite(loss):
            return
        self._optimizer.zero_grad()
        figures = torch.stack([logprobs.detach(), batch.inference_logprobs, batch.advantages])
        broken = batch.sample_index[~torch.isfinite(figures).all(0)].tolist()
        named = sorted(set(broken or batch.sample_index.tolist()))
        raise NonFiniteLossError(
            f"loss is {float(loss.detach())} at version {self._version}: nothing was changed; "
            f"samples {'with a logprob or advantage that is not finite' if broken else 'of the micro-batch'}: "
            f"{_names([samples[i] for i in named])}"
        )


def _by_sample(batches: Sequence[MicroBatch], figures: Sequence[Tensor], samples: int) -> list[TokenFigures]:
    """`figures`, float32 [2, N] of each micro-batch, sorted back to the samples; one transfer from the device."""
    index = torch.cat([batch.sample_index for batch in batches])
    order = index.argsort(stable=True)  # tokens of a sample stand in order, and a sample is never split
    logprobs, entropies = torch.cat(list(figures), dim=1)[:, order].cpu().numpy()
    ends = index.bincount(minlength=samples).cumsum(0)[:-1].tolist()
    return [TokenFigures(*both) for both in zip(np.split(logprobs, ends), np.split(entropies, ends), strict=True)]


def _names(samples: Sequence[TrainingSample]) -> str:
    names = [sample.rollout_id for sample in samples]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
