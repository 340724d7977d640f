"""Everything that torch 2.11 needs and torch 2.13 does not.

Why it exists: the GPU machine has torch 2.11 (and vLLM 0.26, see inference/vllm/old_vllm.py). All other machines have
torch 2.13.

What a run on torch 2.11 loses: nothing in its numbers. FlexAttention never takes its decoding kernel, which for short
passes (below 128 rows) could be faster.

To drop the support, delete this file and what models/attention/fused.py does with it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn.attention.varlen import varlen_attn

FLEX_KERNEL_OPTIONS: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
"""Below 128 rows FlexAttention chooses a kernel that is made for decoding. In torch 2.11 that kernel has no
configuration for some lengths (68 rows), and the pass fails. This forces the ordinary kernel."""

VARLEN_OPTIONS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""For fewer key heads than query heads: an argument in torch 2.13; torch 2.11 has no such argument and accepts them."""
