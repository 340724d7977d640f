"""One process writes into a run folder; others are refused, or only read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import PATIENCE, SHORT, Ended, Gate, Home, Scenarios, assert_same_run, summary
from support.processes import Process
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

STEP_4 = 6
"""A problem of step 4. A run that waits there has a checkpoint of step 2."""

TINY = (
    *("trainer.warmup.steps=1", "trainer.warmup.batch_size=2", "trainer.max_steps=2", "trainer.warmup.rl_weight=0"),
    *("orchestrator.groups_per_step=1", "orchestrator.group_size=2", "orchestrator.eval.every=0"),
    *("monitor.wandb.mode=disabled", "monitor.report=false"),
)


def ended(processes: list[Process]) -> list[Ended]:
    return [
        Ended(process.returncode, *output, 0.0)
        for process in processes
        if (output := process.communicate(None, PATIENCE))
    ]


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    """`never_stopped` comes first, so that its tiny checkpoint is built."""

    def living() -> tuple[Path, int, Ended, dict[str, Ended], Ended]:
        """A run that waits, what others may do meanwhile, and its end."""
        run, gate = home.path / "outputs/living", Gate(home.path / "gates/living")
        first = home.start(*SHORT, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: first.poll() is None)
        assert json.loads((run / ".lock").read_bytes())["pid"] == first.pid
        others = {
            "resume": home.vlmrl(f"resume={run}", "trainer.learning_rate=1"),
            "new": home.vlmrl(*SHORT, f"hydra.run.dir={run}"),
            "report": home.vlmrl("mode=report", f"run={run}"),
            "compare": home.vlmrl("mode=compare", f"runs=[{run}]"),
            "replay": home.vlmrl("mode=replay", f"run={run}", "step=1"),
        }
        log = (run / "logs/main.log").read_text()
        assert "learning_rate changes" not in log, "a refused command writes nothing"
        gate.open()
        out, err = first.communicate(timeout=PATIENCE)
        last = home.vlmrl(f"resume={run}", "task.args.hold=-1")
        return run, first.pid, Ended(first.returncode, out, err, 0.0), others, last

    def resumed_twice() -> tuple[Path, list[Ended]]:
        run, gate = home.path / "outputs/resumed_twice", Gate(home.path / "gates/resumed_twice")
        first = home.start(*SHORT, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: first.poll() is None)
        first.kill()
        first.communicate(timeout=PATIENCE)
        return run, ended([home.start(f"resume={run}", "task.args.hold=-1") for _ in range(2)])

    def one_folder() -> list[tuple[Path, list[Ended]]]:
        found = []
        for number in range(3):
            run = home.path / f"outputs/one_folder_{number}"
            both = [home.start(*TINY, f"seed={seed}", f"hydra.run.dir={run}") for seed in (0, 1)]
            found.append((run, ended(both)))
        return found

    def same_second() -> list[Ended]:
        return ended([home.start(*TINY, f"seed={seed}") for seed in range(4)])

    return Scenarios(living=living, resumed_twice=resumed_twice, one_folder=one_folder, same_second=same_second)


def test_a_living_run_has_no_second_writer(runs: Scenarios, never_stopped: Path) -> None:
    run, pid, first, others, last = runs["living"]
    for command in ("resume", "new"):
        assert others[command].code == 2
        assert others[command].err.startswith(f"error: {run} is in use by process {pid} on ")
        assert others[command].err.count("\n") == 1
    assert (first.code, first.err, last.code) == (0, "", 0)
    assert_same_run(run, never_stopped)
    assert not (run / ".lock").exists()


def test_a_living_run_is_reported_compared_and_replayed(runs: Scenarios) -> None:
    run, _, _, others, _ = runs["living"]
    for command in ("report", "compare", "replay"):
        assert (others[command].code, others[command].err) == (0, ""), command
    assert "  running " in others["compare"].out
    assert (run / "replay/step_000001/replay.json").exists()


def test_of_two_that_resume_a_run_one_is_let_in(runs: Scenarios, never_stopped: Path) -> None:
    run, both = runs["resumed_twice"]
    assert sorted(each.code for each in both) == [0, 2]
    assert_same_run(run, never_stopped)


def test_of_two_new_runs_in_one_folder_one_is_let_in(runs: Scenarios) -> None:
    for run, both in runs["one_folder"]:
        assert sorted(each.code for each in both) == [0, 2]
        (refused,) = (each for each in both if each.code == 2)
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
        assert summary(run)["exit_reason"] == "finished"


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(runs: Scenarios) -> None:
    folders = []
    for each in runs["same_second"]:
        assert (each.code, each.err) == (0, "")
        folders.append(next(line.split()[-1] for line in each.out.splitlines() if line.strip().startswith("folder")))
    assert len(set(folders)) == 4
