"""A decode step in the layers that carry a state: one token of each row, and states that are written in place.

On a GPU a state is read and written once then (state_kernels.py). The functions of transformers return the next state
instead, or, as `causal_conv1d_update`, change the states of all rows; so they are wrapped where they are looked up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from vlmrl.models.attention.decode import uses_kernels

SHIFT = "causal_conv1d_update"
"""The function of transformers' modules that takes one token of a causal convolution."""


@dataclass(frozen=True, eq=False)
class RowStep:
    """A decode step of R rows."""

    alive: Tensor
    """bool [R]; the rows whose states the step changes."""
    written: list[Tensor] = field(default_factory=list)
    """States that have become those after the token already, in the rows that are alive."""

    def has_written(self, state: Tensor) -> bool:
        return any(each is state for each in self.written)


_STEP: ContextVar[RowStep | None] = ContextVar("step", default=None)


@contextmanager
def row_step(alive: Tensor) -> Iterator[RowStep]:
    """Layers that are called inside get one token of each row, and the states of the rows before it."""
    token = _STEP.set(step := RowStep(alive))
    try:
        yield step
    finally:
        _STEP.reset(token)


def current_step() -> RowStep | None:
    return _STEP.get()


def shifts_windows(mixer: Any) -> bool:
    """Let steps shift the windows of a layer's convolution in place, in rows that are alive only → whether the layer
    has such a function. May be called twice."""
    names = vars(sys.modules[type(mixer).__module__])
    if (function := names.get(SHIFT)) is not None and not isinstance(function, _Shift):
        names[SHIFT] = _Shift(function)
    return function is not None


class _Shift:
    """In place of `causal_conv1d_update`."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __call__(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """hidden_states [R, channels, 1], conv_state [R, channels, window], weight [channels, k ≤ window + 1] →
        [R, channels, 1]."""
        step = current_step()
        if step is None:
            output: Tensor = self._own(hidden_states, conv_state, weight, bias, activation)
            return output
        if uses_kernels(hidden_states.device):
            from vlmrl.models.attention.state_kernels import shift_by_kernel

            output = shift_by_kernel(hidden_states, conv_state, weight, bias, step.alive)
        else:
            whole = torch.cat([conv_state, hidden_states], -1)
            inputs = whole[..., -weight.shape[-1] :].to(weight.dtype)
            output = torch.nn.functional.conv1d(inputs, weight[:, None], bias, groups=len(weight))
            conv_state.copy_(torch.where(step.alive[:, None, None], whole[..., 1:], conv_state))
        step.written.append(conv_state)
        return output if activation is None else ACT2FN[activation](output)
