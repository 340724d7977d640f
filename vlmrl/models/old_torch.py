"""Everything that torch 2.11 needs and torch 2.13 does not.

Why it exists: the GPU machine has torch 2.11 (and vLLM 0.26, see inference/vllm/old_vllm.py). All other machines have
torch 2.13.

What a run on torch 2.11 loses: nothing in its numbers. FlexAttention never takes its decoding kernel, which for short
passes (below 128 rows) could be faster.

To drop the support, delete this file and what fused.py and tree.py in models/attention do with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

FLEX_KERNEL_OPTIONS: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
"""Below 128 rows FlexAttention chooses a kernel that is made for decoding. In torch 2.11 that kernel has no
configuration for some lengths (68 rows), and the pass fails. This forces the ordinary kernel."""

VARLEN_OPTIONS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""For fewer key heads than query heads: an argument in torch 2.13; torch 2.11 has no such argument and accepts them."""


def outside_of_compiled_layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which a compiled layer calls as it is. Where torch 2.11 compiles a layer with an `autograd.Function`
    that takes more than tensors, the layer's input gets a gradient of zeros."""
    if torch.__version__ >= "2.13":  # a TorchVersion: it compares numbers
        return function
    uncompiled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return uncompiled
