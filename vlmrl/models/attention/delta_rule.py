"""Which code computes the rule of a gated delta net, and with how many digits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlmrl.models.attention.decode import uses_kernels
from vlmrl.models.attention.row_step import RowStep, current_step


def keep_references(mixer: Any) -> None:
    """Let `_HalfPrecisionKernel` choose for the functions with a state that the layer's module calls. transformers
    replaces them, for all number formats, where flash-linear-attention is installed."""
    names = vars(sys.modules[type(mixer).__module__])
    for name, function in list(names.items()):
        reference = getattr(function, "__wrapped__", None)
        if reference is not None and "initial_state" in inspect.signature(reference).parameters:
            names[name] = _HalfPrecisionKernel(function, reference)


class _HalfPrecisionKernel:
    """A function of a recurrent layer for which a package may have put a kernel. Where such kernels fail, transformers'
    own code computes: in float32, and for single tokens, for which they have no gradient. For decode steps on a GPU
    there is a kernel here."""

    def __init__(self, kernel: Any, reference: Any) -> None:
        self._kernel, self._reference = kernel, reference
        self._has_step = reference.__name__ == "torch_recurrent_gated_delta_rule"

    def __call__(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """query [B, tokens, …]."""
        step = current_step()
        if step is not None and self._has_step and uses_kernels(query.device):
            given = inspect.signature(self._reference).bind(query, *args, **kwargs)
            given.apply_defaults()
            return self._step(step, *given.args)
        if query.dtype in (torch.bfloat16, torch.float16) and query.shape[1] > 1:
            return self._kernel(query, *args, **kwargs)
        if query.device.type == "mps":  # it has no float64
            return self._reference(query, *args, **kwargs)
        with _DecaysInDouble():
            return self._reference(query, *args, **kwargs)

    def _step(
        self,
        step: RowStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
        _: bool,
        normed: bool,
    ) -> tuple[Tensor, Tensor]:
        """As the reference, but `state` itself becomes the one after the token. The reference's further arguments are
        those of packages, which it ignores as well."""
        from vlmrl.models.attention.state_kernels import step_by_kernel

        output = step_by_kernel(query, key, value, decay, beta, state, step.alive, normed=normed)
        step.written.append(state)
        return output, state


class _DecaysInDouble(TorchFunctionMode):
    """Has the code of transformers sum the logarithms of decays in float64. The decays themselves are float32 again.

    A gated delta net computes the decay between tokens i and j of a chunk as exp(c_i - c_j), where c is summed from the
    start of the chunk. In a head that forgets fast, c soon is -500, where neighboring float32 numbers are 3e-5 apart.
    Then every later decay has that relative error, even one near 1. The error is another one where a chunk starts at
    another token, as it does in a prefix tree. The gradients of the tiny Qwen3.5 by tree and one by one were 1.1e-5
    apart, and are 3e-6 apart.
    """

    _widened = False
    """Whether the sums were float32 before. Only then are their exponentials float32 again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "cumsum" and args[0].dtype is torch.float32:
            self._widened = True
            args = (args[0].double(), *args[1:])
        result = func(*args, **(kwargs or {}))
        return result.float() if name == "exp" and self._widened else result
