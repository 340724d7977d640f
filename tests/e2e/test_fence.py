"""What a run does about faults of the user's, and that a slip of ours is none: our own code is outside the fence, so it
ends the run with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import KILL_AT, Ended, Home, Scenarios, steady, summary
from vlmrl.record.faults import read_faults
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

PLANT = """
import importlib, sys
module, name, calls = sys.argv.pop(1).split(":")
owner = importlib.import_module(module)
*owners, name = name.split(".")
for each in owners:
    owner = getattr(owner, each)
right, left = getattr(owner, name), [int(calls)]

def planted(*arguments, **named):
    left[0] -= 1
    assert left[0] >= 0, "planted"
    return right(*arguments, **named)

setattr(owner, name, planted)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, with a function that works so many times and then fails an assertion."""

RUN = (
    *("trainer.warmup.steps=0", "trainer.max_steps=4", "trainer.checkpoint_every=0", "orchestrator.eval.every=0"),
    *("orchestrator.groups_per_step=2", "orchestrator.group_size=2", "orchestrator.max_new_tokens=6"),
    *("monitor.wandb.mode=disabled", "monitor.report=false"),
)

SLIPS = {
    "packing": "vlmrl.trainer.packing:_micro_batch:0",
    "learner": "vlmrl.trainer.learner:Learner._backward_policy:1",
    "samples": "vlmrl.orchestrator.loop:make_samples:4",
}


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    def slip(name: str) -> tuple[Path, Ended]:
        run = home.path / "outputs" / f"slip_{name}"
        return run, home.vlmrl(SLIPS[name], *RUN, f"hydra.run.dir={run}", code=("-c", PLANT))

    def with_faults(name: str, *arguments: str, code: tuple[str, ...] = ("-m", "vlmrl")) -> tuple[Path, Ended]:
        run = home.path / "outputs" / name
        task = ("task=their_tasks:SomeFaults", "trainer.warmup.batch_size=4", "trainer.checkpoint_every=2")
        started = (*arguments, *RUN, *task, "trainer.warmup.steps=2", "orchestrator.eval.every=2")
        return run, home.vlmrl(*started, "orchestrator.eval.problems=6", f"hydra.run.dir={run}", code=code)

    def killed() -> tuple[Path, Ended]:
        run, _ = with_faults("killed_with_faults", "os.rename", "partial_000004", code=("-c", KILL_AT))
        assert len(read_faults(run / "faults.jsonl")) > 0
        return run, home.vlmrl(f"resume={run}")

    return Scenarios(
        **{name: lambda name=name: slip(name) for name in SLIPS},
        rate=lambda: with_faults("rate", "task.max_fault_rate=0.3"),
        whole=lambda: with_faults("whole_with_faults"),
        killed=killed,
    )


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_of_ours_ends_the_run_with_a_traceback(name: str, runs: Scenarios) -> None:
    run, ended = runs[name]
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert "AssertionError: planted" in ended.err
    steps = 0 if name == "packing" else 1
    assert (summary(run)["exit_reason"], summary(run)["step"]) == ("error", steps)
    assert [line["rollouts/dropped"] for line in read_metrics(run / "metrics.jsonl")] == [0.0] * steps
    assert not (run / "faults.jsonl").exists()


def test_more_faults_than_task_max_fault_rate_save_and_end_the_run(runs: Scenarios) -> None:
    run, ended = runs["rate"]
    assert ended.code == 1
    assert "were faults, more than task.max_fault_rate=0.3; most often (" in ended.err
    assert f"List the faults with python -m vlmrl mode=faults run={run}, repair them" in ended.err
    assert ended.err.count("\n") == 1
    assert summary(run)["exit_reason"] == "error"
    assert summary(run)["error"].startswith("TooManyFaultsError: ")
    assert (run / "checkpoints/step_000003/loop.json").exists(), "saved when it ended, not only every second step"


def test_a_resumed_run_has_the_faults_of_one_that_never_stopped(runs: Scenarios) -> None:
    """Killed while it saved step 4: the faults of steps 3 and 4, and of the evaluation after 4, are made again."""
    (run, ended), (whole, never_stopped) = runs["killed"], runs["whole"]
    assert (ended.code, never_stopped.code) == (0, 0)
    assert (run / "faults.jsonl").read_bytes() == (whole / "faults.jsonl").read_bytes()
    assert steady(run / "metrics.jsonl") == steady(whole / "metrics.jsonl")
    faults = read_faults(run / "faults.jsonl")
    assert {fault["phase"] for fault in faults} == {"eval", "rl"}
    assert {fault["stop_reason"] for fault in faults} == {"image_error", "task_error", "bad_reward"}
    raised = [fault for fault in faults if fault["stop_reason"] == "task_error"]
    assert all("raise LookupError" in (fault["traceback"] or "") for fault in raised)
