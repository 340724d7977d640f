"""A prompt with two videos and an image between them: from the renderer, and from transformers' own processor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import fromarray

from support.families import FAMILIES
from vlmrl.config.model import ModelConfig, VideoConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.models.checkpoints.load import load_eos_ids, load_processor, load_tokenizer
from vlmrl.models.checkpoints.video_processor import load_video_processor
from vlmrl.models.families import family_of
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.types import Image, Message, Text, Video

FPS = 2.0
"""Frames per second that are shown."""

WITH_VIDEOS = [name for name, recipe in FAMILIES.items() if recipe.video_processor]


def frames(seed: int, count: int, height: int = 112, width: int = 140) -> np.ndarray:
    """uint8 [count, height, width, 3]; noise, of which no two frames are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


LONG, SHORT = Video(frames(0, 23), fps=5.0), Video(frames(1, 6), fps=FPS)
PICTURE = Image(frames(2, 1, 84, 140)[0])

MESSAGES = [Message.of("user", "Look: ", LONG, " and ", PICTURE, " then ", SHORT, " What changed?")]
"""LONG is sampled, at 2 of its 5 frames a second; all frames of SHORT are shown."""


def vlm_of(name: str) -> VLMConfig:
    """`model.vlm` of a tiny checkpoint with videos."""
    recipe = FAMILIES[name]
    assert recipe.image_token is not None
    assert recipe.video_token is not None
    video = VideoConfig(token=recipe.video_token, fps=FPS)
    return VLMConfig(name, ["template"], "mrope", recipe.image_token, video=video)


def video_renderer(folder: Path, vlm: VLMConfig) -> FamilyRenderer:
    """The renderer `template` of a checkpoint, with videos."""
    assert vlm.video is not None
    tokenizer, family, processor = load_tokenizer(folder), family_of(vlm), load_processor(folder, vlm)
    return make_renderer(
        RendererConfig(name="template"),
        ModelConfig(name=str(folder), vlm=vlm),
        tokenizer,
        processor.image_processor,
        len(tokenizer),
        family.placeholder_tokens,
        family.processed_size,
        processor=processor,
        load_video_processor=partial(load_video_processor, folder, vlm.video),
        eos_ids=load_eos_ids(folder),
    )


@dataclass
class ByTransformers:
    """What transformers' processor makes of a conversation with images and videos."""

    processor: Any

    @staticmethod
    def of(folder: Path) -> ByTransformers:
        """`AutoProcessor`, with the image processor on PIL, which the renderer has too."""
        from transformers import AutoImageProcessor, AutoProcessor

        auto: Any = AutoProcessor
        processor = auto.from_pretrained(folder)
        images: Any = AutoImageProcessor
        processor.image_processor = images.from_pretrained(folder, backend="pil")
        return ByTransformers(processor)

    def inputs(self, messages: list[Message]) -> Any:
        """The arguments of the model's forward."""
        from transformers.video_utils import VideoMetadata

        parts = [part for message in messages for part in message.content]
        videos = [part for part in parts if isinstance(part, Video)]
        images = [fromarray(np.asarray(part.source)) for part in parts if isinstance(part, Image)]
        chat = [{"role": m.role, "content": [_described(part) for part in m.content]} for m in messages]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.processor(
            text=[text],
            images=images or None,
            videos=[np.asarray(video.source) for video in videos],
            video_metadata=[VideoMetadata(len(np.asarray(v.source)), fps=v.fps or FPS) for v in videos],
            do_sample_frames=True,
            fps=FPS,
            return_tensors="pt",
        )


def _described(part: Any) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}
