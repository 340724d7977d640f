"""A run that was killed, interrupted or damaged and then resumed equals one that was never stopped, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pexpect
import pytest
from safetensors.torch import load_file, save_file

from support.command_line import (
    AT_ONCE_S,
    KILL_AT,
    PATIENCE,
    SHORT,
    Ended,
    Gate,
    Home,
    Scenarios,
    assert_same_run,
    steady,
    summary,
)
from vlmrl.orchestrator.supervised import FIRST_PROBLEM
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

WARMUP_STEP_6 = FIRST_PROBLEM + 5 * 16
"""A problem of the sixth warm-up step."""
STEP_2, STEP_4 = 2, 6
"""Problems of RL steps 2 and 4 (two groups per step). A run stopped in step 4 has a checkpoint of step 2."""

MODEL, OPTIMIZER = (f"shard-00001-model-0000{part}-of-00002.safetensors" for part in (1, 2))

SLOW_DISK = """
import sys, time
from vlmrl.trainer.checkpoint import Checkpoints
Checkpoints.save = lambda *arguments: time.sleep(600)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, with checkpoints that are never written."""

CURSOR = re.compile(r"\x1b\[\?25([lh])")
"""The escape code that hides or shows the cursor."""


def resume(run: Path) -> str:
    return f"resume={run}"


def signalled(
    home: Home,
    gate: Gate,
    *arguments: str,
    signals: tuple[signal.Signals, ...],
    code: tuple[str, ...] = ("-m", "vlmrl"),
) -> Ended:
    """Send signals to a run that waits at its gate, which stays closed. `seconds` count from the signals."""
    process = home.start(*arguments, code=code)
    gate.wait(lambda: process.poll() is None)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)  # two signals at the same time count as one
    started = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err, time.monotonic() - started)


@pytest.fixture(scope="module")
def ends(home: Home, never_stopped: Path) -> Scenarios:
    """Everything of this module that starts processes."""

    def killed_at_work() -> tuple[Path, list[Ended]]:
        """SIGKILL during the warm-up, then in RL between two checkpoints."""
        run, gate = home.path / "outputs/killed_at_work", Gate(home.path / "gates/killed")
        kill = (signal.SIGKILL,)
        return run, [
            signalled(home, gate, *SHORT, *gate.arguments(WARMUP_STEP_6), f"hydra.run.dir={run}", signals=kill),
            signalled(home, gate, resume(run), *gate.again(STEP_4), signals=kill),
            home.vlmrl(resume(run), "task.args.hold=-1"),
        ]

    def killed_while_saving() -> tuple[Path, list[Ended]]:
        """SIGKILL when a checkpoint is about to get its name, then when the one before it is about to be deleted."""
        run = home.path / "outputs/killed_while_saving"
        start = (*SHORT, "trainer.keep_checkpoints=1", f"hydra.run.dir={run}")
        at_rename = home.vlmrl("os.rename", "partial_000004", *start, code=("-c", KILL_AT))
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["partial_000004", "step_000002"]
        at_deletion = home.vlmrl("shutil.rmtree", "partial_000002_deleted", resume(run), code=("-c", KILL_AT))
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["partial_000002_deleted", "step_000004"]
        return run, [at_rename, at_deletion, home.vlmrl(resume(run))]

    def interrupted() -> tuple[Path, list[Ended]]:
        """Two Ctrl-C in the warm-up, of which the second hits the saving, then one, then SIGTERM in RL. Each time the
        task's code hangs."""
        run, gate = home.path / "outputs/interrupted", Gate(home.path / "gates/interrupted")
        start = (*SHORT, *gate.arguments(WARMUP_STEP_6), f"hydra.run.dir={run}")
        twice = signalled(home, gate, *start, signals=(signal.SIGINT, signal.SIGINT), code=("-c", SLOW_DISK))
        assert not (run / "summary.json").exists()
        assert not list((run / "checkpoints").iterdir())
        again = gate.again(WARMUP_STEP_6)
        once = signalled(home, gate, resume(run), *again, signals=(signal.SIGINT,))
        assert (summary(run)["exit_reason"], summary(run)["step"]) == ("interrupted", 0)
        term = signalled(home, gate, resume(run), *gate.again(STEP_4), signals=(signal.SIGTERM,))
        assert (summary(run)["exit_reason"], summary(run)["step"]) == ("interrupted", 3)
        return run, [twice, once, term, home.vlmrl(resume(run), "task.args.hold=-1")]

    def in_a_terminal() -> tuple[Path, str, int, Ended]:
        """Type Ctrl-C at the live view; the signal reaches every process of the group, including wandb's."""
        run, gate = home.path / "outputs/terminal", Gate(home.path / "gates/terminal")
        screen = pexpect.spawn(
            "python",
            ["-m", "vlmrl", *SHORT, *gate.arguments(STEP_2), "monitor.wandb.mode=offline", f"hydra.run.dir={run}"],
            cwd=home.path,
            env={**home.environment, "TERM": "xterm-256color", "LANG": "C.UTF-8"},
            dimensions=(40, 120),
            encoding="utf-8",
            codec_errors="replace",  # the terminal echoes ^C in the middle of the output
            timeout=PATIENCE,
        )
        shown: list[str] = []

        def drawing() -> bool:
            """Whether the process runs. Reads what it draws; a full terminal buffer would block it."""
            with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
                shown.append(screen.read_nonblocking(100_000, timeout=0))
            return bool(screen.isalive())

        gate.wait(drawing)
        screen.sendintr()
        shown.append(screen.read())
        screen.wait()
        return run, "".join(shown), screen.exitstatus, home.vlmrl(resume(run), "task.args.hold=-1")

    def damaged() -> tuple[Path, Ended]:
        """Cut the newest checkpoint short, change the one before it, add a half-written one, and resume."""
        run = home.copy(never_stopped, "damaged")
        cut, changed = run / "checkpoints/step_000006" / MODEL, run / "checkpoints/step_000004/state.json"
        cut.write_bytes(cut.read_bytes()[:-100])
        changed.write_bytes(changed.read_bytes().replace(b"4", b"5"))
        (run / "checkpoints/partial_000006").mkdir()
        return run, home.vlmrl(resume(run))

    def all_damaged() -> tuple[Path, Ended]:
        run = home.copy(never_stopped, "all_damaged")
        for step in (2, 4):
            (run / f"checkpoints/step_{step:06d}" / OPTIMIZER).write_bytes(b"")
        (run / "checkpoints/step_000006/state.json").unlink()
        return run, home.vlmrl(resume(run))

    def not_finite() -> tuple[Path, Ended]:
        """Resume from a checkpoint of NaN weights whose hashes are right."""
        run = home.copy(never_stopped, "not_finite")
        shutil.rmtree(run / "checkpoints/step_000006")
        folder = run / "checkpoints/step_000004"
        weights = load_file(folder / MODEL)
        save_file({name: weight * math.nan for name, weight in weights.items()}, folder / MODEL)
        hashes = json.loads((folder / "sha256.json").read_text())
        hashes[MODEL] = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
        (folder / "sha256.json").write_text(json.dumps(hashes))
        return run, home.vlmrl(resume(run))

    def overridden() -> tuple[Path, Ended, Ended]:
        """Resume with an override that does not fit the checkpoint, then with one that does."""
        run = home.copy(never_stopped, "overridden")
        unfit = home.vlmrl(resume(run), "model.tiny.hidden_size=96")
        return run, unfit, home.vlmrl(resume(run), "trainer.max_steps=7", "orchestrator.eval.every=0")

    return Scenarios(
        interrupted=interrupted,
        killed_at_work=killed_at_work,
        killed_while_saving=killed_while_saving,
        in_a_terminal=in_a_terminal,
        damaged=damaged,
        all_damaged=all_damaged,
        not_finite=not_finite,
        overridden=overridden,
    )


# ── SIGKILL ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scenario", ["killed_at_work", "killed_while_saving"])
def test_killed(scenario: str, ends: Scenarios, never_stopped: Path) -> None:
    run, (first, second, last) = ends[scenario]
    assert (first.code, second.code) == (-signal.SIGKILL, -signal.SIGKILL)
    assert (last.code, last.err) == (0, "")
    assert_same_run(run, never_stopped)
    assert summary(run)["warnings"] == []
    assert not list((run / "checkpoints").glob("partial_*"))


# ── Ctrl-C ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_interrupted(ends: Scenarios, never_stopped: Path) -> None:
    run, (_, once, term, last) = ends["interrupted"]
    assert (once.code, term.code, last.code) == (1, 1, 0)
    remedy = f"continue with python -m vlmrl resume={run}\n"
    assert once.err == f"interrupted: stopped after supervised step 5 and saved: {remedy}"
    assert term.err == f"interrupted: stopped after step 3 and saved: {remedy}"
    assert "phase: warm-up" in once.out
    assert "warning: Asked to stop" in once.out
    assert term.seconds < AT_ONCE_S, "the run does not wait for task code that hangs"
    assert_same_run(run, never_stopped)


def test_twice_ends_at_once(ends: Scenarios) -> None:
    """The step in progress did not end."""
    _, (twice, *_) = ends["interrupted"]
    assert twice.code == 1
    assert twice.err == "ended at once\n"
    assert twice.seconds < AT_ONCE_S


def test_ctrl_c_in_a_terminal(ends: Scenarios, never_stopped: Path) -> None:
    run, shown, code, last = ends["in_a_terminal"]
    assert code == 1
    assert CURSOR.findall(shown)[0] == "l", "the live view hides the cursor"
    assert CURSOR.findall(shown)[-1] == "h", "and shows it again"
    assert f"stopped after step 1 and saved: continue with python -m vlmrl resume={run}" in shown
    assert "Traceback" not in shown
    assert (last.code, last.err) == (0, "")
    assert_same_run(run, never_stopped)
    assert "Weights & Biases has stopped" not in (run / "logs/main.log").read_text()
    run_id = (run / "wandb/run_id").read_text()
    assert len(list((run / "wandb").glob(f"offline-run-*-{run_id}"))) == 2, "one W&B run with a folder for each segment"


# ── checkpoints that are damaged, runs that are complete ────────────────────────────────────────────────────


def test_damaged_checkpoints_are_skipped(ends: Scenarios, never_stopped: Path) -> None:
    run, ended = ends["damaged"]
    assert ended.code == 0, ended.err
    for file in (f"step_000006/{MODEL}", "step_000004/state.json"):
        assert f"warning: {run}/checkpoints/{file} is damaged" in ended.out
    assert "continuing from step 2 instead" in ended.out
    assert len(summary(run)["warnings"]) == 2
    assert_same_run(run, never_stopped)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004", "step_000006"]


def test_no_checkpoint_is_whole(ends: Scenarios, never_stopped: Path) -> None:
    run, ended = ends["all_damaged"]
    assert ended.code == 1
    assert ended.err.startswith("error: no checkpoint of this run can be loaded: ")
    assert f"{run}/checkpoints/step_000006/state.json" in ended.err
    assert f"{run}/checkpoints/step_000002/{OPTIMIZER} is damaged" in ended.err
    assert "Traceback" not in ended.err
    assert summary(run)["exit_reason"] == "error"
    assert steady(run / "metrics.jsonl") == steady(never_stopped / "metrics.jsonl"), "nothing was deleted"


def test_a_checkpoint_of_weights_that_are_not_finite_is_skipped(ends: Scenarios, never_stopped: Path) -> None:
    """Whoever wrote it, its hashes are right; a run that went on from it would fail at its first step."""
    run, ended = ends["not_finite"]
    assert ended.code == 0, ended.err
    found = re.search(r"warning: (\S+) cannot be continued from: (\S+) holds values that are not finite", ended.out)
    assert found is not None, ended.out
    assert found[1].endswith("checkpoints/step_000004")
    assert found[2].startswith("model.")
    assert "continuing from step 2 instead" in ended.out
    assert_same_run(run, never_stopped)


def test_an_override_that_does_not_fit_is_not_kept(ends: Scenarios, never_stopped: Path) -> None:
    """If it stayed in config.yaml, the run could not be resumed again. An override that fits is kept, and the run
    continues from its last step."""
    run, unfit, fit = ends["overridden"]
    assert unfit.code == 2
    assert "model.tiny.hidden_size=96 cannot continue" in unfit.err
    assert fit.code == 0, fit.err
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert steady(run / "metrics.jsonl")[:7] == steady(never_stopped / "metrics.jsonl")
    assert lines[6]["time/elapsed"] < lines[7]["time/elapsed"]
