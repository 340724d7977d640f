"""Seconds per training step on one GPU: TRL's GRPOTrainer against vlmrl, the same batch, the same weights.

    python benchmarks/trl_gpu.py [--size 2b] [--shapes image,images] [--trl-micro-batches 8,16]
    python benchmarks/trl_gpu.py --size tiny --device cpu                  rehearsal: the numbers mean nothing

TRL and datasets must be importable beside vlmrl (trl==1.16.0, datasets==5.2.0, dill==0.4.1, multiprocess==0.70.19; the
rest of what they need comes with torch, transformers, accelerate, pandas and pyarrow).

A step is everything from finished rollouts to changed weights: forward, backward, gradient norm, AdamW, and on our side
packing. Rollouts are made beforehand and handed to both sides (training_batches.py: random weights, random answers;
TRL's are handed over where it would generate them); each side runs in a process of its own. bf16 on both; TRL keeps
weights and AdamW's averages in bf16, vlmrl in float32. Neither recomputes activations, TRL its default loss head and
sdpa attention, micro-batches of each size that is named; a size that does not fit says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from training_batches import SHAPES, Shape, make_batch, model_config, policy_of

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.trainer import TrainerConfig
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.checkpoints.load import load_tokenizer, resolve_checkpoint
from vlmrl.trainer.trainer import LocalTrainer

WARMUP_STEPS = 2
"""First steps of a process that are not counted: kernels are compiled, allocators fill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2b")
    parser.add_argument("--shapes", default="image,images")
    parser.add_argument("--trl-micro-batches", default="8,16", help="samples per forward of TRL")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="of vlmrl")
    parser.add_argument("--steps", type=int, default=5, help=f"per process, {WARMUP_STEPS} of them not counted")
    parser.add_argument("--groups", type=int, default=2, help="of 16 rollouts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="vlmrl without compiled layers")
    parser.add_argument("--side", help="what one process does; see `sides`")
    arguments = parser.parse_args()
    if arguments.side:
        name, _, size = arguments.side.partition(":")
        print(json.dumps(vlmrl(arguments) if name == "vlmrl" else trl(arguments, int(size))))
        return
    print(f"python {' '.join(sys.argv)}\ntorch {torch.__version__}, {arguments.groups} groups of 16\n")
    print("| shape | side | s/step, median | min – max | peak GiB |\n|---|---|---|---|---|", flush=True)
    for shape in arguments.shapes.split(","):
        medians = {}
        for side in ("vlmrl", *(f"trl:{size}" for size in arguments.trl_micro_batches.split(","))):
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--shapes", shape, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode != 0 or not lines:
                reason = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
                print(f"| {shape} | {side} | {reason[:200]} | | |", flush=True)
                continue
            result = json.loads(lines[-1])
            seconds = result["seconds"][WARMUP_STEPS:]
            medians[side] = statistics.median(seconds)
            print(
                f"| {shape} | {side} | {medians[side]:.3f} | {min(seconds):.3f} – {max(seconds):.3f} "
                f"| {result['peak']:.1f} |",
                flush=True,
            )
        best = min((seconds for side, seconds in medians.items() if side != "vlmrl"), default=0.0)
        if best and "vlmrl" in medians:
            print(f"\n{shape}: {best / medians['vlmrl']:.1f} times faster than TRL's fastest\n", flush=True)


def shape_of(arguments: argparse.Namespace) -> Shape:
    shape = replace(SHAPES[arguments.shapes], groups=arguments.groups)
    assert shape.new_tokens > 0, "one turn: a prompt, an answer"
    if arguments.size == "tiny":
        shape = replace(shape, side=64, new_tokens=12)
    return shape


def vlmrl(arguments: argparse.Namespace) -> dict[str, Any]:
    """`LocalTrainer.train_step`, which is what a run calls."""
    gpu = arguments.device == "cuda"
    config = model_config(arguments.size, Dtype.bfloat16 if gpu else Dtype.float32, arguments.device)
    policy, renderer = policy_of(config)
    prepare_blocks(policy.model, compiled=gpu and not arguments.eager, recomputed=False)
    samples = make_batch(shape_of(arguments), renderer, policy.config.text_config.vocab_size)
    settings = TrainerConfig(learning_rate=1e-6, micro_batch_tokens=arguments.micro_batch_tokens)
    trainer = LocalTrainer(policy, settings, AlgorithmConfig(), temperature=1.0, max_new_tokens=1024)
    seconds: list[float] = []
    for _ in range(arguments.steps):
        with clock(arguments.device, seconds):
            trainer.train_step(samples)
    return {"seconds": seconds, "peak": peak(arguments.device)}


def trl(arguments: argparse.Namespace, micro_batch: int) -> dict[str, Any]:
    """GRPOTrainer.train, with rollouts that are there already."""
    from datasets import IterableDataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    gpu = arguments.device == "cuda"
    config = model_config(arguments.size, Dtype.bfloat16 if gpu else Dtype.float32, arguments.device)
    policy, renderer = policy_of(config)
    samples = make_batch(shape_of(arguments), renderer, policy.config.text_config.vocab_size)
    model = policy.model
    for each in (model.config.text_config, model.config.vision_config):
        each._attn_implementation = "sdpa"
    rollouts = as_trl_has_them(samples, model.device)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        """From the start of a step's first micro-batch to the end of its optimizer step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(arguments.device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(arguments.device)
            seconds.append(time.perf_counter() - self.began)

    class Prepared(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return dict(rollouts)

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=not gpu,
            bf16=gpu,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=max(1, len(samples) // micro_batch),
            num_generations=16,
            max_completion_length=shape_of(arguments).new_tokens,
            max_steps=arguments.steps,
            beta=0.0,
            loss_type="dapo",
            learning_rate=1e-6,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Prepared(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "x"}] * 4096)),
            processing_class=load_tokenizer(resolve_checkpoint(config, ("x",))),
            callbacks=[Clock()],
        )
        trainer.train()
    return {"seconds": seconds, "peak": peak(arguments.device)}


def as_trl_has_them(samples: list[Any], device: torch.device) -> dict[str, Any]:
    """What `_generate_and_score_completions` returns. All prompts are of one length here, and so are all answers."""
    starts = {int(np.flatnonzero(sample.loss_mask)[0]) for sample in samples}
    (start,) = starts
    ids = torch.from_numpy(np.stack([sample.token_ids for sample in samples])).to(device)
    types = torch.from_numpy(np.stack([sample.mm_token_type_ids for sample in samples])).to(device)
    pixels = {
        name: torch.from_numpy(np.concatenate([i.mm_kwargs[name] for sample in samples for i in sample.images]))
        for name in samples[0].images[0].mm_kwargs
    }
    return {
        "prompt_ids": ids[:, :start],
        "prompt_mask": torch.ones_like(ids[:, :start]),
        "completion_ids": ids[:, start:],
        "completion_mask": torch.ones_like(ids[:, start:]),
        "advantages": torch.tensor([float(sample.advantages[start]) for sample in samples], device=device),
        "num_items_in_batch": torch.tensor(ids[:, start:].numel(), device=device),
        "mm_token_type_ids": types,
        "num_images": [len(sample.images) for sample in samples],
        **{name: value.to(device) for name, value in pixels.items()},
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def clock(device: str, seconds: list[float]) -> Iterator[None]:
    synchronize(device)
    began = time.perf_counter()
    yield
    synchronize(device)
    seconds.append(time.perf_counter() - began)


def peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


if __name__ == "__main__":
    main()
