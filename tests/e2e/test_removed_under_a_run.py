"""Parts of a run's folder are removed while it runs: what can be written again is, anything else ends the run saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.command_line import PATIENCE, SHORT, Ended, Gate, Home, Scenarios, steady_rollouts, summary, until

pytestmark = pytest.mark.slow

STEP_4 = 6
"""A problem of step 4."""

PARTS = ("images", "rollouts", "logs", "checkpoints", "config.yaml")


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    def removed(name: str, *parts: str) -> tuple[Path, Ended]:
        run, gate = home.path / f"outputs/{name}", Gate(home.path / f"gates/{name}")
        process = home.start(*SHORT, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: process.poll() is None)
        # A thread may still be writing the step before.
        until((run / "rollouts/step_000003.parquet").exists, "the rollouts of step 3")
        for part in parts:
            shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
        gate.open()
        out, err = process.communicate(timeout=PATIENCE)
        return run, Ended(process.returncode, out, err, 0.0)

    return Scenarios(parts=lambda: removed("parts_removed", *PARTS), metrics=lambda: removed("gone", "metrics.jsonl"))


def test_what_can_be_written_again_is(runs: Scenarios, never_stopped: Path) -> None:
    run, ended = runs["parts"]
    assert (ended.code, ended.err) == (0, "")
    assert summary(run)["exit_reason"] == "finished"
    config, before = ((each / "config.yaml").read_text().partition("environment:")[2] for each in (run, never_stopped))
    assert config == before
    assert {"step_000004", "step_000006"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert "phase" not in (run / "logs/main.log").read_text(), "the log goes on after its first lines are gone"
    whole = steady_rollouts(never_stopped)
    assert steady_rollouts(run) == {name: whole[name] for name in whole if int(name[5:11]) >= 4}
    hashes = {
        hash
        for records in steady_rollouts(run).values()
        for record in records
        for turn in record["turns"]
        for _, _, hash, _ in turn["placeholders"]
    }
    assert {path.stem for path in (run / "images").iterdir()} == hashes, "images that were written before, too"
    for part in PARTS:
        assert any(str(run / part) in text for text in summary(run)["warnings"]), part


def test_metrics_that_are_gone_end_the_run_saved(runs: Scenarios, home: Home) -> None:
    run, ended = runs["metrics"]
    assert ended.code == 1
    assert ended.err.startswith(f"error: {run}/metrics.jsonl was removed, replaced or changed while the run wrote to")
    assert ended.err.count("\n") == 1
    assert str(run / "metrics.jsonl") in summary(run)["error"]
    assert (run / "checkpoints/step_000004").is_dir(), "the step in progress is finished and saved"
    again = home.vlmrl(f"resume={run}", "task.args.hold=-1")
    assert (again.code, again.err) == (0, "")
    assert summary(run)["step"] == 6
