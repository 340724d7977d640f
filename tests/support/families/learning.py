"""What trains a family's tiny checkpoint: the parts that a run with `model=auto` builds, and samples of two turns.

0/0  A question  answer  B question  green blue        A and B are images of different sizes
0/1  A question  answer  B question  green red         forks in the middle of the last answer
0/2  A question  answer  D question  green blue        forks at an image of B's size
0/3  A question  blue green                            forks in the first turn
1/0  C question  red                                   shares no image with the others
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from support.families import FAMILIES
from support.families.conversations import pictures
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.conf_folder import CONF
from vlmrl.config.model import LoraConfig, ModelConfig
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.models.checkpoints.load import load_model
from vlmrl.models.lora import select_trainable
from vlmrl.models.policy import Policy
from vlmrl.preflight.auto_model import fill_model
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import build_renderer
from vlmrl.runs.every_rank import make_policy
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Image, Message, Prompt, TrainingSample, mm_token_type_ids

REFUSED = {"idefics2"}
"""Families that no renderer serves."""

LEARNING = [
    name
    for name, recipe in FAMILIES.items()
    if name not in REFUSED and (find_spec("torchvision") is not None or not recipe.needs_torchvision)
]

TRAINER = TrainerConfig(learning_rate=1e-3, eps=1e-4, weight_decay=0.1)
"""With a small eps, AdamW's first step is the sign of the gradient, whatever its size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learning:
    """A family's model and samples. `model` is as loaded; `policy` makes one of a copy of it."""

    config: RunConfig
    folder: Path
    model: Any
    banned: tuple[int, ...]
    samples: tuple[TrainingSample, ...]

    @property
    def has_images(self) -> bool:
        return self.config.model.vlm is not None

    def adapted(self) -> Learning:
        """The same with adapters on all linear layers."""
        return self.changed(lora=LoraConfig(rank=4))

    def frozen(self, **parts: Any) -> Learning:
        """The same with `model.vlm.freeze_vision` or `freeze_language`."""
        assert self.config.model.vlm is not None
        return self.changed(vlm=dataclasses.replace(self.config.model.vlm, **parts))

    def changed(self, **fields: Any) -> Learning:
        model: ModelConfig = dataclasses.replace(self.config.model, **fields)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    def policy(self) -> Policy:
        import torch

        model = copy.deepcopy(self.model)
        torch.manual_seed(0)  # new adapters
        select_trainable(model, self.config.model)
        return make_policy(self.config, model, self.banned)

    def trainer(self) -> LocalTrainer:
        return LocalTrainer(self.policy(), TRAINER, AlgorithmConfig(), temperature=1.0, max_new_tokens=8)


@cache
def learning(folder: Path) -> Learning:
    """The parts of a run on the checkpoint in `folder`."""
    base = _composed()
    config, _ = fill_model(dataclasses.replace(base, model=dataclasses.replace(base.model, name=str(folder))))
    model: Any = load_model(folder, config.model)
    parts = build_renderer(config, folder, model)
    samples = asyncio.run(_samples(parts.renderer, parts.tokenizer, has_images=config.model.vlm is not None))
    return Learning(config, folder, model, parts.renderer.banned_token_ids, tuple(samples))


@cache
def _composed() -> RunConfig:
    register_schemas()
    overrides = ["model=auto", "model.name=any", "task=color_codeword", "trainer=scratch", "inference=embedded"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", with_recipe(overrides))
    config.output_dir = "outputs/test"
    return parse(config)


async def _samples(renderer: Renderer, tokenizer: Any, *, has_images: bool) -> list[TrainingSample]:
    (a, b), (c, d) = pictures(), pictures(1)

    async def prompt(first: Any, second: Any = None) -> Prompt:
        messages = [_message("What colour is it?", first, has_images)]
        if second is not None:
            messages += [Message.of("assistant", "red"), _message("And this?", second, has_images)]
        return await renderer.first_turn(messages)

    asked = [(await prompt(a, b), "green blue"), (await prompt(a, b), "green red"), (await prompt(a, d), "green blue")]
    asked += [(await prompt(a), "blue green"), (await prompt(c), "red")]
    return [
        _sample(
            f"{number // 4}/{number % 4}", each, tokenizer.encode(answer, add_special_tokens=False), renderer, number
        )
        for number, (each, answer) in enumerate(asked)
    ]


def _message(text: str, picture: Any, has_images: bool) -> Message:
    return Message.of("user", Image(picture), text) if has_images else Message.of("user", text)


def _sample(name: str, prompt: Prompt, answer: Sequence[int], renderer: Renderer, seed: int) -> TrainingSample:
    """Loss on the answer, and on the words between two images."""
    ids = np.concatenate([prompt.token_ids, np.array(answer, np.int64)])
    mask = np.arange(len(ids)) >= len(prompt.token_ids)
    if len(prompt.placeholders) == 2:
        first, second = prompt.placeholders
        between = slice(first.offset + first.length, second.offset)
        mask[between] = ~np.isin(ids[between], list(renderer.banned_token_ids))
    random = np.random.default_rng(seed)
    return TrainingSample(
        rollout_id=name,
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), prompt.placeholders),
        loss_mask=mask,
        advantages=np.where(mask, random.standard_normal(len(ids)), 0).astype(np.float32),
        inference_logprobs=np.where(mask, -random.exponential(size=len(ids)) - 3, 0).astype(np.float32),
        versions=np.where(mask, 0, -1),
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
    )


def blank(sample: TrainingSample) -> TrainingSample:
    """The sample with images of one grey: other pixels of the same sizes. (Some families drop tiles of zeros.)"""

    def grey(array: np.ndarray) -> np.ndarray:
        return np.full_like(array, 0.5) if array.dtype.kind == "f" else array

    images = tuple(
        dataclasses.replace(
            image, hash=f"grey {image.hash}", mm_kwargs={name: grey(array) for name, array in image.mm_kwargs.items()}
        )
        for image in sample.mm_items
    )
    placeholders = tuple(dataclasses.replace(place, hash=f"grey {place.hash}") for place in sample.placeholders)
    return dataclasses.replace(sample, mm_items=images, placeholders=placeholders)


Folder = Callable[[str], Path]
"""The fixture `family_folder`."""
