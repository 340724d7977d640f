"""Real vLLM servers on the CPU for the tiny checkpoints of model families: their logprobs are those of transformers.

A server takes 15 to 30 s to start, so each family has one, and one test does everything with it. `-m "vllm and not
benchmark"` runs a family of each kind: images as tensors, images as pictures with other tokens between the image's,
experts that are published transposed, and linear attention with experts, which vLLM computes in bfloat16.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.families import FAMILIES
from support.families.clips import MESSAGES, ByTransformers, video_renderer, vlm_of
from support.families.loading import load_processor
from support.families.prompts import prompt_and_batch
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, VLMConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.models import broken_wheels
from vlmrl.models.checkpoints.image_size import resized, size_settings
from vlmrl.models.checkpoints.published import keep_published_layout, published_weights
from vlmrl.types import Completion, Prompt, SamplingParams
from vlmrl.weight_sync.folder import FolderSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]

IN_BFLOAT16 = ["qwen3_5", "qwen3_5_moe"]
"""vLLM's linear attention on a CPU takes nothing else."""
QWENS = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", *IN_BFLOAT16]
AS_TENSORS = [*QWENS, "glm4v", "llava", "llava_next", "llava_onevision"]
AS_PICTURES = ["idefics3", "smolvlm", "internvl", "mistral3", "pixtral", "gemma4"]
ALWAYS = {"llava_next", "idefics3", "qwen3_5_moe"}

IN_FLOAT32 = 1e-4
"""Largest |difference| from transformers' logprobs in float32."""
ROUNDED = 0.15
"""Largest mean |difference| of bfloat16 from float32; 0.02 to 0.03 was measured. Other weights make more than 1."""
RESIZED = {"idefics3": {"size": {"longest_edge": 192}}}
"""Settings of the image processor that are not the checkpoint's."""
LOST = 1e-2
"""What a broken hop makes of the logprobs, at least."""


def families() -> list[Any]:
    marks = {name: [] if name in ALWAYS else [pytest.mark.release] for name in AS_TENSORS + AS_PICTURES}
    return [pytest.param(name, marks=marks[name]) for name in AS_TENSORS + AS_PICTURES]


@pytest.mark.parametrize("name", families())
def test_a_familys_server_computes_what_transformers_does(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    broken_wheels.install()
    asyncio.run(serve(name, family_folder(name), tmp_path))


async def serve(name: str, folder: Path, logs: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    keep_published_layout(model)
    image_token = model.config.image_token_id
    processor = load_processor(folder)
    prompt, batch = prompt_and_batch(name, processor, image_token)
    dtype = Dtype.bfloat16 if name in IN_BFLOAT16 else Dtype.float32
    bound = ROUNDED if name in IN_BFLOAT16 else IN_FLOAT32
    engine = VllmEngine(VllmConfig(dtype=dtype, replicas=1), folder, logs, lambda line: None, lambda line: None)
    sync = Forgetful(
        engine, lambda: published_weights(model, dict(model.named_parameters())), FolderSyncConfig(verify=True)
    )
    await engine.start()
    try:
        client = engine.replicas[0].client
        assert client is not None
        assert client.image_fields is not None
        assert all(map(client.image_fields.are_tensors_of, prompt.images)) == (name in AS_TENSORS)
        await sync.publish(0)
        assert await distance(engine, model, prompt, batch, image_token) <= bound
        change(model)
        assert await distance(engine, model, prompt, batch, image_token) > 5 * bound, "old weights would pass unseen"
        await finds_a_weight_that_was_not_sent(sync)
        await sync.publish(1)
        assert await distance(engine, model, prompt, batch, image_token) <= bound
        without_images = Prompt(prompt.token_ids, (), ())
        assert await distance(engine, model, without_images, batch, image_token) > max(LOST, bound)
        comparison = await sync.compare()
        assert comparison.compared > 0
        assert comparison.differing == comparison.unmatched == ()
        if name in AS_PICTURES:
            await refuses_other_pixels(engine, prompt)
            await refuses_other_places(engine, prompt)
            if find_spec("torchvision") is not None:
                await refuses_other_rounding(engine, prompt)
        if FAMILIES[name].video_processor:
            await computes_videos(engine, model, name, folder, bound)
        if name in RESIZED:
            processor.image_processor = resized(processor.image_processor, sized(name))
            prompt, batch = prompt_and_batch(name, processor, image_token)
            await refuses(engine, renamed(prompt, "unknown sizes"), "vLLM's processor")
            engine._encoder._sizes = size_settings(sized(name))
            assert await distance(engine, model, renamed(prompt, "resized"), batch, image_token) <= bound
    finally:
        await engine.stop()
        sync.close()


async def computes_videos(engine: VllmEngine, model: Any, name: str, folder: Path, bound: float) -> None:
    """Two videos and an image in one prompt: first with their data, then by their hashes, then to a server that has
    lost them. Other frames, and another place of the first frame, are seen."""
    client = engine.replicas[0].client
    assert client is not None
    prompt = await video_renderer(folder, vlm_of(name)).first_turn(MESSAGES)
    batch = ByTransformers.of(folder).inputs(MESSAGES)
    banned = [model.config.image_token_id, model.config.video_token_id]
    engine.metrics()
    for sent, forgotten in ((3, 0), (0, 0), (3, 1)):
        if forgotten:
            await client.call("POST", "/reset_mm_cache")
        apart = await distance(engine, model, prompt, batch, banned)
        assert apart <= bound
        assert images_sent(engine) == (sent, forgotten)
    (first, *others), (place, *places) = prompt.videos[:1] + prompt.mm_items[1:], prompt.placeholders
    pixels = first.mm_kwargs["pixel_values_videos"]
    swapped = np.roll(pixels, len(pixels) // int(first.mm_kwargs["video_grid_thw"][0, 0]), 0)
    other = replace(first, hash="swapped", mm_kwargs={**first.mm_kwargs, "pixel_values_videos": swapped})
    wrong = Prompt(prompt.token_ids, (replace(place, hash="swapped"), *places), (other, *others))
    # In bfloat16 it is 0.045 next to 0.028 of rounding (Qwen3.5 with experts).
    assert await distance(engine, model, wrong, batch, banned) > max(LOST, 1.2 * apart)
    fields = client.video_fields
    assert fields is not None
    client.has_route = False
    if fields.has_lead:
        await refuses(engine, prompt, "cannot be told which tokens of the prompt are those of a video")
    else:
        assert await distance(engine, model, prompt, batch, banned) <= bound
    client.has_route = True


@pytest.mark.parametrize("name", ["mistral3", pytest.param("idefics3", marks=pytest.mark.release)])
def test_a_server_with_vllms_own_endpoint_alone_computes_what_transformers_does(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    broken_wheels.install()
    asyncio.run(serve_as_others_do(name, family_folder(name), tmp_path))


async def serve_as_others_do(name: str, folder: Path, logs: Path) -> None:
    """A server as of `inference.urls`, started without our middleware. Its image processor is the renderer's."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    image_token = model.config.image_token_id
    prompt, batch = prompt_and_batch(name, load_processor(folder), image_token)
    as_started = {"middleware": None, "mm_processor_kwargs": {"backend": "pil"}}
    config = VllmConfig(dtype=Dtype.float32, extra_args=as_started)
    engine = VllmEngine(config, folder, logs, lambda line: None, lambda line: None)
    sync = FolderSync(engine, lambda: published_weights(model, dict(model.named_parameters())), FolderSyncConfig())
    await engine.start()
    try:
        client = engine.replicas[0].client
        assert client is not None
        assert not client.has_route
        await sync.publish(0)
        before = await same_as_transformers(engine, model, prompt, batch, image_token)
        await same_as_transformers(engine, model, prompt, batch, image_token)
        assert images_sent(engine) == (len(prompt.images), 0)
        change(model)
        await sync.publish(1)  # which clears the features of images, and keeps the pictures
        after = await same_as_transformers(engine, model, prompt, batch, image_token)
        assert abs(before.logprobs[0] - after.logprobs[0]) > 1e-3, "an update without effect would pass unseen"
        assert images_sent(engine) == (0, 0)
        await client.call("POST", "/reset_mm_cache")
        await same_as_transformers(engine, model, prompt, batch, image_token)
        assert images_sent(engine) == (len(prompt.images), 1)
        await refuses_other_pixels(engine, prompt)
        await refuses_other_places(engine, prompt)
        # What vLLM answers with status 200, from another prompt.
        client._unexpanded = lambda rollout_id, prompt: prompt.token_ids.tolist()  # type: ignore[method-assign]
        await refuses(engine, prompt, "did not sample from the renderer's prompt: it has ")
        assert await client.is_healthy()
    finally:
        await engine.stop()
        sync.close()


def images_sent(engine: VllmEngine) -> tuple[float, float]:
    """(images whose data was sent, requests for which the server lacked an image) since the last call."""
    metrics = engine.metrics()
    return metrics["wire/images_sent"], metrics["wire/images_forgotten"]


async def refuses_other_rounding(engine: VllmEngine, prompt: Prompt) -> None:
    """Without our endpoint this server has transformers' image processor on torchvision. The renderer's is on PIL,
    and they round in other ways."""
    client = engine.replicas[0].client
    assert client is not None
    client.has_route = False
    await refuses(engine, prompt, "makes another image of .*other values.* --middleware vlmrl")
    client.has_route = True


class Forgetful(FolderSync):
    """Sends all weights but those whose names end with `forgotten`."""

    forgotten: str | None = None

    def _stage(self, version: int, tensors: Mapping[str, Any]) -> None:
        kept = {name: t for name, t in tensors.items() if not (self.forgotten and name.endswith(self.forgotten))}
        super()._stage(version, kept)


async def finds_a_weight_that_was_not_sent(sync: Forgetful) -> None:
    sync.forgotten = "layers.1.self_attn.o_proj.weight"
    with pytest.raises(EngineError, match=r"SHA-256 differs for .*layers\.1\.self_attn\.o_proj\.weight"):
        await sync.publish(1)
    sync.forgotten = None


def sized(name: str) -> VLMConfig:
    return VLMConfig(name, ["template"], "sequential", "<image>", image_settings=RESIZED[name])


def renamed(prompt: Prompt, prefix: str) -> Prompt:
    """The same prompt with other hashes of its images."""
    places = tuple(replace(place, hash=f"{prefix} {place.hash}") for place in prompt.placeholders)
    images = tuple(replace(image, hash=f"{prefix} {image.hash}") for image in prompt.images)
    return Prompt(prompt.token_ids, places, images)


async def sample(engine: VllmEngine, prompt: Prompt, banned: tuple[int, ...] = ()) -> Completion:
    async with engine.session("train/000001/00/00") as session:
        return await session.generate(prompt, SamplingParams(8, 1.0, (), banned, seed=3))


async def same_as_transformers(
    engine: VllmEngine, model: Any, prompt: Prompt, batch: Mapping[str, Any], image_token: int
) -> Completion:
    completion, apart = await compared(engine, model, prompt, batch, image_token)
    assert apart.max() <= IN_FLOAT32, f"{apart}"
    return completion


async def distance(
    engine: VllmEngine, model: Any, prompt: Prompt, batch: Mapping[str, Any], image_token: int | list[int]
) -> float:
    """The largest |difference| of a logprob from transformers, and in bfloat16 the mean."""
    _, apart = await compared(engine, model, prompt, batch, image_token)
    return float(apart.mean() if engine.config.dtype is Dtype.bfloat16 else apart.max())


async def compared(
    engine: VllmEngine, model: Any, prompt: Prompt, batch: Mapping[str, Any], image_token: int | list[int]
) -> tuple[Completion, Any]:
    """Sample without `image_token`, or any of a list, and compare with transformers' own forward of `batch` and the
    completion: |difference| per token."""
    banned = tuple(image_token) if isinstance(image_token, list) else (image_token,)
    completion = await sample(engine, prompt, banned)
    sampled = torch.from_numpy(completion.token_ids.copy())
    grown = dict(batch) | {
        key: torch.cat([batch[key], fill[None].to(batch[key].dtype)], 1)
        for key, fill in {
            "input_ids": sampled,
            "attention_mask": torch.ones_like(sampled),
            "mm_token_type_ids": torch.zeros_like(sampled),
            "token_type_ids": torch.zeros_like(sampled),
        }.items()
        if key in batch
    }
    with torch.no_grad():
        logits = model(**grown).logits[0, len(prompt.token_ids) - 1 : -1].float()
    logits[:, image_token] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0]
    apart = np.abs(completion.logprobs - expected.numpy())
    return completion, apart


def change(model: Any) -> None:
    """Change every weight."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 * float(parameter.std()) if parameter.numel() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


async def refuses_other_pixels(engine: VllmEngine, prompt: Prompt) -> None:
    """A picture that is not the one of the renderer's tensors: one channel of one pixel differs by 1/255."""
    first = prompt.images[0]
    pixels = first.pixels.copy()
    pixels[first.pixels.shape[0] // 2, first.pixels.shape[1] // 2, 0] ^= 1
    await refuses(engine, with_first(prompt, "other", pixels=pixels), "other values")


async def refuses_other_places(engine: VllmEngine, prompt: Prompt) -> None:
    """The image tokens of an image are said to be where they are not."""
    place = prompt.placeholders[0]
    gaps = ((place.gaps[0][0] + 1, place.gaps[0][1]), *place.gaps[1:]) if place.gaps else ((1, 1),)
    shifted = replace(prompt, placeholders=(replace(place, gaps=gaps), *prompt.placeholders[1:]))
    await refuses(engine, shifted, "with the gaps")


async def refuses(engine: VllmEngine, prompt: Prompt, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        await sample(engine, prompt)


def with_first(prompt: Prompt, hash: str, **changes: Any) -> Prompt:
    first = replace(prompt.images[0], hash=hash, **changes)
    place = replace(prompt.placeholders[0], hash=hash)
    return Prompt(prompt.token_ids, (place, *prompt.placeholders[1:]), (first, *prompt.images[1:]))
