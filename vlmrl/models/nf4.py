"""Linear layers whose frozen weights are held in 4 bits: NF4 of QLoRA (arXiv 2305.14314), by bitsandbytes.

    W ─▶ blocks of 64 numbers ─▶ per number the nearest of 16 levels (4 bits), per block the largest magnitude (float32)
    forward, backward:  levels × magnitude, rounded to the layer's dtype = W' ─▶ y = x W'ᵀ,  dx = dy W'

4.5 bits a weight in place of 16. W' is made for one layer at a time and not kept for the backward pass, which makes it
again. Trainer, embedded engine and merged weights (lora.py) all use the same W', so they compute the same function.

Left out on purpose: double quantization of the magnitudes (0.37 bits a weight more), bitsandbytes' products of a 4-bit
matrix with few rows, which round in another way than the trainer's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

# At its import, which PEFT also does, bitsandbytes warns that it could fetch a faster product for the CPU, which is not
# used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

BLOCK = 64
"""Numbers that share a magnitude."""


def in_4_bits(model: nn.Module) -> int:
    """How many weights of a model are held in 4 bits; they are not among its parameters."""
    return sum(2 * module.codes.numel() for module in model.modules() if isinstance(module, Nf4Linear))


def fits(layer: nn.Module) -> bool:
    """Whether a linear layer can be held in 4 bits: its weight is a whole number of blocks."""
    return type(layer) is nn.Linear and layer.weight.numel() % BLOCK == 0


class Nf4Linear(nn.Module):
    """A linear layer that does not learn, with its weight in 4 bits."""

    codes: Tensor
    """uint8 [rows × columns / 2]: two levels each."""
    magnitudes: Tensor
    """float32 [rows × columns / 64]."""

    def __init__(self, layer: nn.Linear, device: torch.device | None = None) -> None:
        """`layer`, quantized on `device`, by default its own. Its bias stays as it is."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        weight = layer.weight.detach().to(device or layer.weight.device)
        # As rows of one block: bitsandbytes 0.50 has other values on a CPU where a row is no whole number of blocks.
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight.reshape(-1, BLOCK), blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("codes", codes.flatten(), persistent=False)
        self.register_buffer("magnitudes", state.absmax, persistent=False)
        self.bias = layer.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, in its dtype [out_features, in_features]; a new tensor."""
        return dequantized(self.codes, self.magnitudes, self.out_features, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Any = _Product.apply
        y: Tensor = product(x, self.codes, self.magnitudes, self.out_features, self.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nf4"


class _Product(torch.autograd.Function):
    """x W'ᵀ, with W' made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, magnitudes: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, magnitudes)
        ctx.rows, ctx.dtype = rows, dtype
        return nn.functional.linear(x, dequantized(codes, magnitudes, rows, dtype).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, magnitudes = ctx.saved_tensors
        gradient = gradients[0] @ dequantized(codes, magnitudes, ctx.rows, ctx.dtype).to(gradients[0].dtype)
        return gradient, None, None, None, None


def dequantized(codes: Tensor, magnitudes: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`dtype` [rows, columns]: each level times the magnitude of its block."""
    shape = (len(magnitudes), BLOCK)
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, magnitudes, BLOCK, "nf4", shape, dtype)
    return flat.view(rows, -1)
