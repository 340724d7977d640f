"""Real vLLM servers on the CPU for the tiny checkpoints of model families: their logprobs are those of transformers.

A server takes 15 to 30 s to start, so each family has one, and one test does everything with it. `-m "vllm and not
benchmark"` runs two families, one whose images go as tensors and one whose images go as pictures.
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

from support.families.loading import load_processor
from support.families.prompts import prompt_and_batch
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.models import broken_wheels
from vlmrl.models.checkpoints.published import published_weights
from vlmrl.types import Completion, Prompt, SamplingParams
from vlmrl.weight_sync.folder import FolderSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]

AS_TENSORS = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "llava_next", "llava_onevision"]
AS_PICTURES = ["idefics3", "smolvlm", "internvl", "mistral3", "pixtral", "gemma4"]
IN_CI = {"llava_next", "idefics3"}


def families() -> list[Any]:
    marks = {name: [] if name in IN_CI else [pytest.mark.benchmark] for name in AS_TENSORS + AS_PICTURES}
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
    image_token = model.config.image_token_id
    prompt, batch = prompt_and_batch(name, load_processor(folder), image_token)
    engine = VllmEngine(VllmConfig(dtype=Dtype.float32, replicas=1), folder, logs, lambda line: None, lambda line: None)
    sync = FolderSync(engine, lambda: published_weights(model, dict(model.named_parameters())), FolderSyncConfig())
    await engine.start()
    try:
        client = engine.replicas[0].client
        assert client is not None
        assert client.image_fields is not None
        assert all(map(client.image_fields.are_tensors_of, prompt.images)) == (name in AS_TENSORS)
        await sync.publish(0)
        before = await same_as_transformers(engine, model, prompt, batch, image_token)
        change(model)
        await sync.publish(1)
        after = await same_as_transformers(engine, model, prompt, batch, image_token)
        assert abs(before.logprobs[0] - after.logprobs[0]) > 1e-3, "an update without effect would pass unseen"
        comparison = await sync.compare()
        assert comparison.compared > 0
        assert comparison.differing == comparison.unmatched == ()
        if name in AS_PICTURES:
            await refuses_other_pixels(engine, prompt)
            await refuses_other_places(engine, prompt)
            if find_spec("torchvision") is not None:
                await refuses_other_rounding(engine, prompt)
    finally:
        await engine.stop()
        sync.close()


@pytest.mark.parametrize("name", ["mistral3", pytest.param("idefics3", marks=pytest.mark.benchmark)])
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


async def sample(engine: VllmEngine, prompt: Prompt, banned: tuple[int, ...] = ()) -> Completion:
    async with engine.session("train/000001/00/00") as session:
        return await session.generate(prompt, SamplingParams(8, 1.0, (), banned, seed=3))


async def same_as_transformers(
    engine: VllmEngine, model: Any, prompt: Prompt, batch: Mapping[str, Any], image_token: int
) -> Completion:
    """Sample, and compare with transformers' own forward of prompt and completion."""
    completion = await sample(engine, prompt, (image_token,))
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
    assert apart.max() <= 1e-4, f"{apart}"
    return completion


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
