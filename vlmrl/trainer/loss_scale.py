"""Loss scaling: what makes float16 hold gradients (Micikevicius et al., 2018, arXiv 1710.03740, section 3.2).

float16 has three bits of mantissa more than bfloat16, so sampler and trainer round eight times less apart (mismatch_kl
of 4.6e-4 where bfloat16 has 3.1e-2: benchmarks/README.md), but nothing below 6e-8, as most gradients are. So the loss
is multiplied before its backward pass, as far as the largest gradient allows, and the float32 sum of the gradients is
divided again. Where one overflows all the same, the step is computed once more with half the factor: no batch is lost.

The forward pass is not helped by it: activations above 65504 are infinite in float16, and a model that has them needs
bfloat16.
"""

from __future__ import annotations

import torch

FIRST = 2**16
LARGEST = 2**24
GROWS_AFTER = 50
"""Steps without an overflow until a larger factor is tried. RL makes hundreds of steps, not millions."""


class LossScale:
    """The factor; 1, and always that, for formats that have the range.

    >>> scale = LossScale(torch.float16)
    >>> scale.factor, scale.shrink(), scale.factor
    (65536, True, 32768)
    >>> LossScale(torch.bfloat16).shrink()
    False
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._is_needed = dtype == torch.float16
        self.factor = FIRST if self._is_needed else 1
        self._kept = 0
        """Steps since it was changed."""

    def shrink(self) -> bool:
        """A gradient overflowed. Whether a smaller factor may help, which is the present one then."""
        if self.factor == 1:
            return False
        self.factor //= 2
        self._kept = 0
        return True

    def keep(self) -> None:
        """A step went well."""
        self._kept += 1
        if self._is_needed and self._kept >= GROWS_AFTER and self.factor < LARGEST:
            self.factor *= 2
            self._kept = 0

    @property
    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"loss_scale": self.factor, "loss_scale_kept": self._kept}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        if self._is_needed:  # another format may have written it
            self.factor, self._kept = state["loss_scale"], state["loss_scale_kept"]
