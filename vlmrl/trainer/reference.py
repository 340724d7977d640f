"""The second model of a run on one rank: its logprobs of what the policy sampled (`reference=`).

    share ─▶ the trainer's own packing ─▶ one forward pass of the reference, without gradient ─▶ logprobs, top tokens

Each distinct token of the prefix tree is computed once, as in the trainer's passes. The logprobs are those of the
distribution that was sampled from: the same temperature, the same supports, and no banned tokens.

Every rank holds a whole reference and scores its own share. A copy that follows the policy (`FrozenCopy.follow`) reads
the whole weights, which all ranks gather together.

Left out on purpose: a reference whose weights are divided among the ranks. `reference.offload` keeps them in the host's
memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vlmrl.models.lora import without_adapters
from vlmrl.models.policy import Policy
from vlmrl.trainer.averages import move


class Reference(Protocol):
    """A model that scores samples."""

    def scoring(self) -> contextlib.AbstractContextManager[Policy]:
        """Inside the block, the policy that the context gives computes the reference's logprobs."""
        ...

    def reads(self, version: int) -> bool:
        """Whether it follows the weights that step `version` has led to; 0: those before the first step."""
        ...

    def follow(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Read these weights, the policy's whole tensors by name. Called where `reads` says so, by all ranks at the
        same time."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores, by name; `load` into them restores the reference. Empty where it can be
        made again from the config."""
        ...

    def restored(self) -> None:
        """The tensors of `state` have been filled."""
        ...


class WithoutAdapters:
    """The policy itself, with its LoRA adapters switched off: what it was before the first step."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Policy]:
        with without_adapters(self._policy.model):
            yield self._policy

    def reads(self, version: int) -> bool:
        return False

    def follow(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def restored(self) -> None: ...


class FrozenCopy:
    """A model of its own."""

    def __init__(
        self, policy: Policy, *, offload: bool, begins: bool = False, refresh_every: int = 0, decay: float | None = None
    ) -> None:
        """`begins`: it takes the policy's weights before the first step. `refresh_every`: it takes them again after so
        many steps. `decay`: it is a moving average of them, in float32."""
        self.policy = policy
        policy.model.requires_grad_(False)
        self._offload = offload and policy.device.type != "cpu"
        self._begins = begins
        self._refresh_every = refresh_every
        self._decay = decay
        self._parameters: dict[str, Tensor] = dict(policy.model.named_parameters())
        self._averages: dict[str, Tensor] = {}
        """float32; only where the model itself is kept in another number format."""
        if decay is not None and policy.dtype is not torch.float32:
            place = torch.device("cpu") if self._offload else policy.device
            self._averages = {name: each.to(place, torch.float32) for name, each in self._parameters.items()}
        if self._offload:
            policy.model.to("cpu")

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Policy]:
        if not self._offload:
            yield self.policy
            return
        self.policy.model.to(self.policy.device)
        try:
            yield self.policy
        finally:
            self.policy.model.to("cpu")

    def reads(self, version: int) -> bool:
        if version == 0:
            return self._begins
        return self._decay is not None or (self._refresh_every > 0 and version % self._refresh_every == 0)

    def state(self) -> dict[str, Tensor]:
        follows = self._begins or self._decay is not None or self._refresh_every > 0
        return (self._averages or self._parameters) if follows else {}

    def restored(self) -> None:
        for name, average in self._averages.items():
            self._parameters[name].data.copy_(average)

    @torch.no_grad()
    def follow(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move every tensor by a share of its way to the policy's: all of it, or 1 − `decay` after a step."""
        share = 1.0 if version == 0 or self._decay is None else 1.0 - self._decay
        moved = set()
        for name, weight in weights:
            own = self._averages.get(name, self._parameters[name])
            move(own, weight, share)
            if name in self._averages:
                self._parameters[name].copy_(own)
            moved.add(name)
        assert moved == self._parameters.keys(), f"{sorted(moved ^ self._parameters.keys())[:3]} are not in both models"
