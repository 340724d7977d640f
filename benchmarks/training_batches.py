"""Batches of training samples for the benchmarks of the trainer.

Samples come by the product's own path (renderer, image processor) from prompts that are made here; what the policy
"sampled" is random, so that siblings differ from their first token on: the least that a prefix tree can share.

    codeword   color_codeword: two turns of two 32-pixel squares, answers of random letters
    image      one image of 1024 × 1024 pixels, a line of text, 256 new tokens
    images     six images of 448 × 448 pixels with a line of text each, 1024 new tokens
    clip       one video of 64 frames of 256 × 256 pixels, 256 new tokens; eight in a batch
    stills     as many tokens as in `clip`, as images: 32 of 256 × 256 pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.models import broken_wheels
from vlmrl.models.families import family_of

broken_wheels.install()

# ruff: noqa: E402
import torch
from omegaconf import OmegaConf
from PIL import Image as PILImage

from vlmrl.config.model import Dtype, Init, ModelConfig, SizeConfig, VideoConfig, VLMConfig
from vlmrl.config.orchestrator import TEMPLATE, RendererConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.models.checkpoints.load import load_eos_ids, load_model, load_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.checkpoints.video_processor import load_video_processor
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.tasks.color_codeword import ColorCodeword
from vlmrl.types import Image, Message, TrainingSample, Video, mm_token_type_ids

CONF = Path(__file__).parent.parent / "conf" / "model"
MERGE = 2
GROUP_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """What one problem shows and how much is said about it."""

    images: int
    side: int
    """Pixels."""
    new_tokens: int
    """0: color_codeword decides."""
    groups: int
    """Of 16 rollouts in a batch."""
    frames: int = 0
    """If above 0, one video of so many frames is shown in place of images."""


SHAPES = {
    "codeword": Shape(images=4, side=32, new_tokens=0, groups=32),
    "image": Shape(images=1, side=1024, new_tokens=256, groups=4),
    "images": Shape(images=6, side=448, new_tokens=1024, groups=2),
    "clip": Shape(images=0, side=256, new_tokens=256, groups=8, frames=64),
    "stills": Shape(images=32, side=256, new_tokens=256, groups=8),
}


def model_config(size: str, dtype: Dtype, device: str) -> ModelConfig:
    """`model=qwen3vl model/size=<size> model.init=random`; `tiny` is the 2B with small numbers."""
    tree: Any = OmegaConf.load(CONF / "size" / f"{'2b' if size == 'tiny' else size}.yaml")
    if size == "tiny":
        tree.text.update(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        tree.text.update(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        tree.text.rope_parameters.mrope_section = [6, 5, 5]
        tree.vision.update(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64)
        tree.vision.deepstack_visual_indexes = [0]
    family: Any = OmegaConf.to_container(OmegaConf.load(CONF / "vlm" / "qwen3_vl.yaml"))
    numbers: Any = OmegaConf.to_container(tree)
    return ModelConfig(
        init=Init.random,
        name=numbers["name"],
        dtype=dtype,
        device=device,
        vlm=VLMConfig(**{**family, "video": VideoConfig(**family["video"])}),
        size=SizeConfig(**numbers),
    )


def task() -> ColorCodeword:
    return ColorCodeword(ColorCodewordConfig(), seed=0)


def renderer_of(config: ModelConfig, folder: Path, vocabulary: int) -> Renderer:
    assert config.vlm is not None
    assert config.vlm.video is not None
    tokenizer, processor = load_tokenizer(folder), load_processor(folder, config.vlm)
    return make_renderer(
        *(RendererConfig(name=TEMPLATE), config, tokenizer, processor.image_processor, vocabulary),
        family_of(config.vlm).placeholder_tokens,
        processor=processor,
        load_video_processor=partial(load_video_processor, folder, config.vlm.video),
        eos_ids=load_eos_ids(folder),
    )


def policy_of(config: ModelConfig) -> tuple[Policy, Renderer]:
    """A model with random weights (seed 0) and its renderer. No token is banned: transformers' own forward knows of no
    such thing, and losses are to be compared."""
    folder = resolve_checkpoint(config, task().texts())
    torch.manual_seed(0)
    model: Any = load_model(folder, config)
    renderer = renderer_of(config, folder, model.get_input_embeddings().num_embeddings)
    return Policy(model, position_function("mrope", MERGE), []), renderer


def make_batch(shape: Shape, renderer: Renderer, vocabulary: int, group_size: int = GROUP_SIZE) -> list[TrainingSample]:
    """`shape.groups` groups of samples, siblings side by side."""
    make = _conversations if shape.new_tokens == 0 else _answers
    return [
        _sample(group, index, *parts)
        for group in range(shape.groups)
        for index, parts in enumerate(make(shape, renderer, vocabulary, group, group_size))
    ]


def _conversations(shape: Shape, renderer: Renderer, vocabulary: int, group: int, size: int) -> list[Any]:
    problems = task()
    problem = problems.problem("train", group)
    rendered = []
    for index in range(size):
        messages = problems.demonstration(problem, random_answers=True, seed=1000 * group + index)
        rendered.append(renderer.render_conversation(messages))
    return rendered


def _answers(shape: Shape, renderer: Renderer, vocabulary: int, group: int, size: int) -> list[Any]:
    random = np.random.default_rng(group)
    parts: list[Any] = []
    if shape.frames:
        frames = random.integers(0, 256, (shape.frames, shape.side, shape.side, 3), np.uint8)
        parts.append(Video(frames, times=[number / 2 for number in range(shape.frames)]))
    for number in range(shape.images):
        noise = random.integers(0, 256, (shape.side, shape.side, 3), np.uint8)
        parts += [f"Image {number}: ", Image(PILImage.fromarray(noise))]
    messages = [Message.of("system", "Answer with reasons."), Message.of("user", *parts, "What is to be seen?")]
    # A conversation with an answer that is replaced: the renderer says where it stands.
    prompt, sampled = renderer.render_conversation([*messages, Message.of("assistant", "x")])
    start = int(np.flatnonzero(sampled)[0])
    allowed = np.setdiff1d(np.arange(vocabulary), np.array(renderer.banned_token_ids))
    rendered = []
    for _ in range(size):
        ids = np.concatenate([prompt.token_ids[:start], random.choice(allowed, shape.new_tokens)])
        whole = type(prompt)(ids, prompt.placeholders, prompt.mm_items)
        rendered.append((whole, np.arange(len(ids)) >= start))
    return rendered


def _sample(group: int, index: int, prompt: Any, sampled: np.ndarray) -> TrainingSample:
    length = len(prompt.token_ids)
    random = np.random.default_rng([group, index])
    return TrainingSample(
        rollout_id=f"{group}/{index}",
        token_ids=prompt.token_ids,
        mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
        loss_mask=sampled,
        advantages=np.where(sampled, random.choice([-1.0, 1.0]), 0).astype(np.float32),
        inference_logprobs=np.where(sampled, -11.0, 0).astype(np.float32),
        versions=np.where(sampled, 0, -1),
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
    )
