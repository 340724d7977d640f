"""From the steps that were taken to `Measured`: counts what they computed, and asks the plan what it had expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing
from vlmrl.errors import VlmrlError
from vlmrl.preflight.estimate.memory import BYTES, TrainerMemory
from vlmrl.preflight.estimate.plan import planned_memory
from vlmrl.preflight.machine import Machine, find_machine
from vlmrl.preflight.places import processes
from vlmrl.runs.bench.activity import TimedEngine
from vlmrl.runs.bench.flops import Work, cache_bytes, model_flops, patch_size_of, read_bytes, work_of, work_of_step
from vlmrl.runs.bench.limits import Answer, SamplingCosts, Speeds, sampling_seconds
from vlmrl.runs.bench.measured import Measured, Memory, StepRecord, Times, Tokens
from vlmrl.runs.build import Run
from vlmrl.tasks.base import Task
from vlmrl.trainer.learner import peak_bytes
from vlmrl.types import TrainingSample


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step learned from."""

    version: int
    """Policy version before the step."""
    samples: Sequence[TrainingSample]
    demonstrations: Sequence[TrainingSample] = ()
    """Of `trainer.warmup.rl_weight`."""


@dataclass(frozen=True, eq=False)
class Taken:
    """The measured steps, and the one before them."""

    before: StepRecord
    steps: Sequence[StepRecord]
    batches: Sequence[Batch]
    engine: TimedEngine


def measured_of(run: Run, speeds: Speeds, taken: Taken) -> Measured:
    """What follows from the steps that `run` took."""
    config, count = run.config, len(taken.steps)
    ranks = 1 if run.rank_group is None else run.rank_group.size
    batches = [batch for batch in taken.batches if batch.samples]
    works = [_work(run, batch, ranks) for batch in batches]
    computed = works + [_demonstrated(run, batch, ranks) for batch in batches if batch.demonstrations]
    ends = [taken.before.ended, *(step.ended for step in taken.steps)]
    machine = find_machine()
    numbers = {int(step.metrics["policy_version"]) for step in taken.steps}
    answers = [answer for answer in taken.engine.answers if int(answer.wave[0]) in numbers]
    tokens = _tokens(config, taken, answers, works, batches)
    return Measured(
        config=config,
        step_seconds=tuple(later - earlier for earlier, later in pairwise(ends)),
        times=Times.of(taken.before, taken.steps, is_asynchronous=config.orchestrator.max_staleness > 0),
        tokens=tokens,
        speeds=speeds,
        ranks=ranks,
        train_flops=sum(model_flops(run.policy.model, work, encoded=_encoded(taken)) for work in computed) / count,
        least_sampling=_least_sampling(run, answers, speeds, count),
        memory=_memory(run, taken, machine, ranks, tokens),
        cores=machine.cores,
        spare_gpus=_spare_gpus(config, machine, ranks),
        env_queue=_env_queue(taken),
        has_random_weights=taken.engine.ends_answers,
    )


def _work(run: Run, batch: Batch, ranks: int) -> Work:
    config = run.config
    return work_of_step(
        batch.samples,
        config.algorithm,
        config.trainer.packing,
        config.trainer.micro_batch_tokens,
        seed=config.seed,
        version=batch.version,
        ranks=ranks,
        patch_size=patch_size_of(run.policy.model),
    )


def _demonstrated(run: Run, batch: Batch, ranks: int) -> Work:
    """The work of the demonstrations of a step, which all optimizer steps on its batch share."""
    trainer, patch_size = run.config.trainer, patch_size_of(run.policy.model)
    work = work_of(
        batch.demonstrations, trainer.packing, trainer.micro_batch_tokens, ranks=ranks, patch_size=patch_size
    )
    return work.times(run.config.algorithm.epochs)


def _encoded(taken: Taken) -> float:
    """Share of the images that the trainer's tower encoded; the features of the others were cached."""
    encoded = sum(step.metrics.get("images/encoded", 0.0) for step in taken.steps)
    cached = sum(step.metrics.get("images/cached", 0.0) for step in taken.steps)
    return encoded / (encoded + cached) if encoded + cached else 1.0


def _tokens(
    config: RunConfig, taken: Taken, answers: Sequence[Answer], works: Sequence[Work], batches: Sequence[Batch]
) -> Tokens:
    count, trainer = len(taken.steps), config.trainer

    def mean(key: str) -> float:
        return sum(step.metrics.get(key, 0.0) for step in taken.steps) / count

    once = [work_of(batch.samples, Packing.tree, trainer.micro_batch_tokens) for batch in batches]
    cut = sum(answer.new_tokens >= config.orchestrator.max_new_tokens for answer in answers)
    return Tokens(
        rollouts=mean("rollouts/total"),
        turns=len(answers) / count / max(1.0, mean("rollouts/total")),
        cut=cut / max(1, len(answers)),
        sampled=mean("tokens/completion"),
        trained=mean("tokens/trained"),
        rows=mean("tokens/packed"),
        unpacked=mean("tokens/unpacked"),
        tree_rows=sum(work.rows for work in once) * config.algorithm.epochs / count,
        distinct=sum(work.rows for work in once) / count,
        micro_batches=mean("micro_batches"),
        largest=max((work.largest for work in works), default=0),
    )


def _env_queue(taken: Taken) -> float:
    times = [rollout.env_time for step in taken.steps for rollout in step.rollouts]
    queued = sum(time.queue_s for time in times)
    called = sum(time.reset_s + time.step_s for time in times)
    return queued / (queued + called) if queued + called else 0.0


def _least_sampling(run: Run, answers: Sequence[Answer], speeds: Speeds, steps: int) -> float | None:
    devices = engine_devices(run.config, run.policy.device)
    if devices is None or not answers:
        return None
    model, own = run.policy.model, run.config.inference
    number = BYTES[own.dtype] if isinstance(own, VllmConfig) else run.policy.dtype.itemsize
    costs = SamplingCosts(
        weight_bytes=read_bytes(model, number),
        cache_bytes=cache_bytes(model, number),
        row_flops=model_flops(model, Work(rows=1), backward=False),
        head_flops=model_flops(model, Work(head_rows=1), backward=False),
    )
    return sampling_seconds(answers, costs, speeds, devices) / steps


def engine_devices(config: RunConfig, device: torch.device) -> int | None:
    """How many devices like the trainer's sample; None for servers on a CPU, which use threads of their own."""
    own = config.inference
    if not isinstance(own, VllmConfig):
        return 1
    if device.type != "cuda":
        return None
    return own.engines * own.tensor_parallel_size


def _memory(run: Run, taken: Taken, machine: Machine, ranks: int, tokens: Tokens) -> Memory:
    device, config = run.policy.device, run.config
    gpu = device.type == "cuda"
    number = run.policy.dtype.itemsize
    planned = _planned(config, run.task, ranks)
    trainer = dataclasses.replace(config.trainer, activation_checkpointing=False)
    kept = _planned(dataclasses.replace(config, trainer=trainer), run.task, ranks)
    return Memory(
        peak=int(max(step.metrics["memory/peak_bytes"] for step in taken.steps)),
        total=torch.cuda.get_device_properties(device).total_memory if gpu else machine.memory,
        process=peak_bytes(torch.device("cpu")),
        planned=planned,
        kept_activations=None if kept is None else kept.activations,
        trainable=sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad),
        is_gpu=gpu,
        server_share=_server_share(config, machine, ranks) if gpu else 0.0,
        cache=tokens.distinct * cache_bytes(run.policy.model, number),
    )


def _planned(config: RunConfig, task: Task, ranks: int) -> TrainerMemory | None:
    try:
        return planned_memory(config, task, ranks)
    except VlmrlError:  # the task's code failed; the steps have recorded how
        return None


def _server_share(config: RunConfig, machine: Machine, ranks: int) -> float:
    """Share of the trainer's first GPU that servers of the run take."""
    own = config.inference
    if not isinstance(own, VllmConfig) or not own.starts_servers or not machine.gpus:
        return 0.0
    started = processes(config, ranks, [gpu.index for gpu in machine.gpus])
    first = started[0].devices[:1]
    servers = sum(bool(set(first) & set(process.devices)) for process in started[ranks:])
    return servers * own.gpu_memory_utilization


def _spare_gpus(config: RunConfig, machine: Machine, ranks: int) -> int:
    gpus = [gpu.index for gpu in machine.gpus]
    used = {device for process in processes(config, ranks, gpus) for device in process.devices}
    return len(set(gpus) - used)
