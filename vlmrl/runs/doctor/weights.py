"""Checks of the weights: a step changes them, every one of them reaches the engine; and how the doctor changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.logprobs import LogprobDifference
from vlmrl.runs.verdicts import Verdict, judged
from vlmrl.types import StepResult, WeightComparison

SHOWN_NAMES = 4
"""Names of weights that a finding lists."""

SMALLEST_RMS = 1e-3
"""Noise on a tensor is relative to its root mean square, or to this where that is smaller: zeros must change too."""


FIRST_NOISE = 0.02
"""Standard deviation of the noise on the weights, relative to their root mean square. It is doubled until the logprobs
show it, at most `DOUBLINGS` times."""
DOUBLINGS = 6


def update(name: str, step: StepResult, noise: float, change: LogprobDifference, smallest: float) -> Verdict:
    """An optimizer step succeeds, and together with the noise it changes the logprobs by more than `smallest`
    (mismatch_kl), so that version 1 can be told from version 0."""
    grad_norm = step.metrics["grad_norm"]
    finding = f"an optimizer step (grad norm {grad_norm:.2e}) and {noise:.0%} of noise: mismatch_kl {change.kl:.1e}"
    return judged(
        name,
        grad_norm > 0 and change.kl > smallest,
        finding,
        f"mismatch_kl > {smallest:.1e}",
        grad_norm=grad_norm,
        noise=noise,
        mismatch_kl=change.kl,
        limit=smallest,
    )


def weights(name: str, found: WeightComparison) -> Verdict:
    """Every weight in the engine has the digest of the trainer's."""
    finding = f"{found.compared} compared, {len(found.differing)} differ, {len(found.unmatched)} without a counterpart"
    named = [*found.differing, *found.unmatched]
    if named:
        finding += ": " + ", ".join(named[:SHOWN_NAMES]) + (" …" if len(named) > SHOWN_NAMES else "")
    return judged(
        name,
        found.compared > 0 and not named,
        finding,
        "0 and 0",
        compared=found.compared,
        differing=len(found.differing),
        unmatched=len(found.unmatched),
    )


@contextmanager
def weights_in(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Let the policy compute in `dtype` inside the block; afterwards its weights are bit for bit what they were.

    Both copies of the weights are in memory meanwhile.
    """
    parameters = list(policy.model.parameters())
    kept, kept_dtype = [parameter.data for parameter in parameters], policy.dtype
    try:
        policy.dtype = dtype
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        policy.dtype = kept_dtype
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def add_noise(policy: Policy, relative: float, seed: int) -> None:
    """Add Gaussian noise to every trainable weight, with a standard deviation of `relative` times the root mean square
    of its tensor (at least `SMALLEST_RMS`)."""
    for number, parameter in enumerate(policy.model.parameters()):
        if parameter.requires_grad:
            generator = torch.Generator(parameter.device).manual_seed(1000 * seed + number)
            size = parameter.detach().float().square().mean().sqrt().clamp_min(SMALLEST_RMS)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.data.add_((relative * size * noise).to(parameter.dtype))


def change_weights(
    policy: Policy, change: Callable[[], LogprobDifference], smallest: float
) -> tuple[float, LogprobDifference]:
    """Add noise to every trainable weight until `change()`, the difference of the logprobs to those of before, is
    larger than `smallest` (mismatch_kl): a step may be too small to show in bfloat16. Returns the noise and the
    change."""
    for doubling in range(DOUBLINGS):
        noise = FIRST_NOISE * 2**doubling
        add_noise(policy, noise, seed=doubling)
        found = change()
        if found.kl > smallest:
            break
    return noise, found
