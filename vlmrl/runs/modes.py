"""The table of modes: what each `mode=` runs, and everything in which the lifecycle treats the modes differently.

A new mode is one file with its function and one row here. `mode=compare` and `mode=report` only read past runs; the
command line handles them (cli/).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from vlmrl.config.run import Mode, RunConfig
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.runs.bench.bench import bench, bench_settings
from vlmrl.runs.build import Progress, Run
from vlmrl.runs.doctor.doctor import examine
from vlmrl.runs.dpo import dpo
from vlmrl.runs.evaluate import evaluate
from vlmrl.runs.export import export
from vlmrl.runs.replay.replay import replay_batch
from vlmrl.runs.serve import serve
from vlmrl.runs.sft import sft
from vlmrl.runs.train import train

CONTINUE = "stopped after {progress} and saved: continue with python -m vlmrl resume={folder}"


@dataclass(frozen=True)
class RunMode:
    """A mode that needs the parts of a run: model, engine, run directory, monitor."""

    run: Callable[[Run], Coroutine[Any, Any, ExitReason]]
    """The mode itself. The engine is started and the checkpoint restored before it is called."""
    interrupted: str
    """The message when the run was asked to stop and did; may contain `{progress}` and `{folder}`."""
    checkpoint_step: Callable[[Progress], int] | None = None
    """The step that names a checkpoint; None: the mode saves nothing."""
    folder_in_resumed_run: str = ""
    """With resume=: "" continues that run in its own folder, a name only reads its checkpoint and records into that
    sub-folder."""
    is_inside_past_run: bool = False
    """Whether output_dir always lies inside a past run's folder: it may exist already, and `latest` does not point at
    it."""

    settings: Callable[[RunConfig], RunConfig] = lambda config: config
    """Replaces settings of a checked config that the mode does not use; config.yaml has the result."""

    def reads_past_run(self, config: RunConfig) -> bool:
        """Whether the run writes next to a past run's own files instead of starting or continuing a run."""
        return self.is_inside_past_run or (config.resume is not None and self.folder_in_resumed_run != "")

    def continues_run(self, config: RunConfig) -> bool:
        """Whether the run goes on where the run of `resume=` ended, in the same folder."""
        return config.resume is not None and self.folder_in_resumed_run == ""


@dataclass(frozen=True)
class ModeWithoutRun:
    """A mode that needs only a config: it starts no engine, writes no run directory, and prints its result itself."""

    run: Callable[[RunConfig], None]
    device: str = "cpu"
    """Replaces `model.device`."""


MODES: Mapping[Mode, RunMode | ModeWithoutRun] = {
    Mode.rl: RunMode(train, CONTINUE, lambda progress: progress.policy_version),
    Mode.sft: RunMode(sft, CONTINUE, lambda progress: progress.supervised_steps),
    Mode.dpo: RunMode(dpo, CONTINUE, lambda progress: progress.policy_version),
    Mode.eval: RunMode(
        evaluate,
        "stopped before the evaluation was complete: start it again",
        folder_in_resumed_run="eval",
    ),
    Mode.serve: RunMode(serve, "stopped before the model was served: start it again", folder_in_resumed_run="serve"),
    Mode.doctor: RunMode(examine, "stopped before the doctor was done: start it again"),
    Mode.bench: RunMode(bench, "stopped before the bench was done: start it again", settings=bench_settings),
    Mode.replay: RunMode(
        replay_batch,
        "stopped before the replay was complete: start it again",
        is_inside_past_run=True,
    ),
    Mode.export: ModeWithoutRun(export),
}
