"""Our own code is outside the fence: a slip in it ends the run with a traceback and is never taken for a fault of the
task."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import Ended, Home, Scenarios, summary
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

    return Scenarios(**{name: lambda name=name: slip(name) for name in SLIPS})


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
