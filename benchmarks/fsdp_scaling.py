"""Tokens trained per second by one GPU and by several, with the same batch per GPU: how much of each GPU is left.

    torchrun --nproc-per-node=2 benchmarks/fsdp_scaling.py [--size 2b] [--shape image] [--rows alone,full,none]
    torchrun --nproc-per-node=2 benchmarks/fsdp_scaling.py --size tiny --device cpu      rehearsal: figures mean nothing

A step is the product's own `train_step`: the batch divided and sent to the ranks, packing, forward, backward, gradients
summed, clipping, AdamW over float32 weights; bf16 on a GPU. Rows:

    alone       one GPU, the others idle
    full        all of them, weights, gradients and averages in slices (trainer.sharding=full, FSDP2)
    optimizer   all of them, what learns and its averages in slices, weights and sums of gradients whole through the
                micro-batches of a step (trainer.sharding=optimizer)
    none        all of them, each with the whole model (trainer.sharding=none)

With N GPUs the batch has N times the groups. `efficiency` is computed rows per second over N times those of `alone`;
`gathered` the seconds for rank 0 to have every tensor whole, as a weight sync asks for them.
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

import torch
from training_batches import SHAPES, make_batch, model_config, policy_of

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.trainer import Sharding, TrainerConfig
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.policy import Policy
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment, joined_group
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.every_rank import on_own_device
from vlmrl.trainer.commands import Follower
from vlmrl.trainer.learner import Learner
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample

HEAD = "| row | GPUs | s/step | computed rows/s | rollout tokens/s | efficiency | peak GiB | gathered s | loss | grad |"
SAMPLING: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 1024}


@dataclass(frozen=True)
class Settings:
    """What every rank must know."""

    size: str
    device: str
    compiled: bool
    recomputed: bool
    config: TrainerConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2b", help="tiny, 2b, 4b, 8b")
    parser.add_argument("--shape", default="image", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="alone,full,optimizer,none")
    parser.add_argument("--device", default="auto", help="auto or cpu")
    parser.add_argument("--groups", type=int, default=0, help="of 16 rollouts, per GPU; 0: the shape's own")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after two that are not; the median counts")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    arguments = parser.parse_args()
    torch.set_num_threads(8 if torch.cuda.is_available() and arguments.device != "cpu" else 1)
    with init_from_environment() as group:
        if group is not None and group.rank > 0:
            return follow(group, Follower())
        Bench(arguments, group).run()
    return 0


def policy_here(settings: Settings) -> tuple[Policy, Renderer]:
    """On this rank's device; whatever was there before is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    config = model_config(settings.size, Dtype.bfloat16 if on_gpu else Dtype.float32, settings.device)
    policy, renderer = policy_of(on_own_device(config, joined_group()))
    prepare_blocks(policy.model, compiled=settings.compiled, recomputed=settings.recomputed)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    return policy, renderer


@dataclass(frozen=True)
class BuildLearner(Command[Follower, None]):
    """Build the learner of a rank other than 0."""

    settings: Settings

    def run(self, worker: Follower) -> None:
        worker.build(self._learner)

    def _learner(self) -> Learner:
        group = joined_group()
        assert group is not None
        policy, _ = policy_here(self.settings)
        return Learner(policy, self.settings.config, AlgorithmConfig(), **SAMPLING, ranks=group.size)


class Bench:
    def __init__(self, arguments: argparse.Namespace, group: RankGroup | None) -> None:
        self.arguments = arguments
        self.group = group
        self.gpus = 1 if group is None else group.size
        self.alone = 0.0
        """Computed rows per second."""

    def run(self) -> None:
        on_gpu = self.arguments.device != "cpu" and torch.cuda.is_available()
        name = torch.cuda.get_device_name(0) if on_gpu else platform.machine()
        print(
            f"{' '.join(sys.argv)}\n{self.gpus} × {name}, torch {torch.__version__}, {self.arguments.size}, "
            f"{self.arguments.shape}, micro-batches of {self.arguments.micro_batch_tokens} tokens\n\n{HEAD}\n"
            f"|{'---|' * (HEAD.count('|') - 1)}",
            flush=True,
        )
        for row in self.arguments.rows.split(","):
            if row == "alone":
                self.row(row, Sharding.none, None)
            elif self.group is not None:
                self.row(row, Sharding(row), self.group)

    def row(self, name: str, sharding: Sharding, group: RankGroup | None) -> None:
        settings = Settings(
            size=self.arguments.size,
            device=self.arguments.device,
            compiled=not self.arguments.no_compile and self.arguments.device != "cpu",
            recomputed=self.arguments.recompute,
            config=TrainerConfig(
                learning_rate=1e-6, micro_batch_tokens=self.arguments.micro_batch_tokens, sharding=sharding
            ),
        )
        gpus = 1 if group is None else group.size
        policy, renderer = policy_here(settings)
        shape = SHAPES[self.arguments.shape]
        shape = replace(shape, groups=gpus * (self.arguments.groups or shape.groups))
        if self.arguments.size == "tiny":
            shape = replace(shape, side=min(shape.side, 64), new_tokens=min(shape.new_tokens, 12))
        samples = make_batch(shape, renderer, policy.config.text_config.vocab_size)

        def own() -> LocalTrainer:
            return LocalTrainer(policy, settings.config, AlgorithmConfig(), **SAMPLING, rank_group=group)

        trainer = own() if group is None else group.together([BuildLearner(settings)] * (gpus - 1), own)[0]
        print(f"| {name} | {gpus} | {self.measure(trainer, samples, gpus)}", flush=True)

    def measure(self, trainer: LocalTrainer, samples: Sequence[TrainingSample], gpus: int) -> str:
        seconds = []
        for _ in range(self.arguments.steps + 2):
            began = time.perf_counter()
            figures = trainer.train_step(list(samples)).metrics  # reads the gradient's norm: the device is done
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[2:])
        began = time.perf_counter()
        weights = trainer.weights()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        gathered = time.perf_counter() - began
        weights.clear()
        rows = figures["tokens/packed"] / median
        self.alone = self.alone or rows / gpus
        return (
            f"{median:.3f} | {rows:.0f} | {figures['tokens/trained'] / median:.0f} | {rows / gpus / self.alone:.1%} "
            f"| {figures['memory/peak_bytes'] / 2**30:.1f} | {gathered:.2f} | {figures['loss']:.5f} "
            f"| {figures['grad_norm']:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
