"""Checks of the gradient: one prefix tree gives that of the samples one by one, and it depends on the pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmrl.config.trainer import Packing
from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.pixels import NO_IMAGE
from vlmrl.runs.verdicts import Verdict, judged, not_visible
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.packing import pack
from vlmrl.types import FloatArray, TrainingSample

FLOAT32_GRADIENT = 1e-5
"""Largest distance of two gradients, relative to their size, that float32 explains. Measured: 1e-6, and 3e-6 with
gated delta nets."""


@dataclass(frozen=True)
class GradientDifference:
    """How far two gradients of the same tokens are apart."""

    relative: float
    """L2 norm of the difference, relative to the second gradient's."""
    norm: float
    """L2 norm of the second gradient."""
    parameter: str
    """The parameter with the largest part in the difference."""
    samples: int

    @staticmethod
    def between(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], samples: int) -> GradientDifference:
        """Gradients by parameter."""
        apart = {name: float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs}
        norm = sum(float(gradient.double().square().sum()) for gradient in theirs.values()) ** 0.5
        distance = sum(apart.values()) ** 0.5
        return GradientDifference(
            distance / norm if norm else float("nan"), norm, max(apart, key=apart.__getitem__), samples
        )


def gradient(
    policy: Policy, samples: Sequence[TrainingSample], packing: Packing, token_budget: int
) -> dict[str, Tensor]:
    """The gradient of a sum of the samples' logprobs at temperature 1, by parameter, on the CPU in the model's dtype.

    Each token has a random sign of its own, so that no two of them cancel in every sum. No weight changes.
    """
    signed = [dataclasses.replace(sample, advantages=_signs(sample)) for sample in samples]
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, device="cpu") for name, p in parameters.items()}
    batches = pack(
        signed,
        packing,
        token_budget,
        policy.positions,
        policy.device,
        kernel=policy.kernel(shared=packing is Packing.tree),
        rules=policy.rules,
    )
    for batch in batches:
        found, _ = loss_logprobs(policy, batch, temperature=1.0)
        loss = (batch.advantages * found).sum()
        if not loss.requires_grad:
            continue
        for name, part in zip(
            parameters, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True
        ):
            if part is not None:
                total[name] += part.cpu()
    return total


def _signs(sample: TrainingSample) -> FloatArray:
    """float32 [L]: 1 or −1 on loss tokens, 0 elsewhere; a function of the tokens."""
    random = np.random.default_rng(sample.token_ids.astype(np.uint32))
    return np.where(
        sample.loss_mask, random.choice(np.array([-1.0, 1.0], np.float32), len(sample.token_ids)), 0.0
    ).astype(np.float32)


def packed_gradient(name: str, found: GradientDifference, bound: float) -> Verdict:
    """The gradient of the packed samples is that of the samples one by one, up to `bound` (relative)."""
    finding = f"{found.samples} samples: relative distance {found.relative:.1e}, most of it in {found.parameter}"
    return judged(
        name,
        found.norm > 0 and found.relative <= bound,
        finding,
        f"<= {bound:.1e}",
        relative=found.relative,
        norm=found.norm,
        limit=bound,
    )


def images_in_gradient(name: str, found: GradientDifference | None, smallest: float) -> Verdict:
    """Inverted pixels behind the same tokens change the gradient by more than rounding explains."""
    if found is None:
        return not_visible(name, NO_IMAGE)
    finding = f"{found.samples} samples: inverted pixels change the gradient by {found.relative:.1e} of its size"
    return judged(
        name, found.relative > smallest, finding, f"> {smallest:.1e}", relative=found.relative, limit=smallest
    )
