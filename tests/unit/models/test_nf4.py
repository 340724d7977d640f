"""Layers in 4 bits: the values are QLoRA's, and trainer, engine, merged weights and gradients agree on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.helpers import TINY, Sampled, image, plain_logprobs, sample
from vlmrl.config.model import BaseDtype, LoraConfig
from vlmrl.models.lora import merged, select_trainable, without_adapters
from vlmrl.models.nf4 import BLOCK, Nf4Linear, in_4_bits
from vlmrl.types import FloatArray

pytest.importorskip("bitsandbytes")

SAMPLE = sample("a", [1, 2], image(2, 3), Sampled([4, 5, 6]))

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NF4's 16 levels: arXiv 2305.14314, appendix E."""


def by_hand(weight: FloatArray, levels: tuple[float, ...] = LEVELS, block: int = BLOCK) -> FloatArray:
    """Blockwise quantization of the paper's section 2, in float64: the nearest level times the largest magnitude."""
    blocks = weight.reshape(-1, block)
    magnitudes = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[:, :, None] / magnitudes[:, :, None] - np.array(levels)).argmin(axis=2)
    return np.asarray((np.array(levels)[nearest] * magnitudes).reshape(weight.shape))


def layer_of(rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


def numbers(tensor: Tensor) -> FloatArray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (128, 96), (64, 33), (2, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_the_papers(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Also where a row is no whole number of blocks."""
    layer = layer_of(rows, columns, dtype)
    wanted = by_hand(numbers(layer.weight))
    found = Nf4Linear(layer).weight
    assert found.dtype is dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    np.testing.assert_allclose(numbers(found), wanted, rtol=rounding, atol=1e-8)
    if dtype is torch.float32:
        # three mistakes: levels mirrored (sign), each number at the next level (off by one), blocks of 128 numbers
        mirrored = tuple(-level for level in LEVELS[::-1])
        shifted = (*LEVELS[1:], 1.0)
        mistakes = [by_hand(numbers(layer.weight), mirrored), by_hand(numbers(layer.weight), shifted)]
        if rows * columns % 128 == 0:
            mistakes.append(by_hand(numbers(layer.weight), block=128))
        for mistake in mistakes:
            assert np.abs(numbers(found) - mistake).max() > 1e-3


def test_forward_and_backward_are_those_of_the_rounded_weight() -> None:
    layer = layer_of(128, 96)
    quantized, rounded = Nf4Linear(layer), copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight.copy_(torch.tensor(by_hand(numbers(layer.weight))))
    found, wanted = (torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    for x, each in ((found, quantized), (wanted, rounded)):
        torch.tanh(each(x)).square().sum().backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-5)
    assert quantized.bias is not None
    assert not quantized.bias.requires_grad


def test_no_copy_of_the_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    quantized = Nf4Linear(layer_of(64, 64, bias=False))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized(torch.randn(3, 64, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) < 64 * 64


def adapted(model: Any, base: BaseDtype) -> Any:
    """The model with adapters that have an effect."""
    torch.manual_seed(0)
    select_trainable(model, replace(TINY, lora=LoraConfig(rank=3, alpha=5.0, base_dtype=base)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pair(tiny_model: Callable[[], Any]) -> tuple[Any, Any]:
    """A model in 4 bits, and the model whose layers have been rounded by hand. Both have the same adapters."""
    pytest.importorskip("peft")
    quantized, rounded = adapted(tiny_model(), BaseDtype.nf4), adapted(tiny_model(), BaseDtype.auto)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "base_layer.weight" in name:
                parameter.copy_(torch.tensor(by_hand(numbers(parameter))))
    return quantized, rounded


def test_the_language_models_linear_layers_are_quantized(pair: tuple[Any, Any], tiny_model: Callable[[], Any]) -> None:
    quantized, rounded = pair
    layers = [name for name, module in quantized.named_modules() if isinstance(module, Nf4Linear)]
    assert len(layers) == 7 * quantized.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers") for name in layers)
    linear = [module for module in tiny_model().model.language_model.modules() if isinstance(module, nn.Linear)]
    assert in_4_bits(quantized) == sum(module.weight.numel() for module in linear)
    weights, plain = dict(merged(quantized)), dict(merged(rounded))
    assert weights.keys() == dict(tiny_model().named_parameters()).keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def test_logprobs_and_gradients_are_those_of_the_rounded_model(pair: tuple[Any, Any]) -> None:
    logprobs = [plain_logprobs(model, SAMPLE) for model in pair]
    torch.testing.assert_close(logprobs[0], logprobs[1], rtol=1e-5, atol=1e-5)
    for found in logprobs:
        found.sum().backward()  # type: ignore[no-untyped-call]
    learning = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in pair]
    assert learning[0].keys() == learning[1].keys()
    for name, gradient in learning[1].items():
        assert gradient is not None
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(learning[0][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_merged_into_a_plain_model_they_are_the_same_function(
    pair: tuple[Any, Any], tiny_model: Callable[[], Any]
) -> None:
    """What servers are sent and what mode=export writes."""
    quantized, plain = pair[0], tiny_model()
    before = plain_logprobs(plain, SAMPLE)
    with torch.no_grad():
        for name, tensor in merged(quantized):
            plain.get_parameter(name).copy_(tensor)
    wanted = plain_logprobs(quantized, SAMPLE)
    torch.testing.assert_close(plain_logprobs(plain, SAMPLE), wanted, rtol=1e-5, atol=1e-5)
    with without_adapters(quantized):
        base = plain_logprobs(quantized, SAMPLE)
    assert float((base - before).detach().abs().max()) > 1e-3, "the base is rounded"
    assert float((base - wanted).detach().abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in Dynamo
def test_compiled_layers_compute_the_same() -> None:
    quantized = Nf4Linear(layer_of(64, 128))
    x = torch.randn(3, 128)
    compiled: Any = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    for each, module in ((found, compiled), (wanted, quantized)):
        module(each).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)
