"""The kernels for one token of layers that carry a state against transformers' own code in float64."""

from __future__ import annotations

import sys
from typing import Any

# ruff: noqa: E402
from vlmrl.models import broken_wheels

broken_wheels.install()

import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from support.recurrent_models import InDoublePrecision
from support.triton_kernels import choose, compile_for_an_h100, each_way, run

CLOSE = 1e-6
"""Largest difference in float32, where values have the standard deviation 1."""

SIZES = [(5, 2, 16, 16), (3, 4, 128, 128), (2, 1, 24, 40), (7, 3, 64, 8)]
"""Rows, heads, sizes of a key and of a value."""


@each_way
def test_the_kernels_are_transformers_own_code_and_compile(how: str) -> None:
    run(__file__, how)


def unwrapped(found: Any) -> Any:
    while (inner := getattr(found, "__wrapped__", None)) is not None:
        found = inner
    return found


def main(device: str) -> None:
    rule_alike(device)
    convolution_alike(device)


def convolution_alike(device: str) -> None:
    from vlmrl.models.attention.state_kernels import shift_by_kernel

    reference = unwrapped(modeling_qwen3_5.causal_conv1d_update)
    generator = torch.Generator().manual_seed(0)
    for rows, channels, window, size in ((5, 7, 4, 4), (3, 300, 3, 3), (2, 16, 3, 4), (4, 600, 5, 2)):
        for dtype, close in ((torch.float32, CLOSE), (torch.bfloat16, 0.02)):
            mixed = torch.randn(rows, 1, channels, generator=generator).to(dtype)
            weight = (torch.randn(channels, 1, size, generator=generator) * 0.5).to(dtype).squeeze(1)
            state = torch.randn(rows, channels, window, generator=generator).to(dtype)
            alive = torch.arange(rows) % 3 != 1
            for bias in (None, torch.randn(channels, generator=generator).to(dtype)):
                after = state.double()
                wide = (mixed.transpose(1, 2).double(), after, weight.double(), None if bias is None else bias.double())
                wanted = reference(*wide)
                found = state.to(device, copy=True)
                new, its_weight, living = (x.to(device) for x in (mixed.transpose(1, 2), weight, alive))
                output = shift_by_kernel(new, found, its_weight, None if bias is None else bias.to(device), living)
                assert output.dtype is dtype
                assert output.shape == wanted.shape
                error = (output.cpu() - wanted).abs() / wanted.abs().clamp(min=1)
                assert float(error.max()) < close, (channels, window, size, dtype)
                assert found.cpu().double()[alive].equal(after[alive])
                assert found.cpu()[~alive].equal(state[~alive])


def rule_alike(device: str) -> None:
    reference = unwrapped(modeling_qwen3_5.torch_recurrent_gated_delta_rule)
    from vlmrl.models.attention.state_kernels import step_by_kernel

    generator = torch.Generator().manual_seed(0)
    for rows, heads, size, width in SIZES:
        for normed in (True, False):
            for dtype, close in ((torch.float32, CLOSE), (torch.bfloat16, 0.02)):
                mixed = torch.randn(rows, 1, heads * (2 * size + width), generator=generator)
                mixed[..., : 2 * heads * size] *= size**-0.5
                parts = torch.split(mixed.to(dtype), [heads * size, heads * size, heads * width], -1)
                query, key, value = (part.view(rows, 1, heads, -1) for part in parts)  # no copies, as in a model
                decay = -torch.rand(rows, 1, heads, generator=generator) * 3
                beta = torch.rand(rows, 1, heads, generator=generator).to(dtype)
                state = torch.randn(rows, heads, size, width, generator=generator)
                alive = torch.arange(rows) % 3 != 1
                with InDoublePrecision():
                    wide = (x.double() for x in (query, key, value, decay, beta, state))
                    wanted, after = reference(*wide, True, normed)
                found = state.to(device, copy=True)
                q, k, v, g, b, living = (x.to(device) for x in (query, key, value, decay, beta, alive))
                output = step_by_kernel(q, k, v, g, b, found, living, normed=normed).cpu()
                assert output.dtype is dtype
                assert output.shape == wanted.shape
                assert float((output[alive] - wanted[alive]).abs().max()) < close, (size, width, normed, dtype)
                assert float((found.cpu()[alive] - after[alive]).abs().max()) < 3 * CLOSE
                assert found.cpu()[~alive].equal(state[~alive])
                assert not output[~alive].any()


def compile_all() -> None:
    from vlmrl.models.attention import state_kernels as kernels

    for dtype, size in (("bf16", 128), ("fp16", 256), ("fp32", 64)):
        kinds = dict.fromkeys(("query", "key", "value", "beta", "out"), f"*{dtype}")
        kinds |= {"decay": "*fp32", "state": "*fp32", "alive": "*i1", "scale": "fp32"}
        constants = {"H": 16, "K": size, "V": size, "KP": size, "N": min(size, kernels.TILE // size), "NORMED": True}
        compile_for_an_h100(kernels._step, constants, kinds, {"num_warps": kernels.WARPS})
        kinds |= dict.fromkeys(("new", "window", "weight", "bias"), f"*{dtype}")
        constants = {"C": 24 * size, "W": 4, "K": 4, "N": kernels.CHANNELS, "BIASED": size == 64}
        compile_for_an_h100(kernels._shift, constants, kinds, {})


if __name__ == "__main__":
    choose(sys.argv[1], compiled=compile_all, on_device=main)
