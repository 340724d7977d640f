"""Small text models with layers that carry a state, built from transformers' own classes, in double precision."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from vlmrl.caches.lru import ByteLRU
from vlmrl.models.families import vision_geometry

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "initializer_range": 0.2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HALF = {"layer_types": ["linear_attention", "full_attention"] * 2}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": TEXT | LINEAR,
    "qwen3_next": TEXT | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
    "olmo_hybrid": TEXT | LINEAR | HALF | {"bos_token_id": 1, "eos_token_id": 2},
    "lfm2": TEXT | {"layer_types": ["conv", "full_attention"] * 2},
}


class InDoublePrecision(TorchFunctionMode):
    """Has the code of transformers compute in float64 where it asks for float32. What is kept of images' sizes has the
    precision in which it was derived, so nothing of it is shared with other tests."""

    def __enter__(self) -> Self:
        self._kept = vision_geometry._FRAMES
        vision_geometry._FRAMES = ByteLRU(1 << 20)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        vision_geometry._FRAMES = self._kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        double = {torch.float32: torch.float64}
        args = tuple(double.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: double.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


EAGER = {"experts_implementation": "eager"}
"""The grouped kernel of experts takes no float64."""


def text_model(name: str) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(name, **MODELS[name]), **EAGER).double().eval()
