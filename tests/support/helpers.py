"""What several test files build: images, prompts and samples without a renderer, and the plain forward to compare with.

The tiny model of the tests (fixture `tiny_model`) is a real Qwen3-VL from the builder of
`vlmrl.models.checkpoints.tiny`, with more layers and deepstack levels than the default one, so that their order
matters. Its text tokens are the ids 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.models.attention.plan import Blocks, TreePlan
from vlmrl.models.families.qwen3_vl import ATOMIC_TOKENS, SPECIAL_TOKENS
from vlmrl.types import ImageItem, IntArray, MMItem, Placeholder, Prompt, Supports, TrainingSample, mm_token_type_ids

TINY = ModelConfig(
    name="tiny",
    device="cpu",
    vlm=VLMConfig(family="qwen3_vl", renderers=["qwen3-vl"], positions="mrope", image_token="<|image_pad|>"),
    tiny=TinyConfig(
        num_hidden_layers=3,
        vision_depth=2,
        deepstack_visual_indexes=[0, 1],
        bpe_merges=0,
        initializer_range=0.12,
    ),
)

TEXT_TOKENS = 256
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, END = (
    TEXT_TOKENS + SPECIAL_TOKENS.index(token)
    for token in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>")
)
MERGE = 2
"""Patches per side of one image token."""
PATCH_DIM = 3 * 2 * 16 * 16

BANNED = [i for i in range(TEXT_TOKENS, TEXT_TOKENS + len(SPECIAL_TOKENS) + len(ATOMIC_TOKENS)) if i != END]
"""Everything special but the end of a turn, as a renderer bans it."""


def image(rows: int, columns: int, seed: int = 0) -> ImageItem:
    """A noise image of rows × columns tokens; equal arguments give an equal hash."""
    grid = np.array([[1, rows * MERGE, columns * MERGE]])
    pixels = np.random.default_rng([rows, columns, seed]).standard_normal((grid.prod(), PATCH_DIM), np.float32)
    return ImageItem(
        hash=f"{rows}x{columns}/{seed}",
        pixels=np.zeros((1, 1, 3), np.uint8),
        mm_kwargs={"pixel_values": pixels, "image_grid_thw": grid},
        num_tokens=rows * columns,
    )


@dataclass(frozen=True)
class Sampled:
    """Tokens that the policy sampled: those with a loss."""

    token_ids: list[int]


Part = int | list[int] | MMItem | Sampled


def _flatten(parts: tuple[Part, ...]) -> tuple[IntArray, list[bool], list[Placeholder], list[MMItem]]:
    ids: list[int] = []
    sampled: list[bool] = []
    placeholders, images = [], []
    for part in parts:
        if isinstance(part, MMItem):
            placeholders.append(Placeholder(len(ids) + 1, part.num_tokens, part.hash, modality=part.modality))
            images.append(part)
            pad = IMAGE_PAD if part.modality == "image" else VIDEO_PAD
            ids += [VISION_START, *[pad] * part.num_tokens, VISION_END]
        elif isinstance(part, Sampled):
            ids += part.token_ids
        else:
            ids += [part] if isinstance(part, int) else part
        sampled += [isinstance(part, Sampled)] * (len(ids) - len(sampled))
    return np.array(ids, np.int64), sampled, placeholders, images


def prompt(*parts: Part) -> Prompt:
    """`prompt([1, 2], image(2, 3), 7)`; an image stands between its two marks."""
    ids, _, placeholders, images = _flatten(parts)
    return Prompt(ids, tuple(placeholders), tuple(images))


def extended(before: Prompt, completion: IntArray, *parts: Part) -> Prompt:
    """The next turn's prompt: `before`, the completion, `parts`."""
    more = prompt(*parts)
    start = len(before.token_ids) + len(completion)
    return Prompt(
        np.concatenate([before.token_ids, completion, more.token_ids]),
        (*before.placeholders, *(replace(p, offset=start + p.offset) for p in more.placeholders)),
        (*before.mm_items, *more.mm_items),
    )


def sample(name: str, *parts: Part, seed: int = 0) -> TrainingSample:
    """A sample with random advantages and logprobs and versions 0 to 2, where a `Sampled` part stands."""
    ids, sampled, placeholders, images = _flatten(parts)
    mask = np.array(sampled)
    random = np.random.default_rng(seed)
    return TrainingSample(
        rollout_id=name,
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), tuple(placeholders)),
        loss_mask=mask,
        advantages=np.where(mask, random.standard_normal(len(ids)), 0).astype(np.float32),
        inference_logprobs=np.where(mask, -random.exponential(size=len(ids)) - 3, 0).astype(np.float32),
        versions=np.where(mask, random.integers(0, 3, len(ids)), -1),
        placeholders=tuple(placeholders),
        mm_items=tuple(images),
    )


def with_supports(sample: TrainingSample, seed: int, vocabulary: int = 150) -> TrainingSample:
    """The sample as if two of three tokens had been sampled from 2 to 7 tokens each, and the others from all."""
    random = np.random.default_rng(seed)
    supports = [np.empty(0, np.int64)] * len(sample.token_ids)
    for place, where in enumerate(np.flatnonzero(sample.loss_mask), seed):
        if place % 3:
            others = random.integers(0, vocabulary, 1 + random.integers(6))
            supports[where] = np.union1d(others, sample.token_ids[where])
    return replace(sample, supports=Supports.of(supports))


def plain_logits(model: Any, token_ids: IntArray, types: IntArray, images: tuple[MMItem, ...]) -> Tensor:
    """float32 [L, vocabulary] by transformers alone: its own positions and attention, pixels as `pixel_values`."""
    pixels = {
        name: torch.from_numpy(np.concatenate([item.mm_kwargs[name] for item in images]))
        for name in (images[0].mm_kwargs if images else ())
    }
    out = model(
        input_ids=torch.from_numpy(token_ids)[None],
        mm_token_type_ids=torch.from_numpy(types)[None],
        use_cache=False,
        **pixels,
    )
    logits: Tensor = out.logits[0].float()
    return logits


def plain_logprobs(model: Any, sample: TrainingSample) -> Tensor:
    """float32 [loss tokens] of one sample, with gradient, by transformers alone."""
    logits = plain_logits(model, sample.token_ids, sample.mm_token_type_ids, sample.mm_items)
    return plain_tokens(logits, sample)[0]


def plain_tokens(logits: Tensor, sample: TrainingSample, banned: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies (nats) of the loss tokens of one sample, with gradient, by log_softmax over the tokens
    that are not banned, or over the token's support. `logits` [L, vocabulary]."""
    where = np.flatnonzero(sample.loss_mask)
    if sample.supports is not None:
        of_tokens = []
        for place in where:
            kept = sample.supports.token_ids[slice(*sample.supports.offsets[place : place + 2])]
            log_p = torch.log_softmax(logits[place - 1][kept if len(kept) else slice(None)], -1)
            target = list(kept).index(sample.token_ids[place]) if len(kept) else sample.token_ids[place]
            of_tokens.append((log_p[target], -(log_p.exp() * log_p).sum()))
        logprobs, entropies = zip(*of_tokens, strict=True)
        return torch.stack(logprobs), torch.stack(entropies)
    allowed = np.setdiff1d(np.arange(logits.shape[-1]), banned)
    log_p = torch.log_softmax(logits[where - 1][:, allowed], -1)
    targets = np.searchsorted(allowed, sample.token_ids[where])
    return log_p[np.arange(len(where)), targets], -(log_p.exp() * log_p).sum(-1)


def blocks_of(plan: TreePlan, window: int | None = None) -> Blocks:
    """The blocks of the layers with this window."""
    blocks = plan.by_window[window]
    assert isinstance(blocks, Blocks)
    return blocks


def seen(plan: TreePlan, num_rows: int, num_slots: int, window: int | None = None) -> NDArray[np.int64]:
    """int64 [rows, slots]; in how many of the plan's blocks each row sees each slot: 1 or 0 in a plan that is right."""
    counts = np.zeros((num_rows, num_slots), np.int64)
    blocks = blocks_of(plan, window)
    for shared in blocks.shared:
        visible = 1 if shared.mask is None else shared.mask.numpy().astype(np.int64)
        counts[shared.start : shared.end, shared.slots.numpy()] += visible
    for local in blocks.local:
        rows, slots, mask = local.rows.numpy(), local.slots.numpy(), local.mask.numpy()
        valid = np.arange(rows.size) if local.valid is None else local.valid.numpy()
        np.testing.assert_array_equal(local.valid_rows.numpy(), rows.reshape(-1)[valid])
        for flat in valid:
            b, i = divmod(int(flat), rows.shape[1])
            np.add.at(counts[rows[b, i]], slots[b][mask[b, i]], 1)
    return counts
