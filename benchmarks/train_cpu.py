"""Rollout tokens trained per second on a CPU: tree packing against a padded batch of the same samples, in one run.

    python benchmarks/train_cpu.py [--rounds 5]

The samples are those of the default run (color_codeword, the tiny Qwen3-VL, one step's groups and siblings), sampled by
the embedded engine from the weights after the default warm-up. A step is forward and backward over all of them, packing
included, the optimizer left out. The sides take turns, so that a busy neighbour hits both; the ratio is that of the
medians.

    tree, varlen   the product's own
    padded         one batch, rows padded to the longest, every sample with its own images, through transformers' own
                   forward, sdpa attention and logits from the first sampled token on
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from train_throughput import Step, attention, packed_step, padded_step

from vlmrl.cli.recipe import RECIPE
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF
from vlmrl.config.orchestrator import OrchestratorConfig
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.policy import Policy
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.advantages import assign_advantages
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.orchestrator.supervised import demonstrate
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import Run, build_run
from vlmrl.types import Group, TrainingSample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that the sides take turns")
    parser.add_argument("--warmup-steps", type=int, default=100, help="supervised steps before the batch is sampled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policy, samples = default_batch(folder, arguments.warmup_steps)
        print(
            f"python {' '.join(sys.argv)}\n{platform.machine()}, {os.cpu_count()} cores, one torch thread, torch "
            f"{torch.__version__}; {len(samples)} samples of {min(len(s.token_ids) for s in samples)} to "
            f"{max(len(s.token_ids) for s in samples)} tokens\n"
        )
        compare(policy, samples, arguments.rounds)


def compare(policy: Policy, samples: list[TrainingSample], rounds: int) -> None:
    budget = 10**9  # each side in one piece, which is the fastest here

    def side(name: str) -> Step:
        if name == "padded":
            with attention(policy, own=True):
                return padded_step(policy, samples, budget)
        return packed_step(policy, samples, Packing[name], Kernel.blocks, budget)

    seconds: dict[str, list[float]] = {"tree": [], "varlen": [], "padded": []}
    done: dict[str, Step] = {}
    for number in range(rounds + 1):
        for name, found in seconds.items():
            policy.model.zero_grad()
            began = time.perf_counter()
            done[name] = side(name)
            if number:  # the first round fills caches
                found.append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(
        "| packing | s/step, median | min – max | rollout tokens/s | computed rows | loss |\n|---|---|---|---|---|---|"
    )
    for name, step in done.items():
        print(
            f"| {name} | {medians[name]:.4f} | {min(seconds[name]):.4f} – {max(seconds[name]):.4f} "
            f"| {step.tokens / medians[name]:.0f} | {step.work.rows} | {step.loss:.6f} |"
        )
    for name in ("varlen", "padded"):
        print(f"\ntree is {medians[name] / medians['tree']:.2f} times as fast as {name}")


def default_batch(folder: str, warmup_steps: int) -> tuple[Policy, list[TrainingSample]]:
    """The policy after the warm-up and the samples of the first step."""
    config = default_config(folder, warmup_steps)
    run_dir = RunDir(config.output_dir)
    run_dir.create(resume=False)
    credit = config.algorithm.credit
    with Monitor(config.monitor, run_dir, total_steps=1, exact=True, credit=credit) as monitor:
        run = build_run(config, run_dir, monitor)
        warmup = config.trainer.warmup
        for step in range(warmup.steps):
            first = step * warmup.batch_size
            made = demonstrate(
                run.task,
                run.renderer,
                warmup,
                step=step,
                numbers=itertools.count(first),
                seed=config.seed,
                seq_len=config.trainer.seq_len,
            )
            run.trainer.supervised_step(made.samples, warmup.learning_rate)
        groups = asyncio.run(first_groups(run, config.orchestrator))
    for group in groups:
        assign_advantages(group, config.algorithm)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    # No ban: transformers' own forward knows of none, and losses are to be compared.
    policy = Policy(run.policy.model, run.policy.positions, [])
    return policy, [sample for rollout in rollouts for sample in make_samples(rollout)]


async def first_groups(run: Run, config: OrchestratorConfig) -> list[Group]:
    """The groups of the first step."""
    return await run.evaluator.runner.run_groups(
        split="train",
        step=1,
        problems=await ProblemStream(run.task, "train").draw(0, config.groups_per_step),
        group_size=config.group_size,
        temperature=config.temperature,
    )


def default_config(folder: str, warmup_steps: int) -> RunConfig:
    from hydra import compose, initialize_config_dir

    register_schemas()
    overrides = [
        RECIPE,
        f"trainer.warmup.steps={warmup_steps}",
        f"output_dir={Path(folder)}",
        "monitor.live=false",
        "monitor.wandb.mode=disabled",
    ]
    with initialize_config_dir(str(CONF), version_base=None):
        return parse(compose("config", overrides))


if __name__ == "__main__":
    main()
