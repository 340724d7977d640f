"""A full disk ends the run cleanly, with the reason in one line.

A limit on the size of files simulates the full disk; it makes a write fail in the same way. Where a small disk may be
mounted, one is filled as well: there everything fails at once, the log and summary.json too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command_line import SHORT, Ended, Home, Scenarios, assert_same_run, summary
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    """`never_stopped` comes first, because building the tiny checkpoint needs disk space too."""

    def full(name: str, size: int) -> tuple[Path, Ended]:
        run = home.path / "outputs" / name
        return run, home.vlmrl(*SHORT, f"hydra.run.dir={run}", file_size_limit=size)

    def checkpoint() -> tuple[Path, Ended, Path, Ended]:
        """A run that fills the disk, and a copy of it that is resumed without the limit."""
        run, ended = full("full_checkpoint", 1_000_000)
        again = home.copy(run, "room_again")
        return run, ended, again, home.vlmrl(f"resume={again}")

    return Scenarios(checkpoint=checkpoint, records=lambda: full("full_records", 6_000))


@pytest.mark.parametrize(
    ("scenario", "file", "last"),
    # Files are written in the background; the run notices the error before it writes the next one.
    [("records", "rollouts/eval_000000.parquet", [1, 2]), ("checkpoint", "checkpoints/step_000002", [2, 3, 4])],
)
def test_full_disk(scenario: str, file: str, last: list[int], runs: Scenarios) -> None:
    run, ended, *_ = runs[scenario]
    assert ended.code == 1
    assert ended.err.startswith(f"error: {run / file} cannot be written")
    assert "File too large" in ended.err
    assert ended.err.count("\n") == 1
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert steps[-1] in last
    found = summary(run)
    assert (found["exit_reason"], found["step"]) == ("error", steps[-1])
    assert file in found["error"]


def test_a_run_goes_on_when_there_is_room_again(runs: Scenarios, never_stopped: Path) -> None:
    *_, run, ended = runs["checkpoint"]
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(run, never_stopped)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2000 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2000k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize("left_kib", [100, 1500])
def test_nothing_is_left_on_the_disk(left_kib: int, small_disk: Path, home: Home, never_stopped: Path) -> None:
    """The records and the checkpoint of a run do not fit: one sentence, and after that the run goes on as if never."""
    (small_disk / "fill").write_bytes(b"x" * ((2000 - left_kib) << 10))
    run = small_disk / "run"
    ended = home.vlmrl(*SHORT, f"hydra.run.dir={run}")
    assert (ended.code, ended.err.count("\n")) == (1, 1), ended.err
    assert ended.err.startswith(f"error: {run}/")
    assert "cannot be written" in ended.err
    assert "No space left on device" in ended.err
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    again = home.vlmrl(f"resume={run}")
    assert (again.code, again.err) == (0, "")
    assert_same_run(run, never_stopped)
