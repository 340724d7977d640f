"""What a second model costs, next to the training step that it scores for: with a reference of the policy's size and
with a teacher of twice the size, each with and without its most likely tokens (`algorithm.distill.top_k`).

    python benchmarks/references.py [--sizes 2b] [--shapes codeword,image,images] [--top-k 32]       one GPU
    python benchmarks/references.py --sizes tiny,small --device cpu                                  one CPU core
    python benchmarks/references.py --sizes tiny --device cpu --shapes codeword --steps 1 --groups 1     rehearsal

`reference` is the time in which the reference scores a batch (most of a run's `time/reference`), `train` that of the
whole training step on it: packing, forward, backward, optimizer (`time/train`). Both are calls of the trainer itself,
in turns, so a share compares times of one machine and one minute. Shares are medians over the steps; the first step,
which compiles, does not count. Both models have random weights at the real shapes, and all of the policy learns.

The teacher of 2b is 4b; that of tiny and small has twice the layers.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from training_batches import SHAPES, make_batch, model_config, policy_of

from vlmrl.config.algorithm import AlgorithmConfig, DistillConfig, KLConfig
from vlmrl.config.model import Dtype, ModelConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.policy import Policy
from vlmrl.trainer.reference import FrozenCopy
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample

TEACHERS = {"tiny": "tiny", "small": "small", "2b": "4b", "4b": "8b"}
"""Size of the policy → that of a teacher of about twice the parameters; the first two get twice the layers."""

HEAD = "| size | shape | second model | parameters | top k | reference s | train s | reference / train | peak GiB |"


@dataclass(frozen=True)
class Row:
    """One second model."""

    name: str
    teaches: bool
    top_k: int


def sized(size: str, device: str, *, twice: bool = False) -> ModelConfig:
    """A model's config. `small` is between `tiny`, whose steps are mostly Python, and what a GPU is for."""
    dtype = Dtype.bfloat16 if device == "cuda" else Dtype.float32
    config = model_config("tiny" if size == "small" else TEACHERS[size] if twice else size, dtype, device)
    assert config.size is not None
    text: dict[str, Any] = dict(config.size.text)
    if size == "small":
        text.update(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=8000)
    if twice and TEACHERS[size] == size:
        text["num_hidden_layers"] *= 2
    vision = {**config.size.vision, "out_hidden_size": text["hidden_size"]}
    return replace(config, size=replace(config.size, text=text, vision=vision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2b")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--groups", type=int, default=0, help="instead of the shape's own")
    arguments = parser.parse_args()
    torch.set_num_threads(8 if arguments.device == "cuda" else 1)
    name = torch.cuda.get_device_name(0) if arguments.device == "cuda" else platform.machine()
    print(
        f"python {' '.join(sys.argv)}\n{name}, torch {torch.__version__}, micro-batches of "
        f"{arguments.micro_batch_tokens} tokens, groups of 16, {arguments.steps} steps\n\n{HEAD}\n"
        f"|{'---|' * (HEAD.count('|') - 1)}",
        flush=True,
    )
    for size in arguments.sizes.split(","):
        measure_size(size, arguments)


def measure_size(size: str, arguments: argparse.Namespace) -> None:
    policy, renderer = built(sized(size, arguments.device))
    for shape_name in arguments.shapes.split(","):
        shape = SHAPES[shape_name]
        shape = replace(shape, groups=arguments.groups or max(1, shape.groups // 2))
        if arguments.device == "cpu":
            shape = replace(shape, side=min(shape.side, 128), new_tokens=min(shape.new_tokens, 48))
        samples = make_batch(shape, renderer, policy.config.text_config.vocab_size)
        for teaches in (False, True):
            second = built(sized(size, arguments.device, twice=teaches))[0]
            for top_k in (0, arguments.top_k):
                row = Row("twice the size" if teaches else "the policy's size", teaches, top_k)
                print(f"| {size} | {shape_name} {measured(row, policy, second, samples, arguments)}", flush=True)
            del second
            emptied()


def built(config: ModelConfig) -> tuple[Policy, Any]:
    policy, renderer = policy_of(config)
    prepare_blocks(policy.model, compiled=config.device == "cuda", recomputed=False)
    return policy, renderer


def measured(
    row: Row, policy: Policy, second: Policy, samples: Sequence[TrainingSample], arguments: argparse.Namespace
) -> str:
    """The rest of a row of the table."""
    emptied()
    try:
        return timed(row, policy, second, samples, arguments)
    except torch.OutOfMemoryError:
        return f"| {row.name} | | {row.top_k} | out of memory | | | |"
    finally:
        policy.model.requires_grad_(True)
        policy.model.zero_grad(set_to_none=True)
        for parameter in policy.model.parameters():  # a trainer's hooks would take the gradients of the next one
            (parameter._post_accumulate_grad_hooks or {}).clear()


def timed(
    row: Row, policy: Policy, second: Policy, samples: Sequence[TrainingSample], arguments: argparse.Namespace
) -> str:
    distill = DistillConfig(top_k=row.top_k, weight=1.0 if row.top_k else 0.0)
    trainer = LocalTrainer(
        policy,
        TrainerConfig(max_steps=100, learning_rate=1e-6, micro_batch_tokens=arguments.micro_batch_tokens),
        AlgorithmConfig(kl=KLConfig(loss=0.05), distill=distill),
        temperature=1.0,
        max_new_tokens=1024,
        reference=FrozenCopy(second, offload=False),
    )
    times: list[tuple[float, float]] = []
    for _ in range(arguments.steps + 1):
        began = now(policy.device)
        scored = [with_scores(*each) for each in zip(samples, trainer.reference_scores(samples), strict=True)]
        scored_at = now(policy.device)
        trainer.train_step(scored)
        times.append((scored_at - began, now(policy.device) - scored_at))
    reference, train, share = (
        statistics.median(values)
        for values in zip(*((scoring, training, scoring / training) for scoring, training in times[1:]), strict=True)
    )
    peak = torch.cuda.max_memory_allocated() / 2**30 if policy.device.type == "cuda" else 0.0
    parameters = sum(p.numel() for p in second.model.parameters()) / 1e6
    return (
        f"| {row.name} | {parameters:.1f} M | {row.top_k} | {reference:.3f} | {train:.3f} | {share:.2f} | {peak:.1f} |"
    )


def with_scores(sample: TrainingSample, scores: Any) -> TrainingSample:
    """What the loop makes of a sample and the reference's scores."""
    whole = np.zeros(len(sample.token_ids), np.float32)
    whole[sample.loss_mask] = scores.logprobs
    return replace(sample, reference_logprobs=whole, reference_top=scores.top)


def now(device: torch.device) -> float:
    """Seconds. Without a GPU, those that the process has computed on its one core, so that nothing else counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def emptied() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
