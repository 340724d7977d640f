"""Does torch compile again in the middle of a run, and what does it cost to prevent it? Steps of changing shapes.

    python benchmarks/recompiles.py [--size 2b] [--steps 60] [--rows as_is,mixed_order]
    python benchmarks/recompiles.py --size tiny --device cpu --steps 4      rehearsal: the numbers mean nothing

A step is forward and backward over a batch in micro-batches, as in train_throughput.py. Its groups (1 to 4 of 1, 5 or
16 siblings) have none, one or several images of different sizes and answers of 1 to 256 tokens. After these steps one
batch of the shape `image` is repeated, which shows what a row's choices cost. Rows:

    as_is          as the trainer compiles (vlmrl/models/compiling.py)
    mixed_order    with torch's reductions in mixed order, whose choice depends on the number of rows

`compiled` counts what torch compiled in a step. On a CPU the functions of the head are not compiled, and layers are
traced without making code.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._dynamo.callback import CallbackArgs, callback_handler
from train_throughput import packed_step
from training_batches import SHAPES, Shape, make_batch, model_config, policy_of

from vlmrl.config.model import Dtype
from vlmrl.config.trainer import Packing
from vlmrl.models import compiling
from vlmrl.models.blocks import compile_blocks
from vlmrl.models.policy import Policy
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import TrainingSample

ROWS = ("as_is", "mixed_order")
STEPS_TO_COMPILE = 3
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    is_gpu = arguments.device == "cuda"
    torch.set_num_threads(8 if is_gpu else 1)
    name = torch.cuda.get_device_name(0) if is_gpu else platform.machine()
    print(f"python {' '.join(sys.argv)}\n{name}, torch {torch.__version__}\n", flush=True)
    print("| row | step | samples | micro-batches | rows | compiled | s |\n|---|---|---|---|---|---|---|", flush=True)
    summaries = [measure(row, arguments, is_gpu=is_gpu) for row in arguments.rows.split(",")]
    print(
        f"\n| row | compiled in the first {STEPS_TO_COMPILE} steps | later | slowest later step, s | `image`, s/step |"
    )
    print("|---|---|---|---|---|\n" + "\n".join(summaries))


def measure(row: str, arguments: argparse.Namespace, *, is_gpu: bool) -> str:
    """The line of a row in the last table."""
    torch.compiler.reset()
    with settings(row, is_gpu=is_gpu):
        config = model_config(arguments.size, Dtype.bfloat16 if is_gpu else Dtype.float32, arguments.device)
        policy, renderer = policy_of(config)
        compile_blocks(policy.model)
        counts, seconds = [], []
        with counted() as compiled:
            for step in range(arguments.steps):
                before = len(compiled)
                samples = batch_of(step, arguments.size, policy, renderer)
                done, took = timed(policy, samples, arguments.micro_batch_tokens, is_gpu=is_gpu)
                counts.append(len(compiled) - before)
                seconds.append(took)
                cells = (row, step, len(samples), done.micro_batches, done.work.rows, counts[-1], f"{took:.2f}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
        large = make_batch(shaped(SHAPES["image"], arguments.size), renderer, vocabulary(policy))
        repeated = [timed(policy, large, arguments.micro_batch_tokens, is_gpu=is_gpu)[1] for _ in range(REPEATS + 1)]
    late = seconds[STEPS_TO_COMPILE:] or [0.0]
    median = statistics.median(repeated[1:])
    compiled_late = sum(counts[STEPS_TO_COMPILE:])
    return f"| {row} | {sum(counts[:STEPS_TO_COMPILE])} | {compiled_late} | {max(late):.2f} | {median:.3f} |"


@contextmanager
def settings(row: str, *, is_gpu: bool) -> Iterator[None]:
    """Compile as the row says; on a CPU only trace."""
    before = compiling.COMPILER, compiling._compiled
    if row == "mixed_order":
        compiling.COMPILER = {}
    if not is_gpu:
        compiling.COMPILER = {"backend": "eager"}
    compiling._compiled = cache(compiling.for_all_sizes)
    try:
        yield
    finally:
        compiling.COMPILER, compiling._compiled = before


@contextmanager
def counted() -> Iterator[list[str]]:
    """The ids of all that torch compiles in the block, as it goes."""
    found: list[str] = []

    def note(started: CallbackArgs) -> None:
        found.append(started.compile_id)

    callback_handler.register_start_callback(note)
    try:
        yield found
    finally:
        callback_handler.remove_start_callback(note)


def batch_of(step: int, size: str, policy: Policy, renderer: Renderer) -> list[TrainingSample]:
    draw = random.Random(step)
    samples: list[TrainingSample] = []
    for _ in range(draw.choice([1, 2, 4])):
        shape = Shape(
            images=draw.choice([0, 1, 1, 3]),
            side=draw.choice([64, 448, 777, 1024]),
            new_tokens=draw.choice([1, 2, 50, 256]),
            groups=1,
        )
        made = make_batch(shaped(shape, size), renderer, vocabulary(policy), draw.choice([1, 5, 16]))
        samples += [replace(sample, rollout_id=f"{len(samples)}/{i}") for i, sample in enumerate(made)]
    return samples


def shaped(shape: Shape, size: str) -> Shape:
    """Small numbers for a rehearsal."""
    if size != "tiny":
        return shape
    return replace(shape, side=min(shape.side, 64), new_tokens=min(shape.new_tokens, 12), groups=1)


def vocabulary(policy: Policy) -> int:
    size: int = policy.config.text_config.vocab_size
    return size


def timed(policy: Policy, samples: Sequence[TrainingSample], budget: int, *, is_gpu: bool) -> tuple[Any, float]:
    policy.model.zero_grad(set_to_none=True)
    if is_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    done = packed_step(policy, samples, Packing.tree, policy.kernel(shared=True), budget)
    if is_gpu:
        torch.cuda.synchronize()
    return done, time.perf_counter() - began


if __name__ == "__main__":
    main()
