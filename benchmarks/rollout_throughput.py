"""Rollouts and output tokens per second through our client, beside `vllm.LLM.generate` offline.

    python benchmarks/rollout_throughput.py [--checkpoint DIR] [--groups 16 --group-size 16 --image-size 448]

Both sides get the same prompts (the renderer's token ids and pixels), the same sampling parameters (a seed per rollout,
the logprob of each sampled token, banned tokens) and the same engine settings, those of `inference=vllm`. The image and
its prompt are new to the engine in every round; the siblings of a group share them. Nothing ends a completion early.

    ours      renderer ─▶ VllmEngine ─▶ HTTP ─▶ server in its own processes      clock: first request to last answer
    offline   renderer ─▶ LLM.generate in the measuring process                   clock: the call

On a CPU, where servers run their worker in the engine's process, `LLM.generate` is measured both ways: with its engine
in the same process as the caller, as that setting has it, and in its own, as is vLLM's default. The ratio is to the
faster. `--costs` also prints what a seed per rollout and the banned tokens cost, offline.

Rendering is outside of both clocks; writing, sending and reading images is inside ours. Sides take turns, a process and
a warm engine each; the table has the median and the range over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.models import broken_wheels
from vlmrl.models.families import family_of

broken_wheels.install()

# ruff: noqa: E402
import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.inference.vllm.arguments import server_arguments, server_environment
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.image_fields import ImageField, ImageFields
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.inference.vllm.wire import BANNED_BIAS, encode_item
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.types import Image, Message, Prompt, SamplingParams
from vlmrl.weight_sync.folder import FolderSync

FIELDS = ImageFields(
    (ImageField("pixel_values", "flat", False, 2), ImageField("image_grid_thw", "batched", True, 1)), has_gaps=False
)
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""On a GPU: decode graphs without torch.compile, which serve as fast and start a minute sooner."""

SIDES = ("ours", "offline", "offline, one process")
SERVER_ONLY = (
    "middleware",
    "enable_scale_out",
    "disable_uvicorn_access_log",
    "worker_extension_cls",
)


def model_config(folder: Path | None, dtype: Dtype) -> ModelConfig:
    vlm = VLMConfig("qwen3_vl", ["qwen3-vl"], "mrope", "<|image_pad|>")
    if folder is None:
        return ModelConfig(name="tiny", tiny=TinyConfig(), vlm=vlm, dtype=dtype)
    return ModelConfig(name=str(folder), vlm=vlm, dtype=dtype)


def vllm_config(args: argparse.Namespace) -> VllmConfig:
    extra: dict[str, Any] = {"max_num_seqs": 256, "limit_mm_per_prompt": {"image": 8, "video": 0}}
    if torch.cuda.is_available():
        extra["compilation_config"] = GRAPHS
    extra |= json.loads(args.extra_args)
    return VllmConfig(
        dtype=Dtype(args.dtype), max_model_len=2048, gpu_memory_utilization=args.gpu_memory, extra_args=extra
    )


def make(folder: Path, dtype: Dtype) -> Renderer:
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config, tokenizer, processor = model_config(folder, dtype), load_tokenizer(folder), load_image_processor(folder)
    return make_renderer(
        RendererConfig(), config, tokenizer, processor, vocabulary, family_of(config.vlm).placeholder_tokens
    )


async def prompts_of(renderer: Renderer, round: int, args: argparse.Namespace, groups: int) -> list[Prompt]:
    found = []
    for group in range(groups):
        rng = np.random.default_rng((args.seed, round, group))
        pixels = rng.integers(0, 256, (args.image_size, args.image_size, 3), dtype=np.uint8)
        text = f"Round {round}, picture {group}: which colours are these? "
        found.append(await renderer.first_turn([Message.of("user", text, Image(pixels))]))
    return [prompt for prompt in found for _ in range(args.group_size)]


# ── the two sides ───────────────────────────────────────────────────────────────────────────────────────────


async def ours(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    from safetensors.torch import load_file

    renderer = make(folder, Dtype(args.dtype))
    config = vllm_config(args)
    with tempfile.TemporaryDirectory() as logs:
        engine = VllmEngine(config, folder, Path(args.logs or logs), lambda line: None, print)
        await engine.start()
        try:
            weights = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
            sync = FolderSync(engine, lambda: weights, FolderSyncConfig())
            await sync.publish(0)

            async def play(prompt: Prompt, name: str, seed: int) -> int:
                sampling = SamplingParams(args.new_tokens, 1.0, (), renderer.banned_token_ids, seed)
                async with engine.session(name) as session:
                    return len((await session.generate(prompt, sampling)).token_ids)

            rounds = []
            for round in range(args.rounds + 1):
                prompts = await prompts_of(renderer, round, args, args.groups)
                engine.metrics()
                started, busy = time.perf_counter(), time.process_time()
                counts = await asyncio.gather(*(play(p, f"train/{round}/{i}", i) for i, p in enumerate(prompts)))
                seconds = time.perf_counter() - started
                rounds.append({"rollouts": len(counts), "tokens": sum(counts), "seconds": seconds})
                rounds[-1] |= {"client_busy": time.process_time() - busy, **engine.metrics()}
            sync.close()
        finally:
            await engine.stop()
    return rounds[1:]  # the first warms up


def offline(folder: Path, args: argparse.Namespace, *, one_process: bool) -> list[dict[str, float]]:
    config = vllm_config(args)
    on_cpu = not torch.cuda.is_available()
    os.environ.update(server_environment(config, on_cpu=on_cpu))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if one_process else "1"
    version = vllm_version()
    assert version is not None
    arguments = server_arguments(config, folder, version, on_cpu=on_cpu)
    arguments = {name: value for name, value in arguments.items() if name not in SERVER_ONLY}
    if not one_process:
        arguments.pop("distributed_executor_backend", None)
    from vllm import LLM
    from vllm import SamplingParams as VllmSampling
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item
    from vllm.inputs import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    llm = LLM(**arguments, disable_log_stats=True)
    renderer = make(folder, config.dtype)
    bias = dict.fromkeys(renderer.banned_token_ids, BANNED_BIAS)

    def of(prompt: Prompt) -> Any:
        items = [
            decode_mm_kwargs_item(base64.b64encode(encode_item(image, config.dtype, FIELDS)).decode())
            for image in prompt.images
        ]
        return mm_input(
            prompt_token_ids=prompt.token_ids.tolist(),
            mm_kwargs=MultiModalKwargsItems({"image": items}),
            mm_hashes={"image": [image.hash for image in prompt.images]},
            mm_placeholders={"image": [PlaceholderRange(p.offset, p.length) for p in prompt.placeholders]},
        )

    def generate(round: int, *, has_seed: bool = True, bias: dict[int, float] | None = bias) -> dict[str, float]:
        prompts = asyncio.run(prompts_of(renderer, round, args, args.groups))
        made: dict[int, Any] = {}
        inputs = [made.setdefault(id(prompt), of(prompt)) if id(prompt) not in made else made[id(prompt)]
                  for prompt in prompts]  # fmt: skip
        params = [
            VllmSampling(
                max_tokens=args.new_tokens,
                temperature=1.0,
                seed=i if has_seed else None,
                logprobs=0,
                flat_logprobs=True,
                ignore_eos=True,
                detokenize=False,
                logit_bias=bias,
            )
            for i in range(len(inputs))
        ]
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"rollouts": len(outputs), "tokens": tokens, "seconds": seconds}

    rounds = [generate(round) for round in range(args.rounds + 1)]
    if args.costs:
        for number, (name, options) in enumerate(COSTS.items(), args.rounds + 1):
            found = [generate(2 * number + again, **options) for again in (0, 1)]
            print(f"offline {name}: {max(f['tokens'] / f['seconds'] for f in found):.0f} tokens/s", file=sys.stderr)
    return rounds[1:]


COSTS: dict[str, dict[str, Any]] = {
    "without seeds": {"has_seed": False},
    "without banned tokens": {"bias": None},
    "without both": {"has_seed": False, "bias": None},
}


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Qwen3-VL; default: the tiny one, built on the spot")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=448, help="pixels per side; one image in a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="per turn of a side, after one that warms up")
    parser.add_argument("--turns", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--gpu-memory", type=float, default=0.45)
    parser.add_argument("--extra-args", default="{}", help="JSON; further arguments of vLLM, on both sides")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", help="folder for the server's log")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = Dtype(args.dtype)
    folder = args.checkpoint or ensure_tiny_checkpoint(model_config(None, dtype), ("Which colours are these?",))
    if args.side:
        if args.side == "ours":
            rounds = asyncio.run(ours(folder, args))
        else:
            rounds = offline(folder, args, one_process=args.side == "offline, one process")
        print("ROUNDS " + json.dumps(rounds), flush=True)
        return
    sides = SIDES[:2] if torch.cuda.is_available() else SIDES
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(args.turns):
        for side in found:
            arguments = [*sys.argv[1:], "--side", side, "--seed", str(args.seed + turn)]
            child = subprocess.run(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
            )
            line = next(line for line in child.stdout.splitlines() if line.startswith("ROUNDS "))
            found[side] += json.loads(line.removeprefix("ROUNDS "))
            print(f"turn {turn + 1} of {args.turns}, {side}: {line.removeprefix('ROUNDS ')}", file=sys.stderr)
    speeds = {side: [r["tokens"] / r["seconds"] for r in rounds] for side, rounds in found.items()}
    first = found["ours"][0]
    print(
        f"{first['rollouts']:.0f} rollouts in groups of {args.group_size}, one {args.image_size}-pixel image each, "
        f"{args.new_tokens} new tokens, {args.dtype}, vLLM {'.'.join(map(str, vllm_version() or ()))}"
    )
    print(f"{'side':<20} {'rollouts/s':>11} {'tokens/s, median':>17} {'min – max':>17}")
    for side, values in speeds.items():
        per_second = statistics.median(r["rollouts"] / r["seconds"] for r in found[side])
        spread = f"{min(values):.0f} – {max(values):.0f}"
        print(f"{side:<20} {per_second:>11.1f} {statistics.median(values):>17.0f} {spread:>17}")
    ratio = statistics.median(speeds["ours"]) / max(statistics.median(speeds[side]) for side in sides[1:])
    print(f"ours / offline: {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"rounds": found, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
