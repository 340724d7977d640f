"""The embedded engine on a GPU: how fast groups of siblings are sampled, how exactly, and how soon.

    python benchmarks/embedded_gpu.py [--size 2b] [--parts exact,rate,equal,mismatch,start]
    python benchmarks/embedded_gpu.py --parts rate,offline --checkpoint DIR      beside LLM.generate, the same model
    python benchmarks/embedded_gpu.py --family qwen3_5 --parts rate,mismatch --decoders embedded,reference
    python benchmarks/embedded_gpu.py --size tiny --device cpu --shapes 2x5x37x16 --rounds 1      rehearsal

A shape is groups × siblings × prompt × new tokens. Prompts are random text tokens that no side has seen; with
`--image-side 1000` they are an image of so many pixels and a question instead (`--images 32`: so many images, `--frames
64`: a video). Weights are random, with every logit multiplied by `--logit-scale`, so that distributions are as peaky as
a trained model's; or they are those of the Qwen3-VL in `--checkpoint`. `--family` is another family in the size of
large_family.py.

    exact      attention of a decode step against one softmax in float64, at each shape's sizes
    rate       sampled tokens per second of whole calls, prefill included; one warm-up, then the median of the rounds;
               by each of `--decoders`: `embedded` or the reference decoder
    turns      conversations of four turns, the same by `inference.batching=together` and `rolling`; tokens per second
               of the whole. Answers have an eighth of the new tokens up to all of them (even), or a median of an
               eighth, log-normal with sigma 1, and at most all (long tail)
    offline    the same shapes by `vllm.LLM.generate` (benchmarks/shared_prefix.py), in a process of its own
    equal      the share of completions at equal seeds that the fast decoder and the reference decoder agree on, and of
               their tokens before the first difference, with at most `--compare-tokens` new tokens
    mismatch   mismatch_kl/mean of sampler against trainer in float16, and of the trainer against itself under another
               packing
    start      seconds from `python -m vlmrl` to the first finished rollout, twice: the second run finds compiled code
    profile    the kernels that a batch of the first shape spends most time in

On a CPU the fast decoder runs without graphs and without compiled layers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from noise_task import Look, Noise
from shared_prefix import SIZES, Shape

from vlmrl import Env, Reply

REPOSITORY = Path(__file__).parents[1]
FIRST = "VLMRL_FIRST_ROLLOUT"
"""Environment variable: the file that the first finished rollout makes."""

START = (
    "task=imported",
    "task.target=embedded_gpu:Timed",
    "inference=embedded",
    "orchestrator.groups_per_step=2",
    "orchestrator.group_size=8",
    "orchestrator.max_new_tokens=64",
    "orchestrator.eval.every=0",
    "trainer.max_steps=1",
    "trainer.lr_warmup_steps=0",
    "trainer.checkpoint_every=0",
    "monitor.live=false",
    "monitor.report=false",
    "monitor.vision_gap_every=0",
    "monitor.wandb.mode=disabled",
)
"""The run whose first rollout is waited for."""


class _TimedLook(Look):
    def step(self, completion: str) -> Reply:
        Path(os.environ[FIRST]).touch()
        return super().step(completion)


class Timed(Noise):
    """The task of the part `start`."""

    def env(self, problem: Any) -> Env:
        return _TimedLook(problem)


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────


def made(args: argparse.Namespace, dtype: str) -> tuple[Any, Any]:
    """The policy, with its logits scaled, and its renderer."""
    import torch
    from families_gpu import policy_and_renderer
    from large_family import scale_logits
    from training_batches import model_config, policy_of

    from vlmrl.config.model import Dtype, Init

    if args.family:
        size, number = "tiny" if args.size == "tiny" else "large", getattr(torch, dtype)
        with tempfile.TemporaryDirectory() as folder:
            policy, renderer = policy_and_renderer(args.family, size, Path(folder) / args.family, args.device, number)
    else:
        config = model_config(args.size, Dtype(dtype), args.device)
        if args.checkpoint is not None:
            config = replace(config, init=Init.pretrained, name=str(args.checkpoint), size=None)
        policy, renderer = policy_of(config)
    scale_logits(policy.model, args.logit_scale)
    return policy, renderer if args.image_side else None


def prompts_of(args: argparse.Namespace, policy: Any, renderer: Any, shape: Shape, seed: int) -> list[Any]:
    """One prompt per group, of random tokens or, with a renderer, with images or a video of noise."""
    from vlmrl.types import Image, Message, Prompt, Video

    random, side = np.random.default_rng(seed), args.image_side
    if renderer is None:
        return [Prompt(random.integers(10, len(policy.banned) // 2, shape.prompt), (), ()) for _ in range(shape.groups)]
    question = "What is to be seen here? Describe every part of it."

    def shown() -> list[Image] | list[Video]:
        frames = random.integers(0, 256, (args.frames or args.images, side, side, 3), np.uint8)
        return [Video(frames)] if args.frames else [Image(frame) for frame in frames]

    async def rendered() -> list[Any]:
        return [await renderer.first_turn([Message.of("user", *shown(), question)]) for _ in range(shape.groups)]

    return asyncio.run(rendered())


def engine_of(policy: Any) -> Any:
    """An engine, which forgets all keys and values after each batch, as between the steps of a run."""
    from vlmrl.inference.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(policy, lambda: 0, 1 << 20)


def sampled(
    args: argparse.Namespace, parts: tuple[Any, Any], shape: Shape, seed: int, engine: Any = None
) -> tuple[list[tuple[Any, Any]], float]:
    """Prompt and completion of every sibling, and the seconds that they took; by a new engine where none is given."""
    from vlmrl.types import SamplingParams

    policy, renderer = parts
    prompts = prompts_of(args, policy, renderer, shape, seed)
    given, engine = engine, engine or engine_of(policy)

    async def one(session: Any, prompt: Any, number: int) -> tuple[Any, Any]:
        async with session:
            sampling = SamplingParams(shape.new, 1.0, (), (), seed * 100_000 + number)
            return prompt, await session.generate(prompt, sampling)

    async def batch() -> list[tuple[Any, Any]]:
        asked = [prompt for prompt in prompts for _ in range(shape.siblings)]
        sessions = [engine.session(str(number)) for number in range(len(asked))]
        pairs = enumerate(zip(sessions, asked, strict=True))
        return list(await asyncio.gather(*(one(session, prompt, number) for number, (session, prompt) in pairs)))

    started = time.perf_counter()
    found = asyncio.run(batch())
    seconds = time.perf_counter() - started
    if given is None:
        asyncio.run(engine.stop())
    return found, seconds


def decoder(*, fast: bool) -> Any:
    """Choose the decoder of the engines that are made inside."""
    return patch("vlmrl.inference.embedded.generator.decodes_by_rows", lambda policy: fast)


def rate(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """Sampled tokens per second."""
    import torch

    print("\n| shape | decoder | tokens/s | rounds | first call s | peak GiB |\n|---|---|---|---|---|---|", flush=True)
    parts = made(args, args.dtype)
    for shape, name in product(shapes, args.decoders.split(",")):
        with decoder(fast=name == "embedded"):
            engine = engine_of(parts[0])
            _, first = sampled(args, parts, shape, 1, engine)
            rates = []
            for number in range(args.rounds):
                found, seconds = sampled(args, parts, shape, 2 + number, engine)
                rates.append(sum(len(said.token_ids) for _, said in found) / seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else float("nan")
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"| {shape} | {name} | {statistics.median(rates):,.0f} | {span} | {first:.2f} | {peak:.1f} |", flush=True)


TURNS = 4
REPLY = 64
"""Tokens between two answers of a conversation."""


def turns(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """Sampled tokens per second of conversations."""
    print("\n| shape | answers | batching | tokens/s | rounds | faster |\n|---|---|---|---|---|---|", flush=True)
    parts = made(args, args.dtype)
    for shape, kind in product(shapes, ("even", "long tail")):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for number in range(args.rounds + 1):  # the first one compiles
            for is_rolling, found in rates.items():
                found.append(conversations(args, parts, shape, kind, 1 + number, is_rolling))
                print(f"{shape} {kind} rolling={is_rolling} round {number}: {found[-1]:,.0f}", file=sys.stderr)
        faster = statistics.median(b / a for a, b in zip(rates[False][1:], rates[True][1:], strict=True))
        for is_rolling, (_, *found) in rates.items():
            name, gain = ("rolling", f"{faster:.2f} ×") if is_rolling else ("together", "")
            span = f"{min(found):,.0f} to {max(found):,.0f}"
            print(f"| {shape} | {kind} | {name} | {statistics.median(found):,.0f} | {span} | {gain} |", flush=True)


def conversations(
    args: argparse.Namespace, parts: tuple[Any, Any], shape: Shape, kind: str, seed: int, is_rolling: bool
) -> float:
    """Tokens per second; the lengths of all answers are known before."""
    from vlmrl.inference.embedded.engine import EmbeddedEngine
    from vlmrl.types import SamplingParams

    policy, renderer = parts
    prompts = prompts_of(args, policy, renderer, shape, seed)
    asked = [prompt for prompt in prompts for _ in range(shape.siblings)]
    draw, size = np.random.default_rng(seed), (len(asked), TURNS)
    median = max(1, shape.new // 8)
    if kind == "even":
        lengths = draw.integers(median, shape.new + 1, size)
    else:
        lengths = draw.lognormal(np.log(median), 1.0, size).astype(np.int64).clip(1, shape.new)

    async def one(session: Any, prompt: Any, number: int) -> None:
        random = np.random.default_rng((seed, number))
        async with session:
            for turn, new in enumerate(lengths[number].tolist()):
                sampling = SamplingParams(new, 1.0, (), (), (seed * 1_000_000 + number) * TURNS + turn)
                said = await session.generate(prompt, sampling)
                reply = random.integers(10, len(policy.banned) // 2, REPLY)
                prompt = replace(prompt, token_ids=np.concatenate([prompt.token_ids, said.token_ids, reply]))

    async def everything() -> None:
        engine = EmbeddedEngine(policy, lambda: 0, 1 << 20, is_rolling=is_rolling)
        sessions = [engine.session(str(number)) for number in range(len(asked))]
        pairs = enumerate(zip(sessions, asked, strict=True))
        await asyncio.gather(*(one(session, prompt, number) for number, (session, prompt) in pairs))
        await engine.stop()

    with decoder(fast=True):
        started = time.perf_counter()
        asyncio.run(everything())
        return float(lengths.sum()) / (time.perf_counter() - started)


def equal(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """The share of equal completions."""
    print("\n| shape | number format | equal completions | equal tokens |\n|---|---|---|---|", flush=True)
    for dtype in dict.fromkeys((args.dtype, "float32")):
        parts = made(args, dtype)
        for whole in shapes:
            shape = replace(whole, new=min(whole.new, args.compare_tokens))
            found = []
            for fast in (True, False):
                with decoder(fast=fast):
                    found.append([said.token_ids for _, said in sampled(args, parts, shape, 1)[0]])
            alike = [int(np.logical_and.accumulate(a == b).sum()) for a, b in zip(*found, strict=True)]
            completions, tokens = np.mean(np.array(alike) == shape.new), np.sum(alike) / (len(alike) * shape.new)
            print(f"| {shape} | {dtype} | {completions:.1%} | {tokens:.1%} |", flush=True)
        free(parts[0])


def free(policy: Any) -> None:
    import torch

    policy.model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mismatch(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """mismatch_kl of sampler against trainer."""
    import torch
    from mismatch import as_sample

    from vlmrl.config.algorithm import AlgorithmConfig
    from vlmrl.config.trainer import Packing, TrainerConfig
    from vlmrl.models.blocks import compile_blocks
    from vlmrl.trainer.objective import mismatch_kl
    from vlmrl.trainer.trainer import LocalTrainer

    print(
        "\n| shape | number format | logits × | mismatch_kl/mean | mean difference | trainer, other packing "
        "| mean −logprob | tokens |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    dtype = "float16" if args.device == "cuda" else "float32"
    parts = made(args, dtype)
    if args.device == "cuda":
        compile_blocks(parts[0].model)  # as runs do
    config = TrainerConfig(learning_rate=1e-6, micro_batch_tokens=8192)

    def trainer(packing: Packing) -> LocalTrainer:
        packed = replace(config, packing=packing)
        return LocalTrainer(parts[0], packed, AlgorithmConfig(), temperature=1.0, max_new_tokens=args.compare_tokens)

    def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
        return float(mismatch_kl(theirs, ours)[0]) / len(ours)

    tree, other = trainer(Packing.tree), trainer(Packing.varlen)
    for whole in shapes:
        shape = replace(whole, new=min(whole.new, args.compare_tokens))
        with decoder(fast=True):
            pairs, _ = sampled(args, parts, shape, 1)
        samples = [as_sample(number, *pair) for number, pair in enumerate(pairs)]
        ours = torch.from_numpy(np.concatenate([said.logprobs for _, said in pairs]))
        theirs, others = (torch.from_numpy(np.concatenate(each.logprobs(samples))) for each in (tree, other))
        difference = float((theirs - ours).abs().mean())
        print(
            f"| {shape} | {dtype} | {args.logit_scale:g} | {divergence(theirs, ours):.2e} | {difference:.2e} "
            f"| {divergence(theirs, others):.2e} | {-float(ours.mean()):.2f} | {len(ours)} |",
            flush=True,
        )


def profile(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """A table of kernels, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    parts, on_gpu = made(args, args.dtype), args.device == "cuda"
    with decoder(fast=True):
        sampled(args, parts, shapes[0], 1)
        with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            sampled(args, parts, shapes[0], 2)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print("\n" + found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70), flush=True)


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────


def exact(args: argparse.Namespace, shapes: Sequence[Shape]) -> None:
    """Attention of two groups against one softmax in float64, in units of the output's root mean square."""
    import torch

    print("\n| shape | number format | largest error |\n|---|---|---|", flush=True)
    formats = (torch.bfloat16, torch.float16, torch.float32) if args.device == "cuda" else (torch.float32,)
    for shape in shapes:
        for dtype in formats:
            worst = max(error(args, shape, new, dtype) for new in (1, max(1, shape.new // 3), shape.new))
            print(f"| {shape} | {str(dtype).removeprefix('torch.')} | {worst:.1e} |", flush=True)


def error(args: argparse.Namespace, shape: Shape, new: int, dtype: Any) -> float:
    """The largest error with `new` tokens in each own part."""
    import torch

    from vlmrl.models.attention.decode import DecodeRows, DecodeTables, attend_decode

    size, groups = SIZES[args.size], min(2, shape.groups)
    rows, shared = groups * shape.siblings, groups * shape.prompt
    make: dict[str, Any] = {"device": args.device, "dtype": torch.int32}
    slots = torch.randperm(shared + rows * new, device=args.device, dtype=torch.int32)
    own = slots[shared:].view(rows, new)
    segments = [
        [group * shape.siblings, (group + 1) * shape.siblings, group * shape.prompt, shape.prompt, 0, 0]
        for group in range(groups)
    ]
    tables = DecodeTables(
        own_slots=own,
        own_length=torch.full((rows,), new, **make),
        depth=torch.full((rows,), shape.prompt + new - 1, **make),
        segment_slots=slots[:shared],
        segments=torch.tensor(segments, **make),
        levels=1,
        most_rows=shape.siblings,
        most_keys=shape.prompt,
    )
    d, share = size.head_size, size.heads // size.kv_heads
    query = torch.randn(size.heads, rows, d, device=args.device, dtype=dtype)
    key, value = (torch.randn(size.kv_heads, len(slots), d, device=args.device, dtype=dtype) for _ in range(2))
    newest = own[:, -1].long()
    written = key[:, newest], value[:, newest]
    found = attend_decode(query, written, (key, value), newest, DecodeRows(tables, None), d**-0.5).double()
    worst, squares = 0.0, 0.0
    for row in range(rows):
        group = row // shape.siblings
        path = torch.cat([slots[group * shape.prompt : (group + 1) * shape.prompt], own[row]]).long()
        keys, values = (x[:, path].double().repeat_interleave(share, 0) for x in (key, value))
        weights = torch.softmax(torch.einsum("hd,hnd->hn", query[:, row].double(), keys) * d**-0.5, -1)
        wanted = torch.einsum("hn,hnd->hd", weights, values)
        worst = max(worst, float((found[row] - wanted).abs().max()))
        squares += float(wanted.square().mean()) / rows
    return float(worst / squares**0.5)


# ── the start ───────────────────────────────────────────────────────────────────────────────────────────────


def start(args: argparse.Namespace) -> None:
    """Seconds to the first rollout, of a first run and of one that finds its compiled code."""
    chosen = (
        ("model=qwen3vl_tiny", "+task.args.side=64", "model.device=cpu")
        if args.size == "tiny"
        else ("model=qwen3vl", f"model/size={args.size}", "model.init=random", "+task.args.side=448")
    )
    print("\n| run | seconds to the first rollout |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in ("first", "second")[: args.starts]:
            touched = Path(folder, number)
            environment = os.environ | {
                FIRST: str(touched),
                "PYTHONPATH": os.pathsep.join(
                    [str(REPOSITORY / "benchmarks"), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
            }
            command = [sys.executable, "-m", "vlmrl", *START, *chosen, f"hydra.run.dir={folder}/run_{number}"]
            started = time.perf_counter()
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
                while not touched.exists() and run.poll() is None:
                    time.sleep(0.05)
                seconds = time.perf_counter() - started
                if touched.exists():
                    run.kill()  # the rest of the step would compile the trainer
                _, errors = run.communicate()
            if not touched.exists():
                raise SystemExit(errors.decode())
            print(f"| {number} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="16x16x1043x512,32x8x256x512,256x1x1043x512,51x5x777x512")
    parser.add_argument("--parts", default="exact,rate,equal,mismatch,start")
    parser.add_argument("--size", default="2b", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--logit-scale", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare-tokens", type=int, default=64)
    parser.add_argument("--image-side", type=int, default=0, help="pixels; 0 for prompts of text")
    parser.add_argument("--images", type=int, default=1, help="per prompt, with --image-side")
    parser.add_argument("--frames", type=int, default=0, help="of one video per prompt in place of the images")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--family", default="", help="of large_family.py; default: Qwen3-VL")
    parser.add_argument("--decoders", default="embedded", help="of embedded, reference; for the part rate")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    shapes, parts = [Shape.of(each) for each in args.shapes.split(",")], args.parts.split(",")
    if "offline" in parts:  # first, because vLLM takes its share of an empty GPU
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "shared_prefix.py"), "--only-offline"]
        print("| shape | side | tokens/s | of three rounds |\n|---|---|---|---|", flush=True)
        subprocess.run([*command, "--offline", str(args.checkpoint), "--shapes", args.shapes], check=True)
    of_name = {"exact": exact, "rate": rate, "turns": turns, "equal": equal, "mismatch": mismatch, "profile": profile}
    for name, part in of_name.items():
        if name in parts:
            part(args, shapes)
    if "start" in parts:
        start(args)


if __name__ == "__main__":
    main()
