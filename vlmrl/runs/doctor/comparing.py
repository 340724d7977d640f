"""What the doctor measures with the trainer: logprobs and gradients of the evidence, computed in several ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from vlmrl.config.model import Dtype
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing
from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.evidence import Evidence, engine_logprobs
from vlmrl.runs.doctor.gradients import FLOAT32_GRADIENT, GradientDifference, gradient
from vlmrl.runs.doctor.logprobs import FLOAT32, ROUNDING_FACTOR, Bound, LogprobDifference, over_supports
from vlmrl.runs.doctor.pixels import InvertedPixels
from vlmrl.runs.doctor.playing import MAX_NEW_TOKENS
from vlmrl.runs.doctor.weights import weights_in
from vlmrl.runs.dtypes import engine_dtype, is_float32
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import FloatArray, Prompt, TrainingSample


class Comparing:
    """The policy's logprobs and gradients. No weight changes."""

    def __init__(self, config: RunConfig, policy: Policy, trainer: LocalTrainer | None = None) -> None:
        """`trainer` is the run's, by default a new one."""
        self._config, self._policy = config, policy
        self._trainer = trainer or self.trainer_of(config.orchestrator.temperature)
        # Its logprobs at temperature 0 are those of greedy decoding.
        self._greedy = self.trainer_of(0.0)

    def trainer_of(self, temperature: float, packing: Packing | None = None) -> LocalTrainer:
        """A trainer of the same weights. It has no optimizer state until it makes a step."""
        config = self._config
        settings = config.trainer if packing is None else dataclasses.replace(config.trainer, packing=packing)
        return LocalTrainer(
            self._policy, settings, config.algorithm, temperature=temperature, max_new_tokens=MAX_NEW_TOKENS
        )

    # ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────

    def logprobs(self, sampled: Sequence[TrainingSample], greedy: Sequence[TrainingSample] = ()) -> FloatArray:
        """float32 [loss tokens of both]: the trainer's logprobs."""
        found = [*self._trainer.logprobs(sampled), *self._greedy.logprobs(greedy)]
        return np.concatenate([np.empty(0, np.float32), *found])

    def greedy_logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """Per sample float32 [loss tokens], at temperature 1 and over the whole vocabulary."""
        return self._greedy.logprobs([dataclasses.replace(sample, supports=None) for sample in samples])

    def with_engine(self, evidence: Evidence) -> LogprobDifference:
        """The trainer's logprobs against the engine's."""
        found = LogprobDifference.between(
            self.logprobs(evidence.sampled, evidence.greedy), engine_logprobs(evidence.samples)
        )
        return dataclasses.replace(found, compared=over_supports(evidence.samples))

    def one_by_one(self, samples: Sequence[TrainingSample]) -> LogprobDifference:
        """The logprobs of the samples as the run packs them, against those of one forward pass per sample."""
        alone = self.trainer_of(0.0, Packing.none).logprobs(samples)
        return LogprobDifference.between(np.concatenate(self._greedy.logprobs(samples)), np.concatenate(alone))

    def bound(self, sampled: Sequence[TrainingSample], greedy: Sequence[TrainingSample] = ()) -> Bound:
        """The largest difference between two computations that rounding explains.

        Where one is in half precision, it follows from the trainer's own rounding on the same tokens. It is measured
        before the optimizer has a state, which takes as much memory as the second copy of the weights does here, and
        used for both versions.
        """
        if is_float32(self._config):
            return FLOAT32
        own = self._config.model.dtype
        other_dtype = engine_dtype(self._config) if own is Dtype.float32 else Dtype.float32
        as_it_is = self.logprobs(sampled, greedy)
        with weights_in(self._policy, getattr(torch, other_dtype.value)):
            other = self.logprobs(sampled, greedy)
        return Bound.of_rounding(LogprobDifference.between(as_it_is, other))

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────────────

    def packed_gradient(self, samples: Sequence[TrainingSample]) -> GradientDifference:
        """The gradient of the samples as the run packs them, against that of the samples one by one."""
        alone = gradient(self._policy, samples, Packing.none, 1)
        return GradientDifference.between(self._gradient(samples), alone, len(samples))

    def gradient_bound(self, samples: Sequence[TrainingSample]) -> float:
        """The largest relative distance of two gradients that rounding explains."""
        if self._config.model.dtype is Dtype.float32:
            return FLOAT32_GRADIENT
        as_it_is = gradient(self._policy, samples, Packing.none, 1)
        with weights_in(self._policy, torch.float32):
            exact = gradient(self._policy, samples, Packing.none, 1)
        return max(FLOAT32_GRADIENT, ROUNDING_FACTOR * GradientDifference.between(as_it_is, exact, 0).relative)

    def inverted_gradient(
        self, samples: Sequence[TrainingSample], swapped: Sequence[TrainingSample]
    ) -> GradientDifference:
        """The gradient of the samples with inverted pixels, against that with the pixels that were shown."""
        return GradientDifference.between(self._gradient(swapped), self._gradient(samples), len(samples))

    def _gradient(self, samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
        trainer = self._config.trainer
        return gradient(self._policy, samples, trainer.packing, trainer.micro_batch_tokens)

    # ── images ──────────────────────────────────────────────────────────────────────────────────────────────

    def inverted(self, samples: Sequence[TrainingSample], swapped: Sequence[TrainingSample]) -> InvertedPixels:
        """Logprobs of the samples with their pixels and with those of `swapped`, against the engine's."""
        trainer, others = self.logprobs(samples), self.logprobs(swapped)
        engine = engine_logprobs(samples)
        return InvertedPixels(
            trainer_change=LogprobDifference.between(trainer, others),
            shown=LogprobDifference.between(trainer, engine),
            inverted=LogprobDifference.between(others, engine),
        )


def inverted_samples(samples: Sequence[TrainingSample], prompts: Sequence[Prompt]) -> list[TrainingSample]:
    """The samples with the images of their inverse, which is each prompt's neighbor (`Playing.inverted`)."""
    others = [prompts[i ^ 1] for i in range(len(prompts))]
    return [
        dataclasses.replace(sample, placeholders=prompt.placeholders, mm_items=prompt.mm_items)
        for sample, prompt in zip(samples, others, strict=True)
    ]
