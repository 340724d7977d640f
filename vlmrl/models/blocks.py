"""The repeated layers of a model's vision tower and language model: compiling them, and activation checkpointing.

Neither changes results beyond the rounding of fused kernels. Layers are found by the base class that transformers gives
them in every family.

Layers of one class share the compiled code, and it serves all sizes (compiling.py): micro-batches differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmrl.models.attention.fused import SHORT_PASS_ROWS
from vlmrl.models.compiling import for_all_sizes, of_one_width


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
    """Compile each layer at its first call, for all sizes above `SHORT_PASS_ROWS`."""
    for block in blocks(model):
        # `torch.nn.Module.compile` sets the same.
        block._compiled_call_impl = compiled_above(SHORT_PASS_ROWS, block._call_impl)


def has_compiled_blocks(model: Any) -> bool:
    """Whether `compile_blocks` was called for the model."""
    return any(block._compiled_call_impl is not None for block in blocks(model))


def compiled_above(rows: int, layer: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that is compiled for more than so many rows. Only the rows decide, so that a recomputed layer takes the
    same code in the backward pass."""
    compiled = for_all_sizes(layer)

    def call(*arguments: Any, **named: Any) -> Any:
        hidden_states: Tensor = arguments[0] if arguments else next(iter(named.values()))
        if hidden_states.shape[:-1].numel() <= rows:
            return layer(*arguments, **named)
        if arguments and hidden_states._is_view():  # the first layer's only: it would be compiled once more for views
            hidden_states = hidden_states.clone()
            arguments = (hidden_states, *arguments[1:])
        rotations = named.get("position_embeddings")
        of_one_width(hidden_states, *(rotations if isinstance(rotations, tuple) else ()))
        return compiled(*arguments, **named)

    return call


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
