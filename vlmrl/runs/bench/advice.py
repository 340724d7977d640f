"""What a person could set to make a step faster: one small rule per piece of advice. placement.py has those about which
devices sample and train.

A rule looks at `Measured` and returns an `Advice` with the seconds of a step that it is about, or None. Its settings
are key=value, as on the command line; they exist, and preflight accepts them next to the run's own
(tests/unit/runs/bench/test_advice.py composes each). Where memory decides, a rule compares what was measured with what
the plan estimates for the other setting. A rule advises nothing that changes what is learned, except how stale the
rollouts are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from vlmrl.config.inference import VllmConfig
from vlmrl.config.program import ProgramConfig, ProgramResult
from vlmrl.config.task import MixtureConfig, Workers
from vlmrl.config.trainer import Packing, Sharding
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.config.weight_sync import CudaIpcSyncConfig, FolderSyncConfig, InProcessSyncConfig, NcclSyncConfig
from vlmrl.preflight.estimate.memory import learning_bytes
from vlmrl.runs.bench.activity import DRAWING, PROGRAMS, RENDERING, SCORING, TASK
from vlmrl.runs.bench.finding import FULL, STANDS_OUT, Advice, gib, percent, stands_out
from vlmrl.runs.bench.measured import Measured
from vlmrl.runs.bench.placement import (
    roll_out_further_ahead,
    sample_and_train_at_once,
    sample_in_the_trainer,
    train_on_spare_gpus,
    use_decode_graphs,
    use_spare_gpus,
)

LARGEST_FACTOR = 8
"""The most that a micro-batch is advised to grow at a time."""

COMPILED = 1 / 3
"""Share of a training step that compiling the layers saves on a GPU (docs/performance.md)."""

RECOMPUTED = 1 / 4
"""Share of a training step that computes layers again, with trainer.activation_checkpointing: a third of the rest."""


def advice_for(found: Measured) -> list[Advice]:
    """All advice for a run, the largest part of its step first."""
    made = [advice for rule in RULES if (advice := rule(found)) is not None]
    return sorted(made, key=lambda advice: -advice.seconds)


# ── the trainer ─────────────────────────────────────────────────────────────────────────────────────────────


def larger_micro_batches(found: Measured) -> Advice | None:
    """Several micro-batches a step, while the GPU has room for larger ones."""
    planned, trainer, memory = found.memory.planned, found.config.trainer, found.memory
    if not memory.is_gpu or planned is None or not planned.activations or found.tokens.micro_batches <= found.ranks:
        return None
    if trainer.packing is Packing.none or not stands_out(found, found.times.training):
        return None
    factor = 1
    while factor < LARGEST_FACTOR and memory.peak + (2 * factor - 1) * planned.activations <= FULL * memory.room:
        factor *= 2
    if factor == 1:
        return None
    return Advice(
        found.times.training,
        f"training takes {percent(found, found.times.training)} in {found.tokens.micro_batches:.0f} micro-batches, "
        f"and {gib(memory.room - memory.peak)} of the trainer's {gib(memory.room)} are free",
        (f"trainer.micro_batch_tokens={factor * trainer.micro_batch_tokens}",),
    )


def adamw_on_the_gpu(found: Measured) -> Advice | None:
    """AdamW runs on the host, and its numbers would fit on the GPU."""
    trainer, training = found.config.trainer, found.times.training
    if not trainer.cpu_offload or not found.memory.is_gpu or not stands_out(found, training):
        return None
    more = _more_bytes(found, cpu_offload=False)
    if more is None or found.memory.peak + more > FULL * found.memory.room:
        return None
    return Advice(
        training,
        f"training takes {percent(found, training)} with AdamW on the host, whose {gib(more)} would fit on the GPU",
        ("trainer.cpu_offload=false",),
    )


def keep_activations(found: Measured) -> Advice | None:
    """Layers are computed twice, and what that saves would fit."""
    planned, trainer = found.memory.planned, found.config.trainer
    seconds = RECOMPUTED * found.times.training
    if not trainer.activation_checkpointing or planned is None or not stands_out(found, seconds):
        return None
    if found.memory.kept_activations is None or planned.activations is None:
        return None
    more = found.memory.kept_activations - planned.activations
    if found.memory.peak + more > FULL * found.memory.room:
        return None
    return Advice(
        seconds,
        f"about {percent(found, seconds)} computes layers again, and keeping their {gib(more)} would fit",
        ("trainer.activation_checkpointing=false",),
    )


def compile_layers(found: Measured) -> Advice | None:
    """Layers run uncompiled on a GPU."""
    seconds = COMPILED * found.times.training
    if found.config.trainer.compile or not found.memory.is_gpu or not stands_out(found, seconds):
        return None
    return Advice(
        seconds,
        f"training takes {percent(found, found.times.training)} with layers that are not compiled, which usually "
        "takes a third off it",
        ("trainer.compile=true",),
    )


def share_prefixes(found: Measured) -> Advice | None:
    """Samples share prefixes, and the trainer computes them once per sample."""
    tokens = found.tokens
    if found.config.trainer.packing is Packing.tree or not tokens.rows:
        return None
    saved = found.times.training * (1 - tokens.tree_rows / tokens.rows)
    if not stands_out(found, saved):
        return None
    return Advice(
        saved,
        f"the trainer computes {tokens.rows:,.0f} rows a step, and {tokens.tree_rows:,.0f} if each prefix were "
        "computed once",
        ("trainer.packing=tree",),
    )


def gather_once_a_step(found: Measured) -> Advice | None:
    """Weights are gathered in every micro-batch, and whole they would fit on each GPU."""
    trainer, training = found.config.trainer, found.times.training
    is_sharded = found.ranks > 1 and trainer.sharding is Sharding.full
    if not is_sharded or not found.memory.is_gpu or not stands_out(found, training):
        return None
    more = _more_bytes(found, sharding=Sharding.optimizer)
    if more is None or found.memory.peak + more > FULL * found.memory.room:
        return None
    return Advice(
        training,
        f"training takes {percent(found, training)} on {found.ranks} ranks that gather the weights in every "
        f"micro-batch, and {gib(more)} more on each would keep them",
        ("trainer.sharding=optimizer",),
    )


def _more_bytes(found: Measured, **trainer: object) -> float | None:
    """Bytes that the trainer's device holds more with other settings of the trainer; None where that is not known."""
    config, learns = found.config, found.memory.trainable
    changed = dataclasses.replace(config.trainer, **trainer)  # type: ignore[arg-type]
    after = dataclasses.replace(config, trainer=changed)
    return learns * (learning_bytes(after, found.ranks)[0] - learning_bytes(config, found.ranks)[0])


# ── everything else ─────────────────────────────────────────────────────────────────────────────────────────


def task_in_processes(found: Measured) -> Advice | None:
    """Sampling waits for the task's code."""
    task, seconds = found.config.task, found.times.kinds[TASK]
    if isinstance(task, ProgramConfig | VerifiersConfig | MixtureConfig) or not stands_out(found, seconds):
        return None
    waits = f"the task's code keeps the engine waiting for {percent(found, seconds)}"
    if task.workers is Workers.thread:
        if found.cores < 2:
            return None
        why = "in threads, of which one at a time runs Python; processes help where its code computes and does not wait"
        return Advice(seconds, f"{waits}, {why}", ("task.workers=process",))
    if task.num_workers is None or found.env_queue < STANDS_OUT:
        return None
    return Advice(
        seconds,
        f"{waits}, and its calls wait for a free worker for {found.env_queue:.0%} of their time",
        (f"task.num_workers={2 * task.num_workers}",),
    )


def more_programs(found: Measured) -> Advice | None:
    """Sampling waits for programs."""
    task, seconds = found.config.task, found.times.kinds[PROGRAMS]
    if not isinstance(task, ProgramConfig | VerifiersConfig) or not stands_out(found, seconds):
        return None
    waits = f"nothing but programs goes on for {percent(found, seconds)}"
    if found.env_queue >= STANDS_OUT:
        key, count = ("processes", task.processes) if isinstance(task, ProgramConfig) else ("episodes", task.episodes)
        why = f"and rollouts wait for a free one for {found.env_queue:.0%} of their time"
        return Advice(seconds, f"{waits}, {why}", (f"task.{key}={2 * count}",))
    if isinstance(task, ProgramConfig) and not task.reuse and task.result is not ProgramResult.file:
        why = "each rollout starts a process; a program can play one problem after another (docs/programs.md)"
        return Advice(seconds, f"{waits}: {why}", ("task.reuse=true",))
    return None


def faster_weight_sync(found: Measured) -> Advice | None:
    """Publishing the weights takes a large part of a step."""
    sync, seconds = found.config.weight_sync, found.times.syncing
    if isinstance(sync, InProcessSyncConfig) or not stands_out(found, seconds):
        return None
    finding = f"publishing the weights takes {percent(found, seconds)}"
    if isinstance(sync, FolderSyncConfig | NcclSyncConfig | CudaIpcSyncConfig) and sync.verify:
        return Advice(seconds, f"{finding}, and every weight is compared", ("weight_sync.verify=false",))
    own = found.config.inference
    if not isinstance(sync, FolderSyncConfig) or not found.memory.is_gpu or not isinstance(own, VllmConfig):
        return None
    if own.starts_servers and found.memory.server_share and own.replicas * own.tensor_parallel_size == 1:
        return Advice(seconds, f"{finding}, through a folder", ("weight_sync=cuda_ipc",))
    if not found.memory.server_share:
        return Advice(seconds, f"{finding}, through a folder", ("weight_sync=nccl",))
    return None


def slow_recording(found: Measured) -> Advice | None:
    """The loop waits until a step is recorded."""
    seconds = found.times.recording
    if not found.config.monitor.record_rollouts or not stands_out(found, seconds):
        return None
    return Advice(
        seconds,
        f"the loop waits for the record for {percent(found, seconds)}; a faster disk for hydra.run.dir helps as well, "
        "and keeps what replay and report show",
        ("monitor.record_rollouts=false",),
    )


def slow_drawing(found: Measured) -> Advice | None:
    """Making the problems takes a large part of a step. No key makes the task's own `problem` faster."""
    return _without_a_key(found, DRAWING, "drawing problems, the task's own code and data,")


def slow_rendering(found: Measured) -> Advice | None:
    """Making prompts takes a large part of a step."""
    return _without_a_key(found, RENDERING, "rendering, mostly processing images,")


def slow_rewards(found: Measured) -> Advice | None:
    """Scoring takes a large part of a step."""
    return _without_a_key(found, SCORING, "scoring by the reward terms")


def _without_a_key(found: Measured, kind: str, what: str) -> Advice | None:
    seconds = found.times.kinds[kind]
    return Advice(seconds, f"{what} takes {percent(found, seconds)}", ()) if stands_out(found, seconds) else None


RULES: Sequence[Callable[[Measured], Advice | None]] = (
    sample_and_train_at_once,
    roll_out_further_ahead,
    sample_in_the_trainer,
    use_spare_gpus,
    train_on_spare_gpus,
    use_decode_graphs,
    larger_micro_batches,
    adamw_on_the_gpu,
    keep_activations,
    compile_layers,
    share_prefixes,
    gather_once_a_step,
    task_in_processes,
    more_programs,
    faster_weight_sync,
    slow_recording,
    slow_drawing,
    slow_rendering,
    slow_rewards,
)
"""All rules."""
