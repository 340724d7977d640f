"""A run that is asked to stop during an evaluation ends at once, although the task's code hangs, and leaves no half
evaluation: the resumed run makes it again and equals one that was never stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from support.command_line import AT_ONCE_S, PATIENCE, SHORT, Ended, Gate, Home, assert_same_run, summary
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

FIRST_SAMPLED, GREEDY_AFTER_STEP_4 = 1, 6
"""Rounds of held-out problems since the start of a process: each evaluation has a sampled and a greedy one."""


def interrupted(home: Home, gate: Gate, number: signal.Signals, *arguments: str) -> Ended:
    """Send the signal when the run hangs in its evaluation; the seconds are those since then."""
    process = home.start(*arguments)
    gate.wait(lambda: process.poll() is None)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err, time.monotonic() - started)


def test_stopped_in_two_evaluations(home: Home, never_stopped: Path) -> None:
    run, gate = home.path / "outputs/stopped_in_evaluation", Gate(home.path / "gates/evaluation")
    start = (*SHORT, *gate.arguments(-1), f"task.args.hold_round={FIRST_SAMPLED}", f"hydra.run.dir={run}")
    first = interrupted(home, gate, signal.SIGINT, *start)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == []

    again = (f"resume={run}", *gate.again(-1), f"task.args.hold_round={GREEDY_AFTER_STEP_4}")
    second = interrupted(home, gate, signal.SIGTERM, *again)
    assert (summary(run)["exit_reason"], summary(run)["step"]) == ("interrupted", 4)
    assert "eval/reward" not in read_metrics(run / "metrics.jsonl")[-1]
    assert not (run / "rollouts/eval_000004.parquet").exists()

    remedy = f"continue with python -m vlmrl resume={run}\n"
    assert (first.code, first.err) == (1, f"interrupted: stopped after supervised step 10 and saved: {remedy}")
    assert (second.code, second.err) == (1, f"interrupted: stopped after step 4 and saved: {remedy}")
    assert max(first.seconds, second.seconds) < AT_ONCE_S, "nothing waits for task code that hangs"

    last = home.vlmrl(f"resume={run}", "task.args.hold_round=-1")
    assert (last.code, last.err) == (0, "")
    assert_same_run(run, never_stopped)
    assert (run / "checkpoints/step_000006/loop.json").read_bytes() == (
        never_stopped / "checkpoints/step_000006/loop.json"
    ).read_bytes()
