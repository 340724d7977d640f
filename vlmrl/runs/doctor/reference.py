"""What transformers itself makes of messages: token ids by the chat template, pixels by the processors of images and
videos."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from vlmrl.config.orchestrator import TEMPLATE
from vlmrl.config.run import RunConfig
from vlmrl.models.checkpoints.load import (
    load_image_processor,
    load_processor,
    load_tokenizer,
)
from vlmrl.models.checkpoints.video_processor import load_video_processor
from vlmrl.models.families import family_of
from vlmrl.rendering.renderer import renderer_name
from vlmrl.rendering.template.chat_template import TODAY, ChatTemplate
from vlmrl.rendering.template.image_text import OF_TEXT
from vlmrl.rendering.tool_calls import message_fields, texts_beside, tool_entries
from vlmrl.runs.doctor.evidence import media_of
from vlmrl.types import ImageItem, Message, MMItem, Modality, Text, ToolSpec, VideoItem


@dataclass(frozen=True)
class Reference:
    """transformers' tokenizer and image processor, loaded from the checkpoint again."""

    tokenizer: Any
    image_processor: Any
    """None for a text-only model."""
    image_token: str | None
    """The placeholder token's text; None for a text-only model."""
    parse_control_tokens: bool = False
    """`orchestrator.renderer.parse_control_tokens`: whether a text that spells control tokens becomes them."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template that the renderer sets (`orchestrator.renderer.options`, the date)."""
    video_token: str | None = None
    """The placeholder token's text of videos; None for a model or a renderer without videos."""

    @property
    def feature_ids(self) -> dict[Modality, int]:
        """The tokens that get the features of images and of videos, for the kinds that the model takes."""
        texts: dict[Modality, str | None] = {"image": self.image_token, "video": self.video_token}
        return {kind: self.tokenizer.convert_tokens_to_ids(text) for kind, text in texts.items() if text is not None}

    def token_ids(
        self, messages: Sequence[Message], items: Sequence[MMItem], tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The chat template's token ids for a conversation that the policy is to continue.

        Each image token is repeated as often as the image processor's grid says. Only the renderer `template` makes
        videos (`ProcessorReference`).
        """
        ids = self._template_ids(messages, tools)
        image_token_id = self.feature_ids.get("image")
        if not items or image_token_id is None or ids.count(image_token_id) != len(items):
            return ids  # where the counts differ, the comparison that follows finds it
        grids = (self.process(item)["image_grid_thw"] for item in items)
        counts = (grid.prod() // self.image_processor.merge_size**2 for grid in grids)
        return [id for token in ids for id in [token] * (int(next(counts)) if token == image_token_id else 1)]

    def _template_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """The chat template's token ids, with one image token per image."""
        settings = {**self.variables, "tools": tool_entries(tools)}
        special = {token.content: id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(self.image_token or "", None)
        texts = "".join(part.text for message in messages for part in message.content if isinstance(part, Text))
        texts += "".join(texts_beside(messages, tools))
        if self.parse_control_tokens or not any(name in texts for name in special):
            ids: list[int] = self.tokenizer.apply_chat_template(
                _chat(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **settings
            )
            return ids
        # The template is filled with a private character for each control token that a text spells, so that the
        # control tokens of the result are the template's own; the pieces between them are tokenized as text.
        private = {name: chr(0xF0000 + number) for number, name in enumerate(special)}
        filled: str = self.tokenizer.apply_chat_template(
            _replaced(_chat(messages), private), add_generation_prompt=True, tokenize=False, **settings
        )
        ids = []
        own = [*special, *([self.image_token] if self.image_token else [])]
        for piece in re.split("(" + "|".join(map(re.escape, sorted(own, key=len, reverse=True))) + ")", filled):
            if piece in own:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                continue
            for name, character in private.items():
                piece = piece.replace(character, name)
            if piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return ids

    def process(self, item: MMItem) -> dict[str, np.ndarray]:
        """The processor's output for one decoded image or video."""
        assert isinstance(item, ImageItem), "this renderer makes no videos"
        return dict(self.image_processor(images=[PILImage.fromarray(item.pixels)], return_tensors="np"))

    def process_together(self, images: Sequence[ImageItem]) -> dict[str, np.ndarray] | None:
        """The processor's output for several images at once, in one array per name; None where it makes other tokens of
        them than of each alone."""
        return dict(self.image_processor(images=[PILImage.fromarray(i.pixels) for i in images], return_tensors="np"))


@dataclass(frozen=True)
class ProcessorReference(Reference):
    """transformers' whole processor, for checkpoints whose prompts are made from their own chat template."""

    processor: Any = None
    load_videos: Callable[[], Any] | None = None
    """Makes the checkpoint's video processor; None for a model without videos."""

    def token_ids(
        self, messages: Sequence[Message], items: Sequence[MMItem], tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The processor's token ids for the conversation with its images and videos.

        Where it makes other tokens of an image in the company of others, each image's own tokens are put in place.
        """
        filled = ChatTemplate(self.tokenizer, self.processor, self.variables).text(messages, generate=True, tools=tools)
        ids = self._tokenized(filled, items)
        if all(ids.count(id) == _num_tokens(items, kind) for kind, id in self.feature_ids.items()):
            return ids
        written = [getattr(self.processor, f"{kind}_token") for kind in self.feature_ids]
        before, *after = re.split("|".join(map(re.escape, written)), filled)
        alone = [self.processor(**self._alone(item)) for item in items]
        texts = [each["text_replacement_offsets"][0][0]["replacement"] for each in alone]
        whole = before + "".join(text + rest for text, rest in zip(texts, after, strict=True))
        return list(self.tokenizer(whole, add_special_tokens=not self._begins(whole))["input_ids"])

    def process(self, item: MMItem) -> dict[str, np.ndarray]:
        return _arrays(self.processor(**self._alone(item)))

    def process_together(self, images: Sequence[ImageItem]) -> dict[str, np.ndarray] | None:
        outputs = self.processor(**self._inputs(self.processor.image_token * len(images), images))
        made = np.asarray(outputs["input_ids"])[0].tolist().count(self.feature_ids["image"])
        return _arrays(outputs) if made == _num_tokens(images, "image") else None

    def _tokenized(self, text: str, items: Sequence[MMItem]) -> list[int]:
        inputs = self._inputs(text, items) if items else {"text": [text]}
        outputs = self.processor(**inputs, add_special_tokens=not self._begins(text))
        return [int(id) for id in np.asarray(outputs["input_ids"])[0]]

    def _alone(self, item: MMItem) -> dict[str, Any]:
        """The processor's inputs for one image or video and its placeholder."""
        return self._inputs(getattr(self.processor, f"{item.modality}_token"), [item])

    def _inputs(self, text: str, items: Sequence[MMItem]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"return_tensors": "np", "return_text_replacement_offsets": True, "text": [text]}
        images = [PILImage.fromarray(item.pixels) for item in items if isinstance(item, ImageItem)]
        videos = [item for item in items if isinstance(item, VideoItem)]
        if images:
            inputs["images"] = [images]
        if videos:
            from transformers import video_utils

            metadata: Any = video_utils.VideoMetadata
            if self.processor.video_processor is None and self.load_videos is not None:
                self.processor.video_processor = self.load_videos()
            # Of a video of one frame a second, so that an index is a time.
            told = [metadata(len(v.times) / v.rate, fps=1.0, frames_indices=v.times.tolist()) for v in videos]
            inputs["videos"] = [torch.tensor(video.frames).permute(0, 3, 1, 2) for video in videos]
            inputs["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": told}
        return inputs

    def _begins(self, text: str) -> bool:
        """Whether the template has written the token that begins a text, as transformers' own method asks."""
        begin = self.tokenizer.bos_token
        return begin is not None and text.startswith(begin)


def reference_of(config: RunConfig, folder: Path) -> Reference:
    """What the run's prompts are compared with: the files in `folder`, loaded again."""
    model, settings = config.model, config.orchestrator.renderer
    assert settings is not None, "preflight refuses a config without a renderer"
    token, parse = family_of(model.vlm).image_token, settings.parse_control_tokens
    by_template = renderer_name(settings, model) == TEMPLATE
    if model.vlm is None:
        variables = {**settings.options, "strftime_now": TODAY.strftime} if by_template else {}
        return Reference(load_tokenizer(folder), None, token, parse, variables)
    if by_template:
        processor = load_processor(folder, model.vlm)
        own = (processor.tokenizer, processor.image_processor)
        video = model.vlm.video
        load = None if video is None else partial(load_video_processor, folder, video)
        video_token = None if video is None else video.token
        return ProcessorReference(*own, token, parse, settings.options, video_token, processor, load)
    return Reference(load_tokenizer(folder), load_image_processor(folder, model.vlm), token, parse)


def _num_tokens(items: Sequence[MMItem], kind: Modality) -> int:
    """How many tokens the renderer has counted for the items of a kind."""
    return sum(item.num_tokens for item in items if item.modality == kind)


def _arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a processor made of images and videos, without what it made of the text."""
    arrays = {name: np.ascontiguousarray(outputs[name]) for name in outputs if name not in OF_TEXT}
    return {name: array for name, array in arrays.items() if array.dtype != np.object_}


def _replaced(chat: list[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """A chat with other words in place of the given ones in its texts."""

    def replaced(text: str) -> str:
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        return text

    return [
        {
            **message,
            "content": replaced(message["content"])
            if isinstance(message["content"], str)
            else [{**part, "text": replaced(part["text"])} if "text" in part else part for part in message["content"]],
        }
        for message in chat
    ]


def _chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Text without images is one string, which every template accepts."""
    return [
        {
            "role": message.role,
            "content": "".join(part.text for part in message.content if isinstance(part, Text))
            if not media_of([message])
            else [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.content
            ],
            **message_fields(message),
        }
        for message in messages
    ]
