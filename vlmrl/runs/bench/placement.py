"""Advice on which devices sample and train, and how far one runs ahead of the other. See advice.py."""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.runs.bench.activity import SAMPLING
from vlmrl.runs.bench.finding import FULL, Advice, percent, stands_out
from vlmrl.runs.bench.measured import Measured

REQUESTS_AT_ONCE = 512
"""Up to so many requests at once, a server of a GPU makes clearly more tokens a second with more (measured with a 2B on
an H200: a fifth more with 512 than with 256)."""
FEW_SIBLINGS = 4
"""Fewer share too little for the embedded engine to be clearly faster than a server."""


def _waits(found: Measured) -> float:
    """Seconds of a step in which the trainer waits for the engine."""
    return found.times.waiting if found.is_asynchronous else found.times.kinds[SAMPLING]


def sample_and_train_at_once(found: Measured) -> Advice | None:
    """Servers and the trainer take turns in an on-policy run, so each waits for the other."""
    saved = min(found.rollouts, found.times.training)
    if found.is_asynchronous or not isinstance(found.config.inference, VllmConfig) or not stands_out(found, saved):
        return None
    if found.memory.server_share or found.config.trainer.max_steps < 2:  # one GPU does one thing at a time
        return None
    return Advice(
        saved,
        f"rollouts and training take turns, and at once they would save up to {percent(found, saved)}",
        ("orchestrator.max_staleness=1",),
    )


def roll_out_further_ahead(found: Measured) -> Advice | None:
    """The trainer of an asynchronous run waits for servers that have no rollout at times, or few of them at once."""
    idle, waiting, config = found.times.idle, found.times.waiting, found.config
    own, staleness = config.inference, config.orchestrator.max_staleness + 1
    if not found.is_asynchronous or not stands_out(found, waiting) or staleness >= config.trainer.max_steps:
        return None
    settings = (f"orchestrator.max_staleness={staleness}",)
    if stands_out(found, idle):
        finding = f"the engine has no rollout for {percent(found, idle)}, and the trainer then waits for rollouts"
        return Advice(idle, finding, settings)
    if not isinstance(own, VllmConfig) or not found.memory.is_gpu:
        return None
    at_once, most = (staleness - 1) * found.tokens.rollouts / own.engines, own.extra_args.get("max_num_seqs")
    if at_once >= min(REQUESTS_AT_ONCE, most if isinstance(most, int) else REQUESTS_AT_ONCE):
        return None
    return Advice(
        waiting,
        f"the trainer waits for rollouts for {percent(found, waiting)}, and a server has {at_once:.0f} requests at "
        "once; with more, it makes more tokens a second",
        settings,
    )


def sample_in_the_trainer(found: Measured) -> Advice | None:
    """A server reads keys and values of a prompt once per sibling; the embedded engine reads them once."""
    own, config, memory = found.config.inference, found.config, found.memory
    seconds = _waits(found)
    if not isinstance(own, VllmConfig) or not own.starts_servers or own.tensor_parallel_size > 1 or own.slurm_tasks:
        return None
    if not memory.is_gpu or config.orchestrator.group_size < FEW_SIBLINGS or not stands_out(found, seconds):
        return None
    if memory.peak + memory.cache > FULL * memory.total:
        return None
    gpus = found.ranks + (0 if memory.server_share else own.replicas * own.data_parallel_size)
    start = f"torchrun --nproc-per-node={gpus} -m vlmrl " if gpus > 1 else ""
    return Advice(
        seconds,
        f"the trainer waits for rollouts for {percent(found, seconds)}; {start}inference=embedded, without keys of "
        "inference and weight_sync, samples from the trainer's own weights and reads a prompt once for all its "
        "siblings: measure that run, too",
        (),
    )


def use_spare_gpus(found: Measured) -> Advice | None:
    """Sampling bounds the step, and the machine has GPUs that nothing uses."""
    own = found.config.inference
    if not isinstance(own, VllmConfig) or not own.starts_servers:
        return None
    spare = found.spare_gpus // (own.tensor_parallel_size * own.data_parallel_size)
    seconds = _waits(found)
    if not spare or not stands_out(found, seconds):
        return None
    return Advice(
        seconds,
        f"the trainer waits for rollouts for {percent(found, seconds)}, and {found.spare_gpus} GPUs are not used",
        (f"inference.replicas={own.replicas + spare}",),
    )


def train_on_spare_gpus(found: Measured) -> Advice | None:
    """Training bounds the step, and the machine has GPUs that nothing uses."""
    training, config = found.times.training, found.config
    bounds = not found.is_asynchronous or found.times.idle >= found.times.waiting
    if not found.spare_gpus or not bounds or not stands_out(found, training):
        return None
    ranks = found.ranks + found.spare_gpus
    if config.orchestrator.groups_per_step * config.orchestrator.group_size < ranks:
        return None
    return Advice(
        training,
        f"training takes {percent(found, training)}, and {found.spare_gpus} GPUs are not used: start {ranks} ranks "
        f"with torchrun --nproc-per-node={ranks} -m vlmrl",
        (),
    )


def use_decode_graphs(found: Measured) -> Advice | None:
    """Servers on GPUs decode without CUDA graphs."""
    own, seconds = found.config.inference, found.times.kinds[SAMPLING]
    if not isinstance(own, VllmConfig) or not own.enforce_eager or not found.memory.is_gpu or not own.starts_servers:
        return None
    if not stands_out(found, seconds):
        return None
    return Advice(
        seconds,
        f"sampling takes {percent(found, seconds)}, and the servers use neither CUDA graphs nor compilation",
        ("inference.enforce_eager=false",),
    )
