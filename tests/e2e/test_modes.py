"""Whole runs of mode=sft, mode=eval, every algorithm and every packing."""

from __future__ import annotations

import hashlib
import math
import signal
from pathlib import Path

import pytest

from support.command_line import (
    AT_ONCE_S,
    SHORT,
    Ended,
    Gate,
    Home,
    Scenarios,
    assert_same_run,
    steady,
    steady_rollouts,
    summary,
)
from vlmrl.orchestrator.supervised import FIRST_PROBLEM
from vlmrl.record.metrics import read_metrics
from vlmrl.record.run_dir import RunDir
from vlmrl.record.step_keys import missing_keys

pytestmark = pytest.mark.slow

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo")
PACKINGS = ("tree", "varlen", "none")

HELD_OUT = "eval/demonstration_loss"
SFT = (*SHORT, "mode=sft", "trainer.warmup.steps=5")
SFT_STEP_4 = FIRST_PROBLEM + 3 * 16
"""A problem of the fourth supervised step. Checkpoints are saved after steps 2 and 4."""

COUNT_TRAINERS = """
import gc, sys
from vlmrl.cli.main import main
code = main()
gc.collect()
print("trainers left:", sum(type(each).__name__ == "LocalTrainer" for each in gc.get_objects()))
sys.exit(code)
"""


def digests(run: Path) -> dict[str, str]:
    """Path → SHA-256 of every file."""
    files = (path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    """Everything of this module that starts processes."""

    def sweep(name: str, *arguments: str) -> tuple[Path, Ended]:
        folder = home.path / "outputs" / name
        arguments = ("--multirun", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra:job.num}", *arguments)
        return folder, home.vlmrl(*arguments, code=("-c", COUNT_TRAINERS))

    def sft_resumed() -> tuple[Path, Ended, Ended]:
        run, gate = home.path / "outputs/sft_resumed", Gate(home.path / "gates/sft")
        start = (*SFT, "trainer.warmup.demonstrations=correct", f"hydra.run.dir={run}")
        process = home.start(*start, *gate.arguments(SFT_STEP_4))
        gate.wait(lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        gate.open()
        out, err = process.communicate()
        return run, Ended(process.returncode, out, err, 0.0), home.vlmrl(f"resume={run}", "task.args.hold=-1")

    def sft_evaluated() -> tuple[Path, Ended]:
        """A run for each kind of demonstrations, then mode=eval of the second run."""
        folder, ended = sweep("sft", *SFT, "trainer.warmup.demonstrations=random,correct")
        assert ended.code == 0, ended.err
        return folder, home.vlmrl(f"resume={folder / '1'}", "mode=eval")

    def evaluated() -> tuple[Path, dict[str, str], Ended]:
        run = home.copy(never_stopped, "evaluated")
        before = digests(run)
        return run, before, home.vlmrl(f"resume={run}", "mode=eval")

    def evaluated_fresh() -> tuple[Path, Ended]:
        run = home.path / "outputs/evaluated_fresh"
        return run, home.vlmrl(*SHORT, "mode=eval", f"hydra.run.dir={run}")

    two_steps = (*SHORT, "trainer.max_steps=2", "trainer.checkpoint_every=0", "orchestrator.eval.every=0")
    return Scenarios(
        algorithms=lambda: sweep(
            "algorithms", *two_steps, f"algorithm={','.join(ALGORITHMS)}", "task.shuffle_images=true"
        ),
        packings=lambda: sweep("packings", *SHORT, f"trainer.packing={','.join(PACKINGS)}"),
        sft_resumed=sft_resumed,
        sft_evaluated=sft_evaluated,
        evaluated=evaluated,
        evaluated_fresh=evaluated_fresh,
        too_big=lambda: home.vlmrl("model=qwen3vl", f"hydra.run.dir={home.path / 'outputs/too_big'}"),
    )


# ── mode=sft ────────────────────────────────────────────────────────────────────────────────────────────────


def test_sft(runs: Scenarios) -> None:
    folder, _ = runs["sft_evaluated"]
    random, correct = ([line["loss"] for line in read_metrics(folder / job / "supervised.jsonl")] for job in "01")
    assert len(random) == len(correct) == 5
    assert random[0] != correct[0], "the same problems, other answers"
    for job, losses in (("0", random), ("1", correct)):
        assert losses[-1] < losses[0]
        (line,) = read_metrics(folder / job / "metrics.jsonl")
        assert line["step"] == 5
        supervised = read_metrics(folder / job / "supervised.jsonl")
        held_out = {each["step"]: each[HELD_OUT] for each in supervised if HELD_OUT in each}
        assert list(held_out) == [2, 4, 5], "orchestrator.eval.every, and the last"
        assert held_out[5] == line[HELD_OUT] < held_out[2]
        assert 0.0 <= line["eval/reward"] <= 1.0
        assert summary(folder / job)["exit_reason"] == "finished"
        names = sorted(path.name for path in (folder / job / "checkpoints").iterdir())
        assert names == ["step_000002", "step_000004", "step_000005"]


def test_sft_interrupted_and_resumed(runs: Scenarios) -> None:
    run, interrupted, resumed = runs["sft_resumed"]
    folder, _ = runs["sft_evaluated"]
    assert interrupted.code == 1
    # The signal cuts the making of step 4 short, unless the gate opens first.
    assert interrupted.err in [
        f"interrupted: stopped after supervised step {step} and saved: continue with python -m vlmrl resume={run}\n"
        for step in (3, 4)
    ]
    assert (resumed.code, resumed.err) == (0, "")
    assert_same_run(run, folder / "1")


# ── mode=eval ───────────────────────────────────────────────────────────────────────────────────────────────


def test_eval_of_a_fresh_model(runs: Scenarios) -> None:
    run, ended = runs["evaluated_fresh"]
    assert (ended.code, ended.err) == (0, "")
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["step"] == 0
    assert missing_keys(line) == []
    assert list(steady_rollouts(run)) == ["eval_000000.parquet"]
    assert not list((run / "checkpoints").iterdir()), "nothing was learned"
    assert (run.parent / "latest").is_symlink()


def test_eval_of_a_runs_newest_checkpoint(runs: Scenarios, never_stopped: Path) -> None:
    """It gives the metrics and rollouts that the run recorded itself, and changes nothing of the run."""
    run, before, ended = runs["evaluated"]
    assert (ended.code, ended.err) == (0, "")
    (line,) = steady(run / "eval/metrics.jsonl")
    recorded = steady(never_stopped / "metrics.jsonl")[-1]
    assert line == {key: value for key, value in recorded.items() if key == "step" or key in line}
    assert {"step", "eval/reward", "eval/reward_greedy", "eval/task/share_correct"} <= set(line)
    name = "eval_000006.parquet"
    assert steady_rollouts(run / "eval") == {name: steady_rollouts(never_stopped)[name]}
    after = {path: digest for path, digest in digests(run).items() if not path.startswith("eval/")}
    assert after == before


def test_eval_of_a_supervised_run(runs: Scenarios) -> None:
    folder, ended = runs["sft_evaluated"]
    assert (ended.code, ended.err) == (0, "")
    (line,) = steady(folder / "1/eval/metrics.jsonl")
    (recorded,) = steady(folder / "1/metrics.jsonl")
    del recorded["eval/demonstration_loss"]  # of the supervised run itself
    assert line == recorded
    assert steady_rollouts(folder / "1/eval") == steady_rollouts(folder / "1")


# ── choices ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_algorithm(runs: Scenarios) -> None:
    """All algorithms run one after the other in one process, on the blind control: images of other problems."""
    folder, ended = runs["algorithms"]
    assert (ended.code, ended.err) == (0, "")
    assert {RunDir(folder / str(job)).read_config().monitor.wandb.group for job in range(6)} == {"algorithms"}
    losses = set()
    for job in range(len(ALGORITHMS)):
        lines = read_metrics(folder / str(job) / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2]
        assert all(missing_keys(line) == [] for line in lines)
        assert summary(folder / str(job))["exit_reason"] == "finished"
        assert all(
            "_shown_" in record["problem_id"] for record in steady_rollouts(folder / str(job))["step_000001.parquet"]
        )
        losses.add((lines[0]["grad_norm"], lines[1]["loss"]))
    assert len(losses) >= 5, "they are different algorithms (dapo is grpo until a group is filtered or a ratio clipped)"


def test_a_sweep_keeps_no_memory_of_its_runs(runs: Scenarios) -> None:
    _, ended = runs["algorithms"]
    assert ended.out.endswith("trainers left: 0\n")


def test_every_packing_learns_the_same(runs: Scenarios) -> None:
    folder, ended = runs["packings"]
    assert (ended.code, ended.err) == (0, "")
    tree, varlen, none = (steady(folder / str(job) / "metrics.jsonl") for job in range(len(PACKINGS)))
    ours = ("tokens/packed", "micro_batches", "images/encoded")  # these depend on the packing
    for ours_line, *others in zip(tree, varlen, none, strict=True):
        for line in others:
            assert line.keys() == ours_line.keys()
            for key in line.keys() - set(ours):
                assert math.isclose(line[key], ours_line[key], rel_tol=1e-4, abs_tol=1e-4), key
    for step in range(1, 7):
        assert tree[step]["tokens/packed"] < varlen[step]["tokens/packed"] == none[step]["tokens/packed"]
        assert tree[step]["grad_norm"] > 0


def test_a_model_that_this_machine_cannot_run(runs: Scenarios) -> None:
    """Without network and weights, the command says within seconds that the model is missing and what to run."""
    ended: Ended = runs["too_big"]
    assert ended.code == 2
    assert "model.name=Qwen/Qwen3-VL-4B-Instruct cannot run on this machine" in ended.err
    assert "Run `python -m vlmrl` for the tiny default" in ended.err
    assert "Traceback" not in ended.err
    assert ended.seconds < AT_ONCE_S
