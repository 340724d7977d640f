"""transformers and vLLM load an exported folder and sample the same greedy tokens as the policy."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from support.configs import checked
from support.vllm_tiny import Tiny
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import CheckpointError, ConfigError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer, resolve_checkpoint
from vlmrl.models.families import family_of
from vlmrl.preflight.rules.past_run import export_folder_is_free
from vlmrl.preflight.site import Site
from vlmrl.rendering.renderer import make_renderer
from vlmrl.runs.every_rank import make_policy
from vlmrl.runs.export import export_checkpoint
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Completion, InferenceEngine, Prompt

NEW_TOKENS = 8


@pytest.fixture
def policy_and_folder(composed: Callable[..., DictConfig], tmp_path: Path) -> tuple[Tiny, Path]:
    """A policy with changed weights, and the folder exported from a checkpoint of it."""
    tree = composed("mode=export", f"resume={tmp_path}", f"export.folder={tmp_path / 'exported'}")
    tree.output_dir = str(tmp_path)
    config = checked(tree)
    with pytest.raises(CheckpointError, match="has no checkpoint to export"):
        export_checkpoint(config, pytest.fail)
    folder = resolve_checkpoint(config.model, load_task(config.task, seed=0).texts())
    model: Any = load_model(folder, config.model)
    assert config.orchestrator.renderer is not None
    renderer = make_renderer(
        config.orchestrator.renderer,
        config.model,
        load_tokenizer(folder),
        load_image_processor(folder),
        model.get_input_embeddings().num_embeddings,
        family_of(config.model.vlm).placeholder_tokens,
    )
    tiny = Tiny(folder, make_policy(config, model, renderer.banned_token_ids), renderer)
    tiny.learn_something(seed=1)
    trainer = LocalTrainer(
        tiny.policy, TrainerConfig(learning_rate=1.5e-3), AlgorithmConfig(), temperature=1.0, max_new_tokens=NEW_TOKENS
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(3, trainer, LoopState())
    checkpoints.finish()
    exported = export_checkpoint(config, pytest.fail)
    assert exported == tmp_path / "exported"
    with pytest.raises(ConfigError, match=r"^export.folder=.* exists already, and an export overwrites nothing"):
        export_folder_is_free(config, Site())
    with pytest.raises(OSError, match="not empty"):
        export_checkpoint(config, pytest.fail)
    shutil.rmtree(tmp_path / ".partial_exported")
    assert not list(tmp_path.glob(".partial*"))
    return tiny, exported


async def greedy(engine: InferenceEngine, tiny: Tiny, prompts: list[Prompt]) -> list[Completion]:
    """Each prompt's most likely completion."""
    found = []
    for prompt in prompts:
        async with engine.session("eval-greedy/000000/00/00") as session:
            found.append(await session.generate(prompt, tiny.sampling(0, NEW_TOKENS, temperature=0.0)))
    return found


async def prompts_of(tiny: Tiny) -> list[Prompt]:
    return [await tiny.prompt(), await tiny.prompt(1), await tiny.prompt(2, 3)]


def test_transformers_loads_the_folder(policy_and_folder: tuple[Tiny, Path]) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    tiny, folder = policy_and_folder
    auto: Any = AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, tiny.weights()[name]), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (tiny.folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer(tiny.folder).get_vocab()
    processor: Any = AutoImageProcessor
    assert processor.from_pretrained(folder, backend="pil").merge_size == 2
    GenerationConfig.from_pretrained(folder)
    assert os.stat(folder / "model.safetensors").st_mode & 0o444 == os.stat(folder / "config.json").st_mode & 0o444

    prompts = asyncio.run(prompts_of(tiny))
    expected = asyncio.run(greedy(EmbeddedEngine(tiny.policy, lambda: 0, 512), tiny, prompts))
    for prompt, completion in zip(prompts, expected, strict=True):
        names = prompt.images[0].mm_kwargs if prompt.images else {}
        pixels = {
            name: torch.tensor(np.concatenate([image.mm_kwargs[name] for image in prompt.images])) for name in names
        }
        types = np.zeros(len(prompt.token_ids), np.int64)
        for placeholder in prompt.placeholders:
            types[placeholder.offset : placeholder.offset + placeholder.length] = 1
        generated = model.generate(
            input_ids=torch.tensor(prompt.token_ids)[None],
            attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.int64),
            mm_token_type_ids=torch.from_numpy(types)[None],
            **pixels,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            suppress_tokens=list(tiny.renderer.banned_token_ids),
            eos_token_id=list(tiny.renderer.stop_token_ids),
            pad_token_id=tiny.renderer.stop_token_ids[0],
        )
        assert generated[0, len(prompt.token_ids) :].tolist() == completion.token_ids.tolist()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_vllm_serves_the_folder(policy_and_folder: tuple[Tiny, Path], tmp_path: Path) -> None:
    """There is no weight sync, so vLLM samples from the weights in the folder."""
    tiny, folder = policy_and_folder

    async def both() -> tuple[list[Completion], list[Completion]]:
        prompts = await prompts_of(tiny)
        config = VllmConfig(dtype=Dtype.float32, max_restarts=0)
        engine = VllmEngine(config, folder, tmp_path / "logs", lambda _: None, pytest.fail)
        await engine.start()
        try:
            (replica,) = engine.replicas
            assert replica.client is not None
            # A weight sync would send the version; vLLM 0.26 has no versions.
            await replica.client.call("POST", "/update_weight_version", json={"new_version": "3"}, optional=True)
            served = await greedy(engine, tiny, prompts)
        finally:
            await engine.stop()
        return served, await greedy(EmbeddedEngine(tiny.policy, lambda: 0, 512), tiny, prompts)

    served, expected = asyncio.run(both())
    for mine, theirs in zip(expected, served, strict=True):
        assert theirs.token_ids.tolist() == mine.token_ids.tolist()
        np.testing.assert_allclose(theirs.logprobs, mine.logprobs, atol=1e-4)
