"""The operations of a step: rows and pairs against the trainer's own packing, products against torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from support.gpu_path import family_samples
from support.helpers import Sampled, image, sample
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.model import LoraConfig
from vlmrl.config.trainer import Packing
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.attention.rules import CAUSAL
from vlmrl.models.families.positions import PositionFunction, position_function
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.models.vision_encoder import image_parameters
from vlmrl.runs.bench.flops import (
    Work,
    cache_bytes,
    model_flops,
    patch_size_of,
    patches_of,
    read_bytes,
    work_of,
    work_of_step,
)
from vlmrl.trainer.packing import pack, pack_share
from vlmrl.trainer.shares import divide
from vlmrl.types import TrainingSample

POSITIONS = position_function("mrope", 2)
CPU = torch.device("cpu")
PRODUCTS = ("aten.mm", "aten.addmm", "aten.convolution", "aten.convolution_backward")


def batch() -> list[TrainingSample]:
    """Two groups of siblings, each with an image; two of the samples are equal."""
    first, second = image(2, 2), image(2, 3, seed=1)
    return [
        sample("a", 7, first, 1, 2, Sampled([3, 4, 5])),
        sample("b", 7, first, 1, 2, Sampled([3, 4, 6, 6])),
        sample("c", 7, first, 1, 2, Sampled([3, 4, 5])),
        sample("d", 7, second, 1, Sampled([2]), 5, Sampled([1, 1])),
        sample("e", 7, second, 1, Sampled([4, 4])),
    ]


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("budget", [24, 1000])
def test_the_work_is_what_the_trainer_packs(packing: Packing, budget: int) -> None:
    batches = pack(batch(), packing, budget, POSITIONS, CPU)
    work = work_of(batch(), packing, budget)
    assert work.rows == sum(len(each.token_ids) for each in batches)
    assert work.pairs == sum(int((each.position_ids[0] + 1).sum()) for each in batches)
    assert work.head_rows == sum(len(each.loss_rows) for each in batches)
    assert work.images == [n for each in batches for item in each.mm_items for n in patches_of(item)]
    assert work.features == sum(item.num_tokens for each in batches for item in each.mm_items)
    assert (work.micro_batches, work.largest) == (len(batches), max(len(each.token_ids) for each in batches))
    assert work.unpacked == sum(len(each.token_ids) for each in batch())


def test_the_work_of_several_ranks() -> None:
    """Each rank packs its share; a filler, which keeps a rank in step, is no work."""
    work = work_of(batch(), Packing.varlen, 30, ranks=2)
    packed = [
        each
        for share in divide(batch(), Packing.varlen, 30, ranks=2)
        for each in pack_share(share, Packing.varlen, POSITIONS, CPU, Kernel.blocks, CAUSAL)
        if not each.is_filler
    ]
    assert work.rows == sum(len(each.token_ids) for each in packed) == work.unpacked
    assert work.micro_batches == len(packed) > 1


def test_the_work_of_several_optimizer_steps() -> None:
    """Two passes over the batch: every sample is computed twice, whatever the minibatches are."""
    algorithm = AlgorithmConfig(epochs=2, minibatches=2)
    work = work_of_step(batch(), algorithm, Packing.varlen, 1000, seed=0, version=3)
    once = work_of(batch(), Packing.varlen, 1000)
    assert (work.rows, work.pairs, work.unpacked) == (2 * once.rows, 2 * once.pairs, 2 * once.unpacked)
    assert work.micro_batches == 4


def whole(model: Any) -> None:
    """Everything learns."""


def frozen_tower(model: Any) -> None:
    for parameter in image_parameters(model):
        parameter.requires_grad_(False)


def frozen_language(model: Any) -> None:
    images = {id(parameter) for parameter in image_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in images)


def adapters(model: Any) -> None:
    pytest.importorskip("peft")
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "down_proj"]))


def counted_by_torch(model: Any, samples: list[TrainingSample], positions: PositionFunction) -> int:
    """Operations of the products of a forward and backward pass over the samples as one tree, without the head."""
    policy = Policy(model, positions, [])
    (packed,) = pack(samples, Packing.tree, 4096, positions, CPU, rules=policy.rules)
    with FlopCounterMode(display=False) as counter:
        features = policy.encode_items(packed.mm_items)
        hidden = policy.hidden_states(
            packed.token_ids,
            packed.position_ids,
            packed.mm_token_type_ids,
            packed.plan,
            features,
            packed.feature_rows,
        )
        torch.autograd.backward(hidden.sum())
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    return int(sum(counts.get(op, 0) for op in PRODUCTS))


@pytest.mark.parametrize("learns", [whole, frozen_tower, frozen_language, adapters])
def test_products_are_those_that_torch_counts(learns: Callable[[Any], None], tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    learns(model)
    expected = counted_by_torch(model, batch(), POSITIONS)
    work = work_of(batch(), Packing.tree, 1000)
    found = model_flops(model, Work(rows=work.rows, images=work.images, features=work.features))
    vision, side = model.config.vision_config, sum(n * n for n in work.images)
    factor = 3 if learns in (whole, frozen_language) else 1
    # Behind a frozen embedding, queries, keys, values and A of the first layer have no gradient of their input.
    text = model.config.text_config
    projected = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    first = 2 * work.rows * text.hidden_size * (projected + 4) if learns is adapters else 0
    assert found - factor * 4 * vision.depth * vision.hidden_size * side - first == expected


def test_attention_and_head(tiny_model: Callable[[], Any]) -> None:
    """By hand, from the sizes of the tiny model."""
    model = tiny_model()
    text = model.config.text_config
    pair = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    assert model_flops(model, Work(pairs=5)) == 3 * 5 * pair
    assert model_flops(model, Work(pairs=5), backward=False) == 5 * pair
    head = 2 * text.vocab_size * text.hidden_size
    assert model_flops(model, Work(head_rows=7)) == 3 * 7 * head
    assert cache_bytes(model, 2) == 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    products = sum(
        module.weight.numel() for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear)
    )
    assert read_bytes(model, 2) == 2 * (products + text.vocab_size * text.hidden_size)


def test_a_cached_tower_costs_nothing(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    frozen_tower(model)
    work = Work(rows=3, images=[16, 24], features=10)
    assert model_flops(model, work, encoded=0.0) == model_flops(model, Work(rows=3))
    half = model_flops(model, work, encoded=0.5) - model_flops(model, Work(rows=3))
    assert half == pytest.approx((model_flops(model, work) - model_flops(model, Work(rows=3))) / 2)


@pytest.mark.parametrize(("family", "within"), [("mistral3", 0.0), ("gemma4", 0.15)])
def test_other_families(family: str, within: float, family_folder: Callable[[str], Path]) -> None:
    """Mistral 3 to the last operation; Gemma 4 has products of its own, and heads that differ from layer to layer."""
    folder = family_folder(family)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    samples = family_samples(family, folder, model.config.image_token_id).samples
    work = work_of(samples, Packing.tree, 4096, patch_size=patch_size_of(model))
    found = model_flops(model, Work(rows=work.rows, images=work.images, features=work.features))
    vision = model.config.vision_config
    attention = 3 * 4 * vision.num_hidden_layers * vision.hidden_size * sum(n * n for n in work.images)
    expected = counted_by_torch(model, samples, position_function("sequential"))
    assert found - attention == pytest.approx(expected, rel=within or 1e-12)
    assert cache_bytes(model, 1) > 0
