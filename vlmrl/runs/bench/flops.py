"""Count the floating-point operations of a training step from its samples, and the rows that packing computes.

    samples ─▶ micro-batches as the trainer forms them ─▶ Work: rows, (query, key) pairs, head rows, images
            ─▶ model_flops: 2 operations per multiplication and addition of each matrix product

Only matrix products and attention count. Recomputation, masked pairs and everything that is no product count as
nothing, so dividing by a step's time gives what is called model FLOP utilization (MFU). Counted exactly for models
whose attention sees every earlier token. Counted as if it did: sliding windows and windows of a vision tower. Counted
as their linear layers alone: layers that carry a state from token to token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import Packing
from vlmrl.models.attention.prefix_tree import ImageKeys, build_tree
from vlmrl.models.parts import PROJECTOR_IN_TOWER
from vlmrl.models.vision_encoder import image_tower
from vlmrl.trainer.epochs import optimizer_steps
from vlmrl.trainer.shares import divide
from vlmrl.types import MMItem, TrainingSample


@dataclass
class Work:
    """What the forward passes over a batch compute."""

    rows: int = 0
    """Token positions of the language model."""
    pairs: int = 0
    """(query, key) pairs of its attention that are not masked."""
    head_rows: int = 0
    """Positions whose logits are computed."""
    images: list[int] = field(default_factory=list)
    """Patches of each image, or of each pair of a video's frames, that goes through the tower, as often as it does."""
    features: int = 0
    """Image tokens that come out of the projector."""
    unpacked: int = 0
    """Tokens of the samples one by one."""
    largest: int = 0
    """Rows of the largest micro-batch."""
    micro_batches: int = 0

    def times(self, count: int) -> Work:
        """The same, `count` times."""
        work = Work()
        for _ in range(count):
            work.add(self)
        return work

    def add(self, other: Work) -> None:
        """Add the work of another batch."""
        for name in ("rows", "pairs", "head_rows", "features", "unpacked", "micro_batches"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.images += other.images
        self.largest = max(self.largest, other.largest)


def patches_of(item: MMItem, patch_size: int = 0) -> list[int]:
    """Patches that attend to each other in the vision tower: those of an image or of a tile, or of each pair of a
    video's frames. `patch_size`: pixels per side of a patch, for processors that give no `…_grid_thw`. Empty where
    neither tells."""
    grid = item.mm_kwargs.get(f"{item.modality}_grid_thw")
    if grid is not None:
        pairs, rows, columns = (int(count) for count in grid[0])
        return [rows * columns] * pairs
    pixels = next((array for array in item.mm_kwargs.values() if array.dtype.kind == "f" and array.ndim >= 3), None)
    if pixels is None:
        return []
    if pixels.ndim == 3:  # [images or tiles, patches, numbers of a patch]
        return [pixels.shape[1]] * pixels.shape[0]
    if not patch_size:
        return []
    height, width = pixels.shape[-2:]
    return [(height // patch_size) * (width // patch_size)] * int(np.prod(pixels.shape[:-3]))


def patch_size_of(model: Any) -> int:
    """Pixels per side of a patch of the vision tower; 0 where its config does not tell."""
    size = getattr(getattr(model.config, "vision_config", None), "patch_size", 0)
    if isinstance(size, list | tuple):
        size = size[0]
    return size if isinstance(size, int) else 0


def work_of(
    samples: Sequence[TrainingSample], packing: Packing, micro_batch_tokens: int, *, ranks: int = 1, patch_size: int = 0
) -> Work:
    """The work of one pass over `samples`, in micro-batches as the trainer forms them."""
    work = Work(unpacked=sum(len(sample.token_ids) for sample in samples))
    for share in divide(samples, packing, micro_batch_tokens, ranks=ranks):
        for members in share.passes:
            distinct = [share.samples[first] for first, *_ in members]
            if distinct:
                _add_pass(work, distinct, packing, patch_size)
    return work


def _add_pass(work: Work, samples: Sequence[TrainingSample], packing: Packing, patch_size: int) -> None:
    """Add a micro-batch of distinct samples, which are sorted."""
    image_keys = ImageKeys()
    tree = build_tree(
        [image_keys.keys(sample.token_ids, sample.placeholders) for sample in samples], share=packing is Packing.tree
    )
    work.rows += tree.num_rows
    work.largest = max(work.largest, tree.num_rows)
    work.micro_batches += 1
    for sample, first in zip(samples, tree.new_from, strict=True):
        length = len(sample.token_ids)
        work.pairs += length * (length + 1) // 2 - first * (first + 1) // 2
    predicting = [rows[np.flatnonzero(sample.loss_mask) - 1] for sample, rows in zip(samples, tree.rows, strict=True)]
    work.head_rows += len(np.unique(np.concatenate(predicting)))
    for item in {item.hash: item for sample in samples for item in sample.mm_items}.values():
        work.images += patches_of(item, patch_size)
        work.features += item.num_tokens


def work_of_step(
    samples: Sequence[TrainingSample],
    algorithm: AlgorithmConfig,
    packing: Packing,
    micro_batch_tokens: int,
    *,
    seed: int,
    version: int,
    ranks: int = 1,
    patch_size: int = 0,
) -> Work:
    """The work of all optimizer steps on a batch (`algorithm.epochs`, `algorithm.minibatches`)."""
    work = Work()
    for part in optimizer_steps(samples, 0, algorithm, seed=seed, version=version):
        chosen = [samples[index] for index in part.samples]
        work.add(work_of(chosen, packing, micro_batch_tokens, ranks=ranks, patch_size=patch_size))
    return work


# ── operations ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Passes:
    """Operations of a part of the model for one row: forward, and forward and backward."""

    forward: float = 0.0
    both: float = 0.0


def model_flops(model: Any, work: Work, *, backward: bool = True, encoded: float = 1.0) -> float:
    """Floating-point operations of a forward pass over `work` and, with `backward`, of its backward pass.

    A product has two products in the backward pass: for the gradient of its input, where anything before it learns, and
    for that of its weight, where that learns. `encoded` is the share of `work.images` that goes through the tower:
    features of a frozen tower may be cached. Without attention it is what torch's FlopCounterMode counts, to the last
    one; only behind a frozen embedding, the products of the first layer that read it count as having a gradient of
    their input (tests/unit/runs/bench/test_flops.py).
    """
    text = model.config.get_text_config()
    parts, learns = _products(model, text)
    tower_learns, text_learns = learns["tower"], learns["text"] or learns["tower"] or learns["projector"]

    def of(part: str, rows: float) -> float:
        return rows * (parts[part].both if backward else parts[part].forward)

    def attention(factor: float, flows: bool) -> float:
        return factor * (3 if backward and flows else 1)

    queries, _ = _attention_widths(model)
    flops = of("text", work.rows) + of("head", work.head_rows)
    flops += attention(4.0 * queries * work.pairs, text_learns)
    vision = getattr(model.config, "vision_config", None)
    if vision is not None and work.images:
        depth = getattr(vision, "fullatt_block_indexes", None)
        count = len(depth) if depth else int(getattr(vision, "depth", 0) or getattr(vision, "num_hidden_layers", 0))
        square = sum(patches * patches for patches in work.images)
        width = getattr(vision, "hidden_size", 0)
        of_tower = of("tower", sum(work.images)) + attention(4.0 * count * width * square, tower_learns)
        flops += encoded * (of_tower + of("projector", work.features))
    return float(flops)


def read_bytes(model: Any, weight_bytes: int) -> float:
    """Bytes of weights that decoding one token of any number of sequences reads: the language model's products and the
    head, at `weight_bytes` bytes a number. Of a mixture of experts, those of one token."""
    parts, _ = _products(model, model.config.get_text_config())
    return (parts["text"].forward + parts["head"].forward) / 2 * weight_bytes


def cache_bytes(model: Any, number_bytes: int) -> float:
    """Bytes of the keys and values of one token, at `number_bytes` bytes a number."""
    _, keys = _attention_widths(model)
    return float(2 * keys * number_bytes)


OUTPUT_NAMES = ("o_proj", "out_proj", "dense")
"""What transformers calls the product behind an attention."""


def _attention_widths(model: Any) -> tuple[int, int]:
    """Numbers of a token's queries and of its keys, over all layers that attend to earlier tokens. They are read from
    the layers, because in some families (Gemma 4) they differ from layer to layer."""
    queries = keys = 0
    for module in model.base_model.get_decoder().modules():
        output = next((getattr(module, name) for name in OUTPUT_NAMES if hasattr(module, name)), None)
        if output is None or not hasattr(module, "q_proj"):
            continue
        queries += output.in_features
        keys += module.k_proj.out_features if getattr(module, "k_proj", None) is not None else 0
    if queries:
        return queries, keys
    text = model.config.get_text_config()  # a family with one product for queries, keys and values
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return text.num_hidden_layers * text.num_attention_heads * head_dim, text.num_hidden_layers * heads * head_dim


def _products(model: Any, text: Any) -> tuple[dict[str, _Passes], dict[str, bool]]:
    """The operations of a row in each part (`text`, `head`, `tower`, `projector`), and whether anything in it learns.
    A row of the tower is a patch, and one of the projector an image token."""
    modules = _by_part(model, text)
    learns = {part: any(_learns(module) for module, _ in found) for part, found in modules.items()}
    embedding = model.get_input_embeddings()
    learns["text"] = learns["text"] or any(p.requires_grad for p in embedding.parameters())
    before = {
        "tower": learns["tower"],
        "projector": learns["tower"] or learns["projector"],
        "text": any(learns[part] for part in ("tower", "projector", "text")),
        "head": any(learns.values()),
    }
    parts = {}
    for part, found in modules.items():
        passes = parts[part] = _Passes()
        for module, numbers in found:
            # Pixels do not learn, so the products that read them have no gradient of their input.
            reads_pixels = isinstance(module, nn.Conv2d | nn.Conv3d)
            passes.forward += 2.0 * numbers
            passes.both += 2.0 * numbers * (1 + (before[part] and not reads_pixels) + _learns(module))
    return parts, learns


def _by_part(model: Any, text: Any) -> dict[str, list[tuple[nn.Module, float]]]:
    """The modules with a product, and the numbers of its matrix that a row is multiplied with, by part."""
    head, tower = model.get_output_embeddings(), image_tower(model)
    decoder = _ids(model.base_model.get_decoder().modules())
    in_tower = _ids(() if tower is None else tower.modules())
    found: dict[str, list[tuple[nn.Module, float]]] = {"text": [], "head": [], "tower": [], "projector": []}
    for name, module in model.named_modules():
        numbers = _numbers(module, text)
        if not numbers:
            continue
        if module is head:
            part = "head"
        elif id(module) in decoder:
            part = "text"
        else:
            part = "tower" if id(module) in in_tower and PROJECTOR_IN_TOWER not in name else "projector"
        found[part].append((module, numbers))
    return found


def _numbers(module: nn.Module, text: Any) -> float:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return float(module.weight.numel())
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children()):
        return float(module.in_features * module.out_features)  # type: ignore[operator]
    experts = [p for p in module.parameters(recurse=False) if p.ndim == 3]  # of all experts side by side
    chosen = getattr(text, "num_experts_per_tok", None)
    return float(sum(p.numel() / p.shape[0] * chosen for p in experts)) if chosen else 0.0


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad and p.ndim > 1 for p in module.parameters(recurse=False))


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(module) for module in modules}
