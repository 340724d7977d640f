"""A product of matrices in place of a convolution over single patches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmrl.models import patch_products
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_convolution(bias: bool) -> None:
    """With gradients. A planted mistake: the weights of two channels are exchanged."""
    torch.manual_seed(0)
    projection = nn.Conv3d(3, 20, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(7, 20, 1, 1, 1, dtype=torch.float64)

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(patches)
        return [out, *torch.autograd.grad(out, [patches, *projection.parameters()], gradient)]

    wanted = results(projection)
    for ours, theirs in zip(results(lambda x: patch_products.product(projection, x)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    with torch.no_grad():
        projection.weight.copy_(projection.weight[:, [1, 0, 2]])
    assert (patch_products.product(projection, patches) - wanted[0]).abs().max() > 0.1


def test_on_a_cpu_nothing_changes(tiny_model: Callable[[], Any]) -> None:
    """And a copy of the model projects with its own weights."""
    model = tiny_model()
    (projection,) = (module for module in model.modules() if isinstance(module, nn.Conv3d))
    patches = torch.randn(5, 3, *projection.kernel_size)
    before = projection(patches)
    Policy(model, position_function("mrope", 2), [])
    assert torch.equal(projection(patches), before)
    other = copy.deepcopy(projection)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(patches).any()
    assert torch.equal(projection(patches), before)
