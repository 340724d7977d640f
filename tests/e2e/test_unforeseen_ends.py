"""Whatever ends a run, its last finished step is saved and never a half-done one; a screen that goes away ends none."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.command_line import PATIENCE, SHORT, Ended, Gate, Home, Scenarios, assert_same_run, summary, until

pytestmark = pytest.mark.slow

STEP_4 = 6
"""A problem of step 4. A run that waits there has a checkpoint of step 2."""

RAISE_AT = """
import importlib, sys
place, number, kind = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
module, _, path = place.partition(":")
owner, (*parts, name) = importlib.import_module(module), path.split(".")
for part in parts:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0
def planted(*arguments, **options):
    global calls
    calls += 1
    if calls != number:
        return original(*arguments, **options)
    if kind == "exit":
        sys.exit(0)
    if kind == "after":
        original(*arguments, **options)
    raise AssertionError("planted")
setattr(owner, name, planted)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line with a bug in it: a function raises (or exits) at a call, before or after it has done its work."""

BUGS: dict[str, tuple[str, int, str, list[int]]] = {
    # the third step's groups: nothing of the step has happened
    "before the step": ("vlmrl.orchestrator.loop:mark_dropped", 2 * 2 + 1, "before", [2]),
    "an exit": ("vlmrl.orchestrator.loop:mark_dropped", 2 * 3 + 1, "exit", [2, 3]),
    # ten supervised steps come first
    "in the optimizer": ("torch.optim:AdamW.step", 10 + 4, "after", [2]),
    "in a supervised step": ("torch.optim:AdamW.step", 5, "after", []),
    "between supervised steps": ("vlmrl.runs.sft:note", 5, "before", [0]),
    # of the first policy and of three steps before
    "while publishing": ("vlmrl.weight_sync.in_process:InProcessSync.publish", 1 + 4, "before", [2, 4]),
    "while recording": ("vlmrl.monitor.monitor:warnings_for", 3, "before", [2]),
    # sampled and greedy, before the first step and after step 2
    "in an evaluation": ("vlmrl.orchestrator.evaluation:mean_reward", 2 + 1, "before", [2]),
}
"""Where a run ends → the place, the call, what happens there, and the checkpoints that are left."""

SCREEN = """
import os, sys
kind = sys.argv.pop(1)
if kind == "left":
    reader, writer = os.pipe()
    os.close(reader)
elif kind == "full":
    writer = os.open("/dev/full", os.O_WRONLY)
for number in (1, 2):
    os.close(number) if kind == "closed" else os.dup2(writer, number)
if kind == "closed":
    sys.stdout = sys.stderr = None
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line without a screen: its reader has left (`| head`), its disk is full, or it was closed (`>&-`)."""

SCREENS = ("left", "full", "closed")

SIGNALS = (signal.SIGHUP, signal.SIGUSR1)
"""Two of `SAVE_SIGNALS`; tests/unit/runs/test_stopping.py has all."""


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    def broken(name: str, *bug: object) -> tuple[Path, Ended, list[int], Ended]:
        run = home.path / "outputs" / f"broken_{name.replace(' ', '_')}"
        ended = home.vlmrl(*map(str, bug), *SHORT, f"hydra.run.dir={run}", code=("-c", RAISE_AT))
        steps = sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
        assert summary(run)["exit_reason"] == "error"
        assert ("planted" if bug[2] != "exit" else "sys.exit(0)") in summary(run)["error"]
        return run, ended, steps, home.vlmrl(f"resume={run}")

    def signalled(number: signal.Signals) -> tuple[Path, Ended, Ended]:
        """A signal that comes three times, as from a shell that ends or from a limit on processor time."""
        run, gate = home.path / f"outputs/{number.name}", Gate(home.path / f"gates/{number.name}")
        process = home.start(*SHORT, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: process.poll() is None)
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.1)
        out, err = process.communicate(timeout=PATIENCE)
        return run, Ended(process.returncode, out, err, 0.0), home.vlmrl(f"resume={run}", "task.args.hold=-1")

    def without_screen(kind: str) -> tuple[Path, Ended]:
        run = home.path / "outputs" / f"screen_{kind}"
        return run, home.vlmrl(kind, *SHORT, f"hydra.run.dir={run}", code=("-c", SCREEN))

    def in_the_last_report() -> tuple[Path, Ended]:
        """Ctrl-C while a run that has finished waits for its page."""
        run = home.path / "outputs/last_report"
        process = home.start(*SHORT, "monitor.report=true", "orchestrator.eval.every=0", f"hydra.run.dir={run}")
        until((run / "summary.json").exists, "the run's summary")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        return run, Ended(process.returncode, out, err, 0.0)

    scenarios: dict[str, Callable[[], Any]] = {name: partial(broken, name, *bug[:3]) for name, bug in BUGS.items()}
    scenarios |= {number.name: partial(signalled, number) for number in SIGNALS}
    scenarios |= {kind: partial(without_screen, kind) for kind in SCREENS}
    return Scenarios(**scenarios, in_the_last_report=in_the_last_report)


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_costs_at_most_the_step_in_progress(name: str, runs: Scenarios, never_stopped: Path) -> None:
    run, ended, steps, again = runs[name]
    assert ended.code == 1
    assert "Traceback" in ended.err, "it is a bug, so its place is shown"
    assert steps == BUGS[name][3]
    assert (again.code, again.err) == (0, "")
    assert_same_run(run, never_stopped)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves(number: signal.Signals, runs: Scenarios, never_stopped: Path) -> None:
    run, ended, again = runs[number.name]
    assert ended.code == 1
    assert ended.err.startswith("interrupted: stopped after step 3 and saved: continue with")
    assert (again.code, again.err) == (0, "")
    assert_same_run(run, never_stopped)


@pytest.mark.parametrize("kind", SCREENS)
def test_the_screen_ends_no_run(kind: str, runs: Scenarios, never_stopped: Path) -> None:
    run, ended = runs[kind]
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert_same_run(run, never_stopped)
    said = "standard output cannot be written any more" in (run / "logs/main.log").read_text()
    assert said == (kind != "closed"), "what was closed from the start was never lost"


def test_ctrl_c_in_the_last_report_leaves_a_finished_run(runs: Scenarios) -> None:
    run, ended = runs["in_the_last_report"]
    assert (ended.code, ended.err) == (0, "")
    assert summary(run)["exit_reason"] == "finished"
    assert f"report.html was left out, as asked: write it with python -m vlmrl mode=report run={run}" in " ".join(
        ended.out.split()
    ).replace("outputs/", f"{run.parent}/")
    assert not list(run.glob(".*.tmp"))
