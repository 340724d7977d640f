"""The numbers of mode=bench: what was measured of some steps, and what follows from them.

StepRecord per step ─▶ Measured ─┬─▶ table.py: rows for the screen
                                 ├─▶ advice.py: what to set
                                 └─▶ bench.json
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmrl.config.run import RunConfig
from vlmrl.preflight.estimate.memory import TrainerMemory
from vlmrl.runs.bench.activity import DRAWING, KINDS, PROGRAMS, RENDERING, SAMPLING, SCORING, TASK, difference
from vlmrl.runs.bench.limits import Speeds
from vlmrl.types import Rollout


@dataclass(frozen=True)
class StepRecord:
    """One step, when it was recorded."""

    metrics: Mapping[str, float]
    """As in metrics.jsonl."""
    rollouts: Sequence[Rollout]
    recording_s: float
    """Seconds that recording it kept the loop."""
    ended: float
    """When that was done, in seconds of a clock."""
    activity: Mapping[str, float]
    """`Activity.seconds` at that time."""
    awaited: Mapping[str, float]
    """`Activity.awaited` at that time."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step, on average over the measured ones. All but `kinds` and `idle` are of the trainer's side, one
    after the other: they add up to `step`."""

    step: float
    waiting: float
    """The trainer waits for rollouts."""
    preparing: float
    """From the rollouts to the batch: advantages, scores of a second model, samples."""
    training: float
    syncing: float
    recording: float
    other: float
    kinds: Mapping[str, float]
    """Kind of `activity.KINDS` → seconds in which it was going on, on the rollouts' side. Of an on-policy run, those in
    which the trainer waited for it."""

    @staticmethod
    def of(before: StepRecord, steps: Sequence[StepRecord], *, is_asynchronous: bool) -> Times:
        """`before` is the step before the first of `steps`."""
        count = len(steps)
        step = (steps[-1].ended - before.ended) / count

        def mean(key: str) -> float:
            return sum(each.metrics[key] for each in steps) / count

        waiting, training, syncing = mean("time/rollout"), mean("time/train"), mean("time/sync")
        preparing = max(0.0, mean("time/step") - waiting - training - syncing)
        recording = sum(each.recording_s for each in steps) / count
        kinds = difference(steps[-1].awaited, before.awaited)
        if is_asynchronous:
            kinds = difference(steps[-1].activity, before.activity)
        return Times(
            step=step,
            waiting=waiting,
            preparing=preparing,
            training=training,
            syncing=syncing,
            recording=recording,
            other=max(0.0, step - waiting - preparing - training - syncing - recording),
            kinds={kind: seconds / count for kind, seconds in kinds.items()},
        )

    @property
    def idle(self) -> float:
        """Seconds in which nothing was going on, on the rollouts' side."""
        return max(0.0, self.step - sum(self.kinds.values()))


@dataclass(frozen=True)
class Tokens:
    """What a step has, on average over the measured ones."""

    rollouts: float
    turns: float
    cut: float
    """Share of the answers that have `orchestrator.max_new_tokens` tokens."""
    sampled: float
    trained: float
    rows: float
    """Rows that the trainer computed."""
    unpacked: float
    """Tokens of the samples one by one."""
    tree_rows: float
    """Rows that `trainer.packing=tree` would compute, minibatches apart."""
    distinct: float
    """Tokens of the samples, each shared prefix once."""
    micro_batches: float
    largest: int
    """Rows of the largest micro-batch."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the trainer's device, or of its process without a GPU."""

    peak: int
    total: int
    """Of the device, or of the host without a GPU."""
    process: int
    """The most bytes that this process has occupied in the host's memory."""
    planned: TrainerMemory | None
    """What `dry_run=true` estimates; None where the model's sizes are not known."""
    kept_activations: int | None
    """The same of activations where no layer is computed again; None as above."""
    trainable: int
    """Parameters that learn."""
    is_gpu: bool
    server_share: float
    """Share of the trainer's device that belongs to servers."""
    cache: float
    """Bytes of the keys and values of a step's distinct tokens."""

    @property
    def room(self) -> float:
        """Bytes that the trainer may have."""
        return self.total * (1 - self.server_share)


@dataclass(frozen=True)
class Measured:
    """Everything that mode=bench found."""

    config: RunConfig
    step_seconds: tuple[float, ...]
    """Of each measured step."""
    times: Times
    tokens: Tokens
    speeds: Speeds
    ranks: int
    train_flops: float
    """Operations of a step, over all ranks."""
    least_sampling: float | None
    """The least seconds in which the engine's devices could sample a step; None where that is not known."""
    memory: Memory
    spare_gpus: int
    """GPUs of this machine that the run leaves alone."""
    cores: int
    """CPU cores that this process may run on."""
    env_queue: float
    """Of the time of the task's calls and programs, the share in which they waited for a free thread, worker or
    process."""
    has_random_weights: bool
    """Then answers counted as ended at their token budget."""

    @property
    def is_asynchronous(self) -> bool:
        return self.config.orchestrator.max_staleness > 0

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def train_share(self) -> float:
        """The trainer's operations per second beside what its devices can do."""
        return self.train_flops / max(self.times.training, 1e-9) / self.ranks / self.speeds.product_flops

    @property
    def sampling_speed(self) -> float:
        """Sampled tokens per second while the engine has a request."""
        return self.tokens.sampled / max(self.times.kinds[SAMPLING], 1e-9)

    @property
    def rollouts(self) -> float:
        """Seconds in which rollouts were going on."""
        return sum(self.times.kinds.values())

    @property
    def least_step(self) -> float:
        """Seconds of a step that had nothing but rollouts and training as they were measured: the longer of both in an
        asynchronous run, their sum in an on-policy one."""
        both = self.rollouts, self.times.training
        return max(both) if self.is_asynchronous else sum(both)

    def parts(self) -> dict[str, float]:
        """Name → seconds of a step, which add up to it in an on-policy run. In an asynchronous run rollouts and the
        trainer go on at the same time, so they add up to more."""
        times, kinds = self.times, self.times.kinds
        rollouts = {
            "sampling": kinds[SAMPLING],
            "the task's code": kinds[TASK],
            "drawing problems": kinds[DRAWING],
            "rendering": kinds[RENDERING],
            "reward terms": kinds[SCORING],
        }
        if kinds[PROGRAMS]:
            rollouts["the programs"] = kinds[PROGRAMS]
        rest = max(0.0, times.waiting - sum(kinds[kind] for kind in KINDS))
        trainer = {
            "preparing the batch": times.preparing,
            "training": times.training,
            "weight sync": times.syncing,
            "recording": times.recording,
        }
        if self.is_asynchronous:
            waits = {"the trainer waits": times.waiting, "the engine waits": times.idle}
            return rollouts | trainer | waits
        return rollouts | trainer | {"everything else": rest + times.other}

    def share(self, seconds: float) -> float:
        """Of a step."""
        return seconds / self.times.step if self.times.step else 0.0
