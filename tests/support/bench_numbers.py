"""Planted numbers of mode=bench."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from support.composing import compose_as_hydra
from vlmrl.cli.recipe import with_recipe
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.preflight.estimate.memory import TrainerMemory
from vlmrl.runs.bench.activity import KINDS, SAMPLING
from vlmrl.runs.bench.limits import Speeds
from vlmrl.runs.bench.measured import Measured, Memory, Times, Tokens

GIB = 1 << 30


@cache
def config_of(*overrides: str) -> RunConfig:
    """The config of a run, typed and not checked; not to be changed."""
    return parse(compose_as_hydra(*with_recipe(["output_dir=outputs/test", *overrides])))


def times(kinds: dict[str, float] | None = None, **changed: float) -> Times:
    """A step of 10 s: 5 s of sampling, then 4.5 s of training, and a little of everything else."""
    known = {"step": 10.0, "waiting": 5.0, "preparing": 0.1, "training": 4.5, "syncing": 0.2, "recording": 0.1}
    seconds = dict.fromkeys(KINDS, 0.0) | {SAMPLING: 5.0} | (kinds or {})
    return Times(**{**known, "other": 0.1, **changed}, kinds=seconds)


def memory(full: int = 10, **changed: Any) -> Memory:
    """A GPU of 80 GiB, of which 60 were used, 10 of them activations; up to `full` GiB with full micro-batches."""
    planned = TrainerMemory(
        learning=40 * GIB,
        frozen=0,
        reference=0,
        in_transit=0,
        activations=10 * GIB,
        full_activations=full * GIB,
        engine=0,
        on_host=0,
    )
    known = Memory(
        peak=60 * GIB,
        total=80 * GIB,
        process=8 * GIB,
        planned=planned,
        kept_activations=10 * GIB,
        trainable=2 * 10**9,
        is_gpu=True,
        server_share=0.0,
        cache=3.0 * GIB,
    )
    return dataclasses.replace(known, **changed)


def tokens(**changed: Any) -> Tokens:
    """16 groups of 16 rollouts with one answer each of 512 tokens."""
    known = Tokens(
        rollouts=256.0,
        turns=1.0,
        cut=0.5,
        sampled=131_072.0,
        trained=131_072.0,
        rows=144_500.0,
        unpacked=398_000.0,
        tree_rows=144_500.0,
        distinct=144_500.0,
        micro_batches=9.0,
        largest=16_384,
    )
    return dataclasses.replace(known, **changed)


def measured(config: RunConfig, **changed: Any) -> Measured:
    """A bench of `config` in which nothing is known to be amiss but what `changed` says."""
    known = Measured(
        config=config,
        step_seconds=(9.0, 10.0, 11.0),
        times=times(),
        tokens=tokens(),
        speeds=Speeds("a card", product_flops=8e14, copy_bytes=4e12),
        ranks=1,
        train_flops=9e14,
        least_sampling=1.0,
        memory=memory(),
        spare_gpus=0,
        cores=8,
        env_queue=0.0,
        has_random_weights=False,
    )
    return dataclasses.replace(known, **changed)
