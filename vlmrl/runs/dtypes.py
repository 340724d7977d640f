"""The number formats in which a run computes."""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.run import RunConfig


def engine_dtype(config: RunConfig) -> Dtype:
    """The format in which the engine computes. The embedded engine computes in the trainer's."""
    return config.inference.dtype if isinstance(config.inference, VllmConfig) else config.model.dtype


def is_float32(config: RunConfig) -> bool:
    """Whether both trainer and engine compute in float32, so that their logprobs differ by its rounding only."""
    return {config.model.dtype, engine_dtype(config)} == {Dtype.float32}
