"""The repeated layers of a model, of its vision tower and of its language model: compiled, recomputed.

Both leave the numbers as they are, up to rounding where kernels are fused. Layers are found by the class that every
family of transformers gives them, so that nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: Any) -> list[Any]:
    """The layers, in the order in which the model lists them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def prepare_blocks(model: Any, *, compiled: bool, recomputed: bool) -> None:
    """`trainer.compile` and `trainer.activation_checkpointing`; before the model is sharded."""
    if recomputed:
        checkpoint_blocks(model)
    if compiled:
        compile_blocks(model)


def compile_blocks(model: Any) -> None:
    """`torch.compile` each layer. Layers of a kind share their code; sizes are left open: micro-batches differ."""
    for block in blocks(model):
        block.compile(dynamic=True)


def checkpoint_blocks(model: Any) -> None:
    """Keep a layer's input alone for the backward pass, which computes the layer again."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for block in blocks(model):
        block.training = True  # transformers recomputes in training alone; its parts stay as they are


@contextmanager
def uncompiled_in_inference() -> Iterator[None]:
    """Run compiled layers as they were where the embedded engine asks: its sizes change with every token, and each
    kind of plan would be compiled anew."""
    if torch.is_inference_mode_enabled():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
