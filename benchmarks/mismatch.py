"""How far the sampler is from the trainer, and what of it is only the number format.

    python benchmarks/mismatch.py --checkpoint DIR [--logit-scale 20] [--engines default,batch_invariant,eager]

For each way of starting vLLM: the tokens that it sampled, and k3 (`mismatch_kl/mean`: the mean over tokens of
r − log r − 1) of every other party's logprobs of the same tokens against its own. Parties: this project's trainer in
each number format, and with formats mixed. The yardstick is the trainer's own bfloat16 against its own float32 on the
same tokens: what that format alone costs.

`--logit-scale` multiplies the final norm's weight, and so every logit, for peaky distributions from random weights.
`DIR` holds a Qwen3-VL; random weights will do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, ModelConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.trainer.objective import mismatch_kl
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Completion, Image, Message, Prompt, SamplingParams, TrainingSample, mm_token_type_ids
from vlmrl.weight_sync.folder import FolderSync

ENGINES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "default": ({}, {}),
    "half_head": ({"hf_overrides": None}, {}),
    "batch_invariant": ({}, {"VLLM_BATCH_INVARIANT": "1"}),
    "eager": ({"enforce_eager": True}, {}),
    "float16": ({"dtype": "float16"}, {}),
    "float16_half_head": ({"dtype": "float16", "hf_overrides": None}, {}),
}
"""Name → further arguments of the server, its environment."""

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Decode graphs without torch.compile: starts as fast as eager and serves as fast as the default."""


def config_of(folder: Path, dtype: Dtype) -> ModelConfig:
    vlm = VLMConfig(
        family="qwen3_vl",
        renderers=["qwen3-vl"],
        positions="mrope",
        image_token="<|image_pad|>",
    )
    return ModelConfig(name=str(folder), dtype=dtype, vlm=vlm)


def scaled(folder: Path, scale: float, to: Path) -> Path:
    """The checkpoint with its final norm multiplied; the other tensors are linked, not copied."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    name = "model.language_model.norm.weight"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, copy_function=os.link)
    for path in sorted(to.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            has_norm = name in file.keys()  # noqa: SIM118
        if has_norm:
            tensors = load_file(path)
            tensors[name] = (tensors[name].float() * scale).to(tensors[name].dtype)
            path.unlink()  # the link, not the file
            save_file(tensors, path, metadata={"format": "pt"})
    return to


async def prompts_of(renderer: Renderer, groups: int, image_size: int) -> list[Prompt]:
    found = []
    for group in range(groups):
        pixels = np.random.default_rng(group).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        found.append(await renderer.first_turn([Message.of("user", f"What is in picture {group}? ", Image(pixels))]))
    return found


async def sample(
    engine: VllmEngine, renderer: Renderer, prompts: list[Prompt], group_size: int, new_tokens: int
) -> list[tuple[Prompt, Completion]]:
    async def one(prompt: Prompt, index: int, seed: int) -> tuple[Prompt, Completion]:
        sampling = SamplingParams(new_tokens, 1.0, renderer.stop_token_ids, renderer.banned_token_ids, seed)
        async with engine.session(f"train/{index}") as session:
            return prompt, await session.generate(prompt, sampling)

    pairs = [prompt for prompt in prompts for _ in range(group_size)]
    return list(await asyncio.gather(*(one(prompt, i, i) for i, prompt in enumerate(pairs))))


def as_sample(index: int, prompt: Prompt, completion: Completion) -> TrainingSample:
    token_ids = np.concatenate([prompt.token_ids, completion.token_ids])
    length, sampled = len(token_ids), np.arange(len(token_ids)) >= len(prompt.token_ids)
    logprobs = np.zeros(length, np.float32)
    logprobs[sampled] = completion.logprobs
    return TrainingSample(
        rollout_id=str(index),
        token_ids=token_ids,
        mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
        loss_mask=sampled,
        advantages=np.zeros(length, np.float32),
        inference_logprobs=logprobs,
        versions=np.where(sampled, 0, -1),
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
    )


# ── the trainer, rounding in other places ───────────────────────────────────────────────────────────────────


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """Matrix products in half precision, everything between them (the residual stream too) in the model's float32."""
    import torch

    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=getattr(torch, dtype)):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 with ten bits of mantissa."""
    import torch

    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


VARIANTS: dict[str, tuple[Dtype, Callable[[], Any]]] = {
    "bfloat16": (Dtype.bfloat16, nullcontext),
    "float16": (Dtype.float16, nullcontext),
    "float32": (Dtype.float32, nullcontext),
    "float32, products tf32": (Dtype.float32, tf32),
    "float32, products bfloat16": (Dtype.float32, lambda: products_in("bfloat16")),
    "float32, products float16": (Dtype.float32, lambda: products_in("float16")),
}
"""Party → the model's dtype, and what surrounds its forward pass."""


def trainer_logprobs(folder: Path, config: ModelConfig, batches: dict[str, list[TrainingSample]]) -> dict[str, Any]:
    """engine → party → float32 logprobs of all its tokens, one after the other."""
    import torch

    found: dict[str, Any] = {engine: {} for engine in batches}
    for dtype in dict.fromkeys(dtype for dtype, _ in VARIANTS.values()):
        model: Any = load_model(folder, ModelConfig(name=config.name, dtype=dtype, vlm=config.vlm))
        positions = position_function("mrope", model.config.vision_config.spatial_merge_size)
        renderer = renderer_of(folder, config, model.get_input_embeddings().num_embeddings)
        policy = Policy(model, positions, renderer.banned_token_ids)
        trainer = LocalTrainer(
            policy,
            TrainerConfig(learning_rate=1.5e-3, micro_batch_tokens=4096),
            AlgorithmConfig(),
            temperature=1.0,
            max_new_tokens=8,
        )
        for name, (wanted, surroundings) in VARIANTS.items():
            if wanted is not dtype:
                continue
            with surroundings():
                for engine, samples in batches.items():
                    started = time.perf_counter()
                    found[engine][name] = torch.from_numpy(np.concatenate(trainer.logprobs(samples)))
                    print(f"  {name} on the tokens of {engine}: {time.perf_counter() - started:.1f} s", flush=True)
        del model, policy, trainer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def renderer_of(folder: Path, config: ModelConfig, embeddings: int) -> Renderer:
    tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    return make_renderer(
        RendererConfig(), config, tokenizer, processor, embeddings, family_of(config.vlm).placeholder_tokens
    )


async def sampled_by(name: str, folder: Path, config: ModelConfig, args: argparse.Namespace) -> list[TrainingSample]:
    """What one way of starting vLLM samples."""
    import torch
    from safetensors.torch import load_file

    extra, environment = ENGINES[name]
    os.environ.update(environment)
    base = {"max_num_seqs": 256, "limit_mm_per_prompt": {"image": 8, "video": 0}}
    if torch.cuda.is_available() and "enforce_eager" not in extra:
        base["compilation_config"] = GRAPHS
    vllm = VllmConfig(
        dtype=Dtype(extra.get("dtype", config.dtype.value)),
        max_model_len=2048,
        gpu_memory_utilization=args.gpu_memory,
        enforce_eager=bool(extra.get("enforce_eager")),
        extra_args=base | {key: value for key, value in extra.items() if key not in ("enforce_eager", "dtype")},
    )
    embeddings = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    renderer = renderer_of(folder, config, embeddings)

    def weights() -> dict[str, Any]:
        return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    engine = VllmEngine(vllm, folder, Path(args.logs), lambda line: None, print)
    started = time.perf_counter()
    try:
        await engine.start()
        sync = FolderSync(engine, weights, FolderSyncConfig())
        await sync.publish(0)
        up = time.perf_counter() - started
        prompts = await prompts_of(renderer, args.groups, args.image_size)
        await sample(engine, renderer, prompts[:1], 2, 4)  # warm
        started = time.perf_counter()
        pairs = await sample(engine, renderer, prompts, args.group_size, args.new_tokens)
        seconds = time.perf_counter() - started
        sync.close()
    finally:
        await engine.stop()
        for key in environment:
            del os.environ[key]
    tokens = sum(len(completion.token_ids) for _, completion in pairs)
    print(f"{name}: up in {up:.0f} s; {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f}/s)", flush=True)
    return [as_sample(i, prompt, completion) for i, (prompt, completion) in enumerate(pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--logit-scale", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--engines", default="default,batch_invariant")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--gpu-memory", type=float, default=0.45)
    parser.add_argument("--logs", default="/tmp/vlmrl-mismatch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.checkpoint
    if args.logit_scale != 1.0:
        folder = scaled(folder, args.logit_scale, Path(f"{folder}-x{args.logit_scale:g}"))
    config = config_of(folder, Dtype(args.dtype))
    batches: dict[str, list[TrainingSample]] = {}
    for name in args.engines.split(","):
        try:
            batches[name] = asyncio.run(sampled_by(name, folder, config, args))
        except Exception as error:  # noqa: BLE001 — an engine that a version cannot do is one row less
            print(f"{name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
    found = trainer_logprobs(folder, config, batches)
    table: list[dict[str, Any]] = []
    for engine, parties in found.items():
        inference = np.concatenate([s.inference_logprobs[s.loss_mask] for s in batches[engine]])
        import torch

        sampler = torch.from_numpy(inference)
        for name, logprobs in parties.items():
            row: dict[str, Any] = {"engine": engine, "trainer": name, "tokens": len(sampler)}
            row["k3 trainer against sampler"] = float(mismatch_kl(logprobs, sampler)[0]) / len(sampler)
            row["k3 trainer against float32"] = float(mismatch_kl(logprobs, parties["float32"])[0]) / len(sampler)
            row["mean |difference|"] = float((logprobs - sampler).abs().mean())
            table.append(row)
    print(f"\nlogits × {args.logit_scale:g}, {args.dtype}; k3 in nats per token")
    print(f"{'engine':<16} {'trainer':<26} {'vs sampler':>12} {'vs float32':>12} {'mean |d|':>10} {'tokens':>7}")
    for row in table:
        figures = f"{row['k3 trainer against sampler']:>12.3e} {row['k3 trainer against float32']:>12.3e}"
        print(
            f"{row['engine']:<16} {row['trainer']:<26} {figures} {row['mean |difference|']:>10.4f} {row['tokens']:>7}"
        )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
