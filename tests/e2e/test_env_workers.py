"""Envs of a run by the real command, in threads and in worker processes: each is closed once, however the run ends."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from support.command_line import REPOSITORY, Home, until
from support.counted_envs import counts
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

TASK = f"task={REPOSITORY}/tests/support/counted_envs.py:CountedTask"
SHORT = (
    *("trainer.warmup.steps=0", "trainer.max_steps=2", "trainer.checkpoint_every=0"),
    *("orchestrator.groups_per_step=4", "orchestrator.group_size=3", "orchestrator.max_new_tokens=4"),
    *("orchestrator.eval.every=0", "orchestrator.eval.problems=0", "algorithm.truncated=keep", "task.max_turns=2"),
    *("monitor.wandb.mode=disabled", "monitor.report=false", "monitor.live=false"),
)


def arguments(events: Path, workers: str, *kinds: str) -> tuple[str, ...]:
    events.mkdir(parents=True)
    run = events.with_name(f"run_{events.name}")
    shown = ",".join(kinds)
    return (
        TASK,
        *SHORT,
        f"task.workers={workers}",
        f"+task.args.events={events}",
        f"+task.args.kinds=[{shown}]",
        (f"hydra.run.dir={run}"),
    )


def test_a_crash_costs_its_rollouts_and_the_run_goes_on(home: Home, tmp_path: Path) -> None:
    events = tmp_path / "crash"
    ended = home.vlmrl(*arguments(events, "process", "done", "raises", "exits", "async"))
    assert (ended.code, ended.err) == (0, "")
    steps = read_metrics(tmp_path / "run_crash/metrics.jsonl")
    assert [line["rollouts/stop/task_error"] for line in steps] == [6, 6], "those of `raises` and of `exits`"
    assert all(line["env/step_ms"] > 0 and line["env/reset_ms"] > 0 for line in steps)
    opened, closed = counts(events)
    died = {name.split("-")[1] for name in opened if name.startswith("exits")}
    assert {name.split("-")[1] for name in opened - closed} <= died
    assert max(closed.values()) == 1


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_sigterm_to_every_process_closes_every_env(home: Home, tmp_path: Path, workers: str) -> None:
    """A batch system sends it to the run and to its workers."""
    events = tmp_path / "sigterm"
    process = home.start(*arguments(events, workers, "slow", "async"), new_session=True)
    until(lambda: bool(list(events.glob("stepping*"))) or process.poll() is not None, "an env steps")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "interrupted" in err or "stopped" in err.lower(), err
    opened, closed = counts(events)
    assert opened
    assert closed == opened == Counter(dict.fromkeys(opened, 1))
