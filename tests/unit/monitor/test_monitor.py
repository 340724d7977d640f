from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest

import vlmrl
from support import TESTS
from support.rollout_builders import group, rollout
from vlmrl.config.algorithm import Credit
from vlmrl.config.monitor import BlindGuard, MonitorConfig, WandbConfig, WandbMode
from vlmrl.config.run import RunConfig
from vlmrl.errors import LONGEST_TEXT, LONGEST_TRACEBACK, VlmrlError
from vlmrl.monitor.monitor import Monitor
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.record.step_keys import REQUIRED_KEYS, missing_keys
from vlmrl.types import Group

METRICS = {**dict.fromkeys(REQUIRED_KEYS[1:], 1.0), "mismatch_kl/max": 0.0, "rollouts/dropped": 0.0}


def flat_group() -> Group:
    """A group without any advantage, because its rewards are equal."""
    made = group()
    made.compares_equal = True
    for each in made.rollouts:
        for turn in each.turns:
            turn.advantage = 0.0
    return made


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    made = RunDir(tmp_path / "outputs/my_run")
    made.create()
    return made


def monitor_of(
    run_dir: RunDir,
    *,
    record_rollouts: bool = True,
    report: bool = False,
    blind_guard: BlindGuard = BlindGuard.warn,
) -> Monitor:
    wandb = WandbConfig(mode=WandbMode.disabled)
    config = MonitorConfig(record_rollouts=record_rollouts, report=report, wandb=wandb, blind_guard=blind_guard)
    return Monitor(config, run_dir, total_steps=3, exact=True, credit=Credit.episode)


def test_a_whole_run(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor_of(run_dir) as monitor:
        monitor.table("plan", {"rollouts per step": "1 group × 2 = 2", "positions": "16384"})
        monitor.phase("warm-up")
        for step in (1, 2):
            monitor.warmup(step, 2, {"loss": 2.0 / step})
        monitor.phase("eval")
        monitor.evaluation(0, {"eval/reward": 0.0, "eval/reward_greedy": 0.0}, {"eval_sampled": [], "eval_greedy": []})
        monitor.phase("rl")
        for step in (1, 2, 3):
            monitor.step(step, {**METRICS, "reward/mean": step / 4}, [group(), flat_group()])
        scores = {"eval/reward": 0.5, "eval/reward_greedy": 0.75}
        monitor.evaluation(3, scores, {"eval_sampled": [rollout(0)], "eval_greedy": [rollout(1)]})
        monitor.finish("finished", {"seed": 7})

    records = read_metrics(run_dir.metrics)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [missing_keys(record) for record in records] == [[], [], [], []]
    assert [record.get("eval/reward") for record in records] == [0.0, None, None, 0.5]
    assert [record.get("groups/zero_advantage") for record in records] == [None, 0.5, 0.5, 0.5]
    elapsed = [record["time/elapsed"] for record in records]
    assert elapsed == sorted(elapsed)
    assert [record["loss"] for record in read_metrics(run_dir.supervised)] == [2.0, 1.0]

    trained = list(read_rollouts(run_dir.rollouts_file("step", 2)))
    assert [(record["step"], record["split"]) for record in trained] == [(2, "train")] * 4
    evaluated = read_rollouts(run_dir.rollouts_file("eval", 3))
    assert [record["split"] for record in evaluated] == ["eval_sampled", "eval_greedy"]
    assert len(list(run_dir.images.iterdir())) == 3

    summary = run_dir.read_summary()
    assert summary is not None
    assert (summary["exit_reason"], summary["step"], summary["seed"]) == ("finished", 3, 7)
    assert (summary["eval/reward"], summary["eval/reward_greedy"]) == (0.5, 0.75)
    assert summary["metrics"] == records[-1]
    assert summary["wall_clock_s"] >= elapsed[-1]

    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "run my_run",
        "plan",
        "  rollouts per step  1 group × 2 = 2",
        "  positions          16384",
    ]
    assert "evaluation before the first step | sampled 0.000 | greedy 0.000" in lines
    assert "warm-up 2/2 | loss 1.000" in lines
    assert "evaluation after step 3 | sampled 0.500 | greedy 0.750" in lines
    assert lines[-5] == "run"
    assert lines[-4].startswith("  ended     finished after step 3 and 0:0")
    assert lines[-3:] == [
        "  reward    0.750",
        "  held-out  sampled 0.500, greedy 0.750",
        "  folder    outputs/my_run",
    ]
    assert not run_dir.wandb.exists()


def test_the_evaluation_of_an_earlier_step_is_still_the_newest(run_dir: RunDir) -> None:
    with monitor_of(run_dir) as monitor:
        monitor.step(1, METRICS, [])
        monitor.evaluation(1, {"eval/reward": 0.5, "eval/reward_greedy": 0.75}, {})
        monitor.step(2, METRICS, [])
        monitor.finish("finished", {})
    summary = run_dir.read_summary()
    assert summary is not None
    assert (summary["step"], summary["eval/reward"]) == (2, 0.5)


def test_figures_that_the_loop_hands_over_with_the_step_and_apart_are_one_line(run_dir: RunDir) -> None:
    with monitor_of(run_dir) as monitor:
        monitor.evaluation(1, {"eval/reward": 0.5}, {})
        monitor.step(1, {**METRICS, "eval/reward": 0.5}, [])
        monitor.finish("finished", {})
    (record,) = read_metrics(run_dir.metrics)
    assert (record["eval/reward"], missing_keys(record)) == (0.5, [])


def test_rollouts_are_not_recorded_when_not_wanted(run_dir: RunDir) -> None:
    with monitor_of(run_dir, record_rollouts=False) as monitor:
        monitor.step(1, METRICS, [group()])
        monitor.evaluation(1, {"eval/reward": 0.5}, {"eval_sampled": [rollout()]})
        monitor.finish("finished", {})
    assert list(run_dir.rollouts.iterdir()) == []
    assert list(run_dir.images.iterdir()) == []


def test_flush_means_on_the_disk(run_dir: RunDir) -> None:
    with monitor_of(run_dir) as monitor:
        for step in (1, 2, 3):
            monitor.step(step, METRICS, [group(100)])
        monitor.flush_lines()()
        assert len(list(run_dir.rollouts.iterdir())) == 3
        monitor.finish("finished", {})


def test_many_groups_without_a_signal_are_a_warning_said_once(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with monitor_of(run_dir) as monitor:
        for step in range(1, 9):
            quiet = {"mismatch_kl/mean": 0.0, "mismatch_kl/max": 0.0, "time/step": 4.0}
            monitor.step(step, METRICS | quiet, [flat_group()])
        monitor.finish("finished", {})
    summary = run_dir.read_summary()
    assert summary is not None
    (text,) = summary["warnings"]
    assert text.startswith("For 5 steps, the rewards that algorithm.credit=episode compares")
    assert capsys.readouterr().out.count(f"warning: {text}\n") == 1
    assert run_dir.main_log.read_text().count(f"WARNING vlmrl.monitor.monitor: {text}\n") == 1


@pytest.mark.parametrize("guard", BlindGuard)
def test_the_guard_against_blind_learning(run_dir: RunDir, guard: BlindGuard) -> None:
    """The reward rises by 0.05 a step while both blind controls find nothing; a process that resumes it knows that."""
    with monitor_of(run_dir, record_rollouts=False, blind_guard=guard) as monitor:
        for step in range(1, 12):
            gap = {"vision_gap/blank": 0.001} if step in (1, 6) else {}
            assert not monitor.ends_blind
            healthy = {"mismatch_kl/mean": 0.0, "mismatch_kl/max": 0.0, "time/step": 4.0}
            monitor.step(step, METRICS | healthy | gap | {"reward/mean": 0.05 * step}, [])
            if monitor.ends_blind:
                break
        assert step == (10 if guard is BlindGuard.stop else 11)
        monitor.finish("finished", {})
    summary = run_dir.read_summary()
    assert summary is not None
    said = [text for text in summary["warnings"] if text.startswith("The reward rises, but the policy ignores")]
    assert len(said) == (guard is not BlindGuard.none)
    with monitor_of(run_dir, record_rollouts=False, blind_guard=guard) as resumed:
        resumed.resume_at(step, supervised_steps=0)
        assert resumed.ends_blind == (guard is BlindGuard.stop)
        resumed.finish("finished", {})


def test_libraries_log_to_the_file_and_not_on_the_screen(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("a_library_that_writes_to_stderr")
    with monitor_of(run_dir) as monitor:
        library.addHandler(logging.StreamHandler(sys.stderr))
        monitor.phase("rl")
        library.warning("be warned")
        monitor.finish("finished", {})
    assert "a_library_that_writes_to_stderr: be warned" in run_dir.main_log.read_text()
    assert "be warned" not in capsys.readouterr().err


# ── report.html ─────────────────────────────────────────────────────────────────────────────────────────────


def page_of(run_dir: RunDir) -> dict[str, Any]:
    """The data of the run in report.html."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', run_dir.report.read_text(), re.DOTALL)
    assert data is not None
    run: dict[str, Any] = json.loads(data[1])["runs"][0]
    return run


def test_a_page_is_written_after_an_evaluation_and_at_the_end(
    run_dir: RunDir,
    run_config: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process of the lowest priority gets no processor on a busy machine.
    monkeypatch.setattr("vlmrl.monitor.report.background.LOWEST_PRIORITY", 0)
    run_dir.write_config(run_config())
    with monitor_of(run_dir, report=True) as monitor:
        monitor.step(1, METRICS, [group()])
        monitor.flush_lines()()
        monitor.evaluation(1, {"eval/reward": 0.5, "eval/reward_greedy": 0.75}, {})
        for _ in range(3000):
            if run_dir.report.exists():
                break
            time.sleep(0.1)
        page = page_of(run_dir)
        assert (page["state"], page["metrics"]["eval/reward"]) == (None, [0.5])
        monitor.step(2, METRICS, [group()])
        monitor.finish("finished", {})
    page = page_of(run_dir)
    assert (page["state"], page["metrics"]["step"]) == ("finished", [1, 2])
    assert "  report    outputs/my_run/report.html\n" in capsys.readouterr().out


def test_a_page_is_written_however_the_run_ends(run_dir: RunDir, run_config: Callable[..., RunConfig]) -> None:
    run_dir.write_config(run_config())
    with pytest.raises(ZeroDivisionError):
        run_that_raises(run_dir, ZeroDivisionError("by zero"), report=True)
    page = page_of(run_dir)
    assert (page["state"], page["summary"]["error"]) == ("error", "ZeroDivisionError: by zero")
    assert len(page["rollouts"]) == 2, "rollouts that were still being written"


def test_a_run_goes_on_without_its_page(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor_of(run_dir, report=True) as monitor:  # without config.yaml, the page cannot be written
        monitor.step(1, METRICS, [group()])
        monitor.finish("finished", {})
    out = capsys.readouterr().out
    assert "warning: report.html could not be written: read logs/report.log for the reason." in out
    assert "  ended     finished after step 1" in out
    assert "holds no config.yaml of a run" in run_dir.report_log.read_text()


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_resumed_run_does_the_later_steps_again(run_dir: RunDir) -> None:
    with monitor_of(run_dir) as monitor:
        for step in (1, 2, 3):
            monitor.step(step, METRICS, [group()])
            monitor.evaluation(step, {"eval/reward": step / 10}, {"eval_sampled": [rollout()]})
        monitor.finish("interrupted", {})
    with monitor_of(run_dir) as monitor:
        monitor.resume_at(2, supervised_steps=0)
        assert run_dir.read_summary() is None, "a summary would mean that the run has ended"
        assert sorted(path.name for path in run_dir.rollouts.iterdir()) == [
            "eval_000001.parquet",
            "eval_000002.parquet",
            "step_000001.parquet",
            "step_000002.parquet",
        ]
        monitor.step(3, {**METRICS, "loss": 9.0}, [group()])
        monitor.finish("finished", {})
    assert [record["loss"] for record in read_metrics(run_dir.metrics)] == [1.0, 1.0, 9.0]
    summary = run_dir.read_summary()
    assert summary is not None
    assert summary["eval/reward"] == 0.2, "of step 2, the newest evaluation that is left"


def test_wall_clock_adds_up_over_segments(run_dir: RunDir) -> None:
    with monitor_of(run_dir) as monitor:
        monitor.step(1, METRICS, [])
        monitor.finish("interrupted", {})
    ended = run_dir.read_summary()
    assert ended is not None
    run_dir.write_summary({**ended, "wall_clock_s": 100.0})  # as if the segment had taken 100 s
    with monitor_of(run_dir) as monitor:
        monitor.resume_at(1, supervised_steps=0)
        monitor.step(2, METRICS, [])
        assert 100.0 <= read_metrics(run_dir.metrics)[-1]["time/elapsed"] < 160.0
        # Killed here, without a summary: the next segment adds to the time of the last line and repeats step 2.
    run_dir.metrics.write_text(run_dir.metrics.read_text().replace('"time/elapsed":10', '"time/elapsed":20'))
    with monitor_of(run_dir) as monitor:
        monitor.resume_at(1, supervised_steps=0)
        monitor.finish("finished", {})
    final = run_dir.read_summary()
    assert final is not None
    assert 200.0 <= final["wall_clock_s"] < 260.0


def test_a_warm_up_that_comes_again_replaces_the_first(run_dir: RunDir) -> None:
    for losses in ([3.0, 2.0, 1.0], [5.0, 4.0]):
        with monitor_of(run_dir) as monitor:
            for step, loss in enumerate(losses, 1):
                monitor.warmup(step, 3, {"loss": loss})
            monitor.finish("interrupted", {})
    assert [record["loss"] for record in read_metrics(run_dir.supervised)] == [5.0, 4.0]


# ── runs that end badly ─────────────────────────────────────────────────────────────────────────────────────


def run_that_raises(run_dir: RunDir, error: BaseException, *, finish: bool = False, report: bool = False) -> None:
    with monitor_of(run_dir, report=report) as monitor:
        monitor.step(1, METRICS, [group()])
        if finish:
            monitor.finish("target_reached", {})
        raise error


def test_an_error_is_summed_up_logged_and_passed_on(run_dir: RunDir) -> None:
    with pytest.raises(ZeroDivisionError):
        run_that_raises(run_dir, ZeroDivisionError("by zero"))
    summary = run_dir.read_summary()
    assert summary is not None
    assert (summary["exit_reason"], summary["error"]) == ("error", "ZeroDivisionError: by zero")
    assert "Traceback (most recent call last):" in run_dir.main_log.read_text()
    assert len(list(read_rollouts(run_dir.rollouts_file("step", 1)))) == 2


def test_an_error_that_quotes_a_whole_batch_is_shortened(run_dir: RunDir) -> None:
    with pytest.raises(TypeError):
        run_that_raises(run_dir, TypeError(f"got {'9, ' * 100_000}"))
    summary = run_dir.read_summary()
    assert summary is not None
    assert summary["error"].startswith("TypeError: got 9, 9")
    assert len(summary["error"]) < LONGEST_TEXT + 100
    logged = run_dir.main_log.read_text()
    assert len(logged) < LONGEST_TRACEBACK + LONGEST_TEXT
    assert logged.count("run_that_raises") == 1


def test_an_error_without_a_text_is_summed_up(run_dir: RunDir) -> None:
    class WordlessError(Exception):
        def __str__(self) -> str:
            raise LookupError("no words")

    with pytest.raises(WordlessError):
        run_that_raises(run_dir, WordlessError())
    summary = run_dir.read_summary()
    assert summary is not None
    assert summary["error"].startswith("WordlessError: ")


def test_a_summary_that_was_written_stands(run_dir: RunDir) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_that_raises(run_dir, KeyboardInterrupt(), finish=True)
    summary = run_dir.read_summary()
    assert summary is not None
    assert summary["exit_reason"] == "target_reached"


def test_a_disk_that_fails_ends_the_run_by_name(run_dir: RunDir) -> None:
    run_dir.rollouts_file("step", 1).mkdir()  # where a file is to be written
    with monitor_of(run_dir) as monitor:
        monitor.step(1, METRICS, [group()])
        with pytest.raises(VlmrlError, match=r"step_000001\.parquet cannot be written"):
            monitor.flush_lines()()


def test_the_first_trouble_is_the_one_to_report(run_dir: RunDir) -> None:
    run_dir.rollouts_file("step", 1).mkdir()
    with pytest.raises(ZeroDivisionError) as caught:
        run_that_raises(run_dir, ZeroDivisionError())
    assert ["step_000001.parquet cannot be written" in note for note in caught.value.__notes__] == [True]


CTRL_C = """
import sys, time
sys.path.insert(0, {tests!r})
from support.rollout_builders import group
from vlmrl.config.algorithm import Credit
from vlmrl.config.monitor import MonitorConfig
from vlmrl.monitor.monitor import Monitor
from vlmrl.record.run_dir import RunDir
run_dir = RunDir({path!r})
run_dir.create()
with Monitor(MonitorConfig(), run_dir, total_steps=400, exact=True, credit=Credit.episode) as monitor:
    monitor.phase("rl")
    monitor.step(1, {{"reward/mean": 0.5}}, [group()])
    monitor._loggers._loggers[0]._collect(wait=True)
    monitor.step(2, {{"reward/mean": 0.5}}, [group()])
    while True:  # signal.pause() would miss a signal that came just before
        time.sleep(0.01)
"""


def test_ctrl_c_in_a_terminal_closes_everything(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    script = tmp_path / "script.py"
    script.write_text(CTRL_C.format(tests=str(TESTS), path=str(run_dir.path)))
    child = pexpect.spawn(
        sys.executable,
        [str(script)],
        dimensions=(40, 80),
        encoding="utf-8",
        codec_errors="replace",  # the terminal echoes ^C wherever the output is at that moment
        timeout=200,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background processes ignore it
        env={
            "TERM": "xterm-256color",
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(vlmrl.__file__).parents[1]),
        },
    )
    child.expect("2 / 400")
    child.expect("rollouts of step 2")
    child.expect("red-green")
    services = psutil.Process(child.pid).children(recursive=True)
    assert [service.name() for service in services] == ["wandb-core"]
    child.sendintr()
    output = child.read()
    child.close()
    assert "KeyboardInterrupt" in output
    assert output.rindex("\x1b[?25h") > output.rfind("\x1b[?25l"), "the cursor is shown again"
    assert "interrupted after step 2" in output
    summary = run_dir.read_summary()
    assert summary is not None
    assert summary["exit_reason"] == "interrupted"
    assert not psutil.wait_procs(services, timeout=30)[1]
    assert len(list(run_dir.rollouts.glob("step_*.parquet"))) == 2
