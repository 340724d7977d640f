"""`mode=bench`: a few steps of the run as it is, and how fast they are beside what this machine could do.

    speeds of a product and a copy ─▶ steps that warm up ─▶ measured steps ─▶ Measured ─▶ table, bench.json, verdict
                                      └──────── schedule.py ────────┘

Everything is the run's own: task, renderer, engine, trainer, weight sync, ranks. `bench_settings` turns off what is no
part of a usual step (evaluations, the blind control, W&B, the report), and what depends on rewards, which random
weights do not get: every rollout is trained on, with the advantages that it has. The cost of a step does not depend on
their values, so groups whose rewards are all equal cost what others do. No supervised warm-up is taken and no
checkpoint is written. The weights that a bench changes are gone with the process.

Random weights end no answer by themselves. With them every answer counts as ended at its token budget, so that episodes
go on to their last turn: the step is as long as it can be. Real weights answer as they do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch

from vlmrl.config.algorithm import FilterMode, Truncated
from vlmrl.config.model import Init
from vlmrl.config.monitor import BlindGuard, WandbMode
from vlmrl.config.run import RunConfig
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.length import Length
from vlmrl.orchestrator.loop import ExitReason, Loop
from vlmrl.record.bad_rows import BadRowRecord
from vlmrl.record.faults import FaultRecord
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.record.splits import RecordedSplit
from vlmrl.runs.bench.activity import ENGINE_GOES_ON, ENGINE_WAITS, Activity, TimedEngine, time_drawing, timed
from vlmrl.runs.bench.advice import advice_for
from vlmrl.runs.bench.limits import measure_speeds
from vlmrl.runs.bench.measured import StepRecord, Times
from vlmrl.runs.bench.schedule import Schedule
from vlmrl.runs.bench.summary import Batch, Taken, measured_of
from vlmrl.runs.bench.table import as_json, limit_rows, part_rows, verdict_rows
from vlmrl.runs.build import Run
from vlmrl.runs.train import loop_of
from vlmrl.types import Group, Rollout, StepResult, Trainer, TrainingSample

BENCH_JSON = "bench.json"
"""In the run's folder: everything that the tables show, for programs."""


def bench_settings(config: RunConfig) -> RunConfig:
    """`config` without what is no part of a usual step, and with every rollout trained on."""
    algorithm, monitor = config.algorithm, config.monitor
    cut = Truncated.zero if algorithm.truncated is Truncated.mask else algorithm.truncated
    return dataclasses.replace(
        config,
        algorithm=dataclasses.replace(
            algorithm,
            truncated=cut,
            filters=dataclasses.replace(algorithm.filters, zero_advantage=FilterMode.none),
            refill=dataclasses.replace(algorithm.refill, budget=1),
        ),
        orchestrator=dataclasses.replace(
            config.orchestrator,
            eval=dataclasses.replace(config.orchestrator.eval, every=0, target=None, sets={}),
        ),
        trainer=dataclasses.replace(config.trainer, max_epochs=None, keep_best=None, patience=None),
        monitor=dataclasses.replace(
            monitor,
            vision_gap_every=0,
            blind_guard=BlindGuard.none,
            report=False,
            wandb=dataclasses.replace(monitor.wandb, mode=WandbMode.disabled),
            tensorboard=dataclasses.replace(monitor.tensorboard, enabled=False),
        ),
    )


async def bench(run: Run) -> ExitReason:
    """Take the steps, show the tables, and write bench.json."""
    monitor, config = run.monitor, run.config
    monitor.phase("bench")
    device = run.policy.device
    speeds = measure_speeds(device, run.policy.dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    activity = Activity(ENGINE_WAITS if config.inference.kind == "embedded" else ENGINE_GOES_ON)
    engine = TimedEngine(run.engine, activity, ends_answers=has_random_weights(config))
    ahead = config.orchestrator.max_staleness
    schedule = Schedule(config.bench.warmup(ahead), config.bench.steps, ahead)
    recorder, trainer = _Recorder(monitor, activity, schedule), _Trainer(run.trainer)
    monitor.expect(schedule.last)
    monitor.table("bench", {"steps": config.bench.in_words(ahead)})
    reason = await _take_steps(run, engine, recorder, trainer)
    if reason != "finished":
        return reason
    monitor.status("bench: counting what the steps computed")
    warmup = schedule.warmup
    taken = Taken(recorder.steps[warmup - 1], recorder.steps[warmup:], trainer.batches[warmup:], engine)
    found = measured_of(run, speeds, taken)
    advice = advice_for(found)
    monitor.table("where a step goes", part_rows(found))
    monitor.table("beside what this machine could do", limit_rows(found))
    monitor.table("verdict", verdict_rows(found, advice))
    _write(run.run_dir.path / BENCH_JSON, as_json(found, advice))
    return reason


def _write(path: Path, content: dict[str, Any]) -> None:
    with disk_errors(path):
        write_bytes_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def has_random_weights(config: RunConfig) -> bool:
    """Whether the policy has learned nothing yet."""
    return config.model.tiny is not None or config.model.init is Init.random


async def _take_steps(run: Run, engine: TimedEngine, recorder: _Recorder, trainer: _Trainer) -> ExitReason:
    """Run the run's own loop as long as the bench takes, with its parts timed and nothing saved."""
    loop, schedule = loop_of(run), recorder.schedule
    time_drawing(loop.problems, engine.activity)
    changed = {
        "length": MoreAhead(loop.problems, schedule.longest + schedule.max_staleness + 1, schedule=schedule),
        "runner": timed(loop.runner, engine),
        "engine": engine,
        "trainer": trainer,
        "recorder": recorder,
        "checkpoint": lambda step: None,
    }
    parts = {field.name: getattr(loop, field.name) for field in dataclasses.fields(loop) if field.init}
    return await TimedLoop(**{**parts, **changed}, activity=engine.activity).run()


@dataclass(eq=False)
class TimedLoop(Loop):
    """The loop, which says when the trainer waits for rollouts."""

    activity: Activity = field(default_factory=lambda: Activity(ENGINE_WAITS))

    async def next_batch(self, step: int) -> list[Group] | None:
        with self.activity.trainer_waits():
            return await super().next_batch(step)


@dataclass(frozen=True)
class MoreAhead(Length):
    """Ends after the last measured step, while batches of later steps roll out or are opened: without them the last
    measured steps would have less to do than the others."""

    schedule: Schedule = field(kw_only=True)

    def is_last(self, step: int) -> bool:
        return step >= self.schedule.last


class _Trainer:
    """The run's trainer. It keeps the samples of each step, whose work is counted after the last one."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.batches: list[Batch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def train_step(
        self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        self.batches.append(Batch(self._trainer.version, samples, demonstrations))
        return self._trainer.train_step(samples, demonstrations, steps)


@dataclass(eq=False)
class _Recorder:
    """The run's monitor, which records each step; it is timed."""

    monitor: Monitor
    activity: Activity
    schedule: Schedule
    steps: list[StepRecord] = field(default_factory=list)

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        began = time.perf_counter()
        self.monitor.step(step, metrics, groups)
        ended = time.perf_counter()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.steps.append(
            StepRecord(metrics, rollouts, ended - began, ended, self.activity.seconds(), self.activity.awaited())
        )
        if len(self.steps) > 1:
            times = Times.of(self.steps[-2], self.steps[-1:], is_asynchronous=True)
            self.schedule.took(step, max(times.waiting, times.idle) / times.step)
            self.monitor.expect(self.schedule.last)

    @property
    def ends_blind(self) -> bool:
        return False

    def record(self, step: int, groups: Sequence[Group]) -> None:
        self.monitor.record(step, groups)

    def evaluation(
        self, step: int, metrics: Mapping[str, float], rollouts: Mapping[RecordedSplit, Sequence[Rollout]]
    ) -> None:
        self.monitor.evaluation(step, metrics, rollouts)

    def faults(self, faults: Sequence[FaultRecord]) -> None:
        self.monitor.faults(faults)

    def bad_rows(self, rows: Sequence[BadRowRecord]) -> None:
        self.monitor.bad_rows(rows)
