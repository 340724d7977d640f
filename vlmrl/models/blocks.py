"""The repeated layers of a model's vision tower and language model: compiling them, and activation checkpointing.

Neither changes results beyond the rounding of fused kernels. Layers are found by the base class that transformers gives
them in every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: Any) -> list[Any]:
    """The layers, in the order of `model.modules()`."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def prepare_blocks(model: Any, *, compiled: bool, recomputed: bool) -> None:
    """Apply `trainer.compile` and `trainer.activation_checkpointing`. Call it before the model is sharded."""
    if recomputed:
        checkpoint_blocks(model)
    if compiled:
        compile_blocks(model)


def compile_blocks(model: Any) -> None:
    """`torch.compile` each layer, for all sizes: micro-batches differ. Layers of one class share the compiled code."""
    for block in blocks(model):
        block.compile(dynamic=True)


def checkpoint_blocks(model: Any) -> None:
    """Keep only each layer's input for the backward pass, which computes the layer again."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for block in blocks(model):
        block.training = True  # transformers recomputes only in training mode; the submodules stay in eval mode


@contextmanager
def uncompiled_in_inference() -> Iterator[None]:
    """In inference mode (the embedded engine), run layers uncompiled: sizes change with every token, and each kind of
    plan would be compiled again."""
    if torch.is_inference_mode_enabled():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
