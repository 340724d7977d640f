"""What a policy computes on a GPU is what transformers computes: every kind of attention, families with images.

Without a GPU, FlexAttention runs uncompiled and flash attention by its definition. With one (marker `gpu`), the kernels
themselves are compared with transformers' eager attention on the same GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import attention_kinds as kinds
from support import gpu_path as path
from support.attention_kinds import Part, image, sample
from support.helpers import Sampled
from vlmrl.config.trainer import Packing
from vlmrl.models import blocks
from vlmrl.models.attention import fused, plan
from vlmrl.models.attention.fused import Kernel, fits_flash
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import TrainingSample

Folder = Callable[[str], Path]

BY_FLEX = {"gemma2", "gemma3", "gemma4_vision"}
"""Models whose soft caps or images flash attention cannot express, not even for sequences side by side."""


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "varlen_attn", path.flash_by_definition)
    monkeypatch.setattr(Policy, "_is_fused", True)
    monkeypatch.setattr(plan, "SHORT_PASS_ROWS", 0)


def samples_of(name: str) -> list[TrainingSample]:
    start = list(range(1, 9))
    branches: list[list[Part]] = [
        [start, Sampled([11, 12, 13])],
        [start, Sampled([11, 12, 14, 15, 16, 17]), [3, 4], Sampled([5])],
        [[2, 3], Sampled([4])],
    ]
    if name in kinds.SEE_IMAGES:
        shown = image(name, 1)
        branches += [
            [start, shown, Sampled([11, 12]), [13], image(name, 2), Sampled([4])],
            [start, shown, Sampled([7])],
        ]
    return [sample(f"s{i}", *parts) for i, parts in enumerate(branches)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4", "gemma4_vision", "mistral"])
def test_kernels_of_a_gpu_compute_every_kind_of_attention(name: str) -> None:
    samples = samples_of(name)
    policy = Policy(kinds.build(name, 4), position_function("sequential"), [])
    assert policy.kernel(shared=True) is Kernel.flex
    assert policy.kernel(shared=False) is (Kernel.flex if name in BY_FLEX else Kernel.varlen)
    model = kinds.build(name, 4)
    theirs = []
    for each in samples:
        with torch.no_grad():
            logits = kinds.plain_logits(model, each.token_ids, each.mm_token_type_ids, each.mm_items)
        at = torch.from_numpy(each.loss_mask.nonzero()[0])
        theirs.append(logits.log_softmax(-1)[at - 1, torch.from_numpy(each.token_ids)[at]])
    for packing in Packing:
        assert largest(path.logprobs_of(policy, samples, packing), theirs) < 1e-5


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5", "idefics3"])
def test_families_are_computed_as_by_transformers(family_folder: Folder, name: str) -> None:
    """Towers with windows and with bounds, towers without, images that see themselves, recurrent layers."""
    model = path.load(family_folder(name), "cpu", torch.float32)
    made = path.family_samples(name, family_folder(name), model.config.image_token_id)
    theirs = path.by_transformers(model, made)
    policy = policy_of(path.load(family_folder(name), "cpu", torch.float32))
    for packing in Packing:
        mine = path.logprobs_of(policy, made.samples, packing)
        assert largest(mine, theirs) < 1e-4


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("name", "size"), [("head_dim", 264), ("qk_head_dim", 264), ("v_head_dim", 4)])
def test_heads_that_flash_attention_lacks_go_to_flex(name: str, size: int) -> None:
    """Gemma 4 has heads of 512, DeepSeek values that are shorter than keys."""
    model = kinds.build("mistral", 4)
    assert fits_flash(model.model)
    assert Policy(model, position_function("sequential"), []).kernel(shared=False) is Kernel.varlen
    setattr(model.model.layers[1].self_attn, name, size)
    assert Policy(model, position_function("sequential"), []).kernel(shared=False) is Kernel.flex


def policy_of(model: Any) -> Policy:
    merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
    kind = "mrope" if hasattr(model.base_model, "get_rope_index") else "sequential"
    return Policy(model, position_function(kind, merge), [])


def largest(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return float((torch.cat(mine) - torch.cat(theirs)).abs().max())


def gradient_error(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of `theirs`."""
    assert mine.keys() == theirs.keys()
    error = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    return float((error / sum(float(gradient.square().sum()) for gradient in theirs.values())) ** 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "gemma4_vision", "qwen3_5", "idefics3"])
def test_families_on_a_gpu(family_folder: Folder, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they are transformers' eager attention, in bfloat16 about as far from it as transformers' own."""
    for module in (plan, blocks):
        monkeypatch.setattr(module, "SHORT_PASS_ROWS", 0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # transformers projects patches by a convolution
        agree_with_transformers(family_folder(name), name, "cuda", compiled=compiled)


def agree_with_transformers(folder: Path, name: str, device: str, *, compiled: bool) -> None:
    exact = path.load(folder, device, torch.float32, "eager")
    made = path.family_samples(name, folder, exact.config.image_token_id)
    wanted, wanted_gradients = path.by_transformers(exact, made), path.gradients_of(exact)
    rounded = path.load(folder, device, torch.bfloat16, "eager")
    allowed = largest(path.by_transformers(rounded, made), wanted)
    allowed_gradient = gradient_error(path.gradients_of(rounded), wanted_gradients)
    bounds = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (3 * allowed, 2 * allowed_gradient)}
    for dtype, (logprob_bound, gradient_bound) in bounds.items():
        for packing in Packing:
            model = path.load(folder, device, dtype)
            if compiled:
                blocks.compile_blocks(model)
            mine = path.logprobs_of(policy_of(model), made.samples, packing, backward=True)
            assert largest(mine, wanted) <= logprob_bound, (dtype, packing)
            assert gradient_error(path.gradients_of(model), wanted_gradients) <= gradient_bound, (dtype, packing)
