"""The logger with the real tensorboard: its own reader finds what was logged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.rollout_builders import image, rollout
from vlmrl.config.monitor import TensorboardConfig
from vlmrl.monitor.loggers import strip
from vlmrl.monitor.tensorboard_logger import TensorboardLogger
from vlmrl.record.run_dir import RunDir
from vlmrl.types import DropReason, Rollout


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def logger(run_dir: RunDir, *, enabled: bool = True, resume_at: tuple[int, int] | None = None) -> TensorboardLogger:
    made = TensorboardLogger(TensorboardConfig(enabled=enabled, rollouts=2), run_dir, on_failure=pytest.fail)
    if resume_at is not None:
        made.resume_at(resume_at[0], supervised_steps=resume_at[1])
    made.start()
    return made


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    events = read(folder).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_metrics_are_scalars_by_step(run_dir: RunDir) -> None:
    log = logger(run_dir)
    for step in range(1, 4):
        log.log({"step": step, "reward/mean": step / 4, "entropy": float("nan"), "loss": None})
    log.log({"step": 3, "eval/reward": 0.5})
    log.finish(0)
    assert scalars(run_dir.tensorboard, "reward/mean") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert scalars(run_dir.tensorboard, "eval/reward") == [(3, 0.5)]
    assert set(read(run_dir.tensorboard).Tags()["scalars"]) == {"reward/mean", "eval/reward"}


def test_supervised_steps_have_an_axis_of_their_own(run_dir: RunDir) -> None:
    log = logger(run_dir)
    log.log({"warmup/step": 1, "warmup/loss": 2.0, "warmup/time/elapsed": 1.5})
    log.log({"step": 1, "loss": 1.0})
    log.finish(0)
    assert scalars(run_dir.tensorboard / "warmup", "loss") == [(1, 2.0)]
    assert scalars(run_dir.tensorboard / "warmup", "time/elapsed") == [(1, 1.5)]
    assert scalars(run_dir.tensorboard, "loss") == [(1, 1.0)]


def test_a_resumed_run_repeats_no_step(run_dir: RunDir) -> None:
    """The first process is killed after step 5; the second continues at the checkpoint of step 3."""
    first = logger(run_dir)
    first.log({"warmup/step": 8, "warmup/loss": 2.0})
    for step in range(1, 6):
        first.log({"step": step, "loss": float(step)})
    first._collect(wait=True)  # and never finished
    second = logger(run_dir, resume_at=(3, 8))
    for step in range(4, 8):
        second.log({"step": step, "loss": step + 0.5})
    second.finish(0)
    first.finish(0)
    assert scalars(run_dir.tensorboard, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert scalars(run_dir.tensorboard / "warmup", "loss") == [(8, 2.0)]


def test_rollouts_are_shown_with_their_images(run_dir: RunDir) -> None:
    hostile = rollout(1, dropped=DropReason.STALE)
    hostile.turns[0].text = "<script>alert(1)</script>\n# not a title"
    log = logger(run_dir)
    log.log_rollouts(
        4, {"sampled": [rollout(0), hostile, rollout(2)], "greedy": [Rollout.unplayed("id", "eval", 7, 0)]}
    )
    log.finish(0)
    events = read(run_dir.tensorboard)
    assert sorted(events.Tags()["images"]) == ["rollouts, sampled/1", "rollouts, sampled/2"]
    (shown,) = events.Images("rollouts, sampled/1")
    with PIL.Image.open(io.BytesIO(shown.encoded_image_string)) as picture:
        assert np.array_equal(np.asarray(picture), strip([image(10), image(20), image(30)]))
    assert shown.step == 4
    ((step, text),) = texts(run_dir.tensorboard, "rollouts, sampled/2")
    assert step == 4
    assert text.splitlines() == [
        "    train/000001/00/01, problem red-green",
        "    reward 0.75, terminated, dropped: stale",
        "    ",
        "    <script>alert(1)</script>",
        "    # not a title / AB",
    ]
    assert texts(run_dir.tensorboard, "rollouts, greedy/1")


def test_it_is_quiet_unless_enabled(run_dir: RunDir) -> None:
    log = logger(run_dir, enabled=False)
    log.log({"step": 1, "loss": 1.0})
    log.finish(0)
    assert not run_dir.tensorboard.exists()


def test_an_error_ends_the_logging_and_not_the_run(run_dir: RunDir) -> None:
    run_dir.tensorboard.touch()
    said: list[str] = []
    log = TensorboardLogger(TensorboardConfig(enabled=True), run_dir, on_failure=said.append)
    log.start()
    for step in range(1, 4):
        log.log({"step": step, "loss": 1.0})
    log.finish(0)
    (text,) = said
    assert text.startswith("TensorBoard stopped logging, and the run goes on without it: ")
