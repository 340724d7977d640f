"""A full disk ends the run cleanly, with the reason in one line.

A limit on the size of files simulates the full disk; it makes a write fail in the same way.
"""

from __future__ import annotations

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

    return Scenarios(checkpoint=checkpoint, records=lambda: full("full_records", 10_000))


@pytest.mark.parametrize(
    ("scenario", "file", "last"),
    # Checkpoints are written in the background; the run notices the error before it writes the next one.
    [("records", "rollouts/eval_000000.jsonl", [1]), ("checkpoint", "checkpoints/step_000002", [2, 3, 4])],
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
