"""Runs of users' tasks, sound and broken (support/their_tasks.py), with the real command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.command_line import SHORT, Ended, Home, Scenarios, steady_rollouts, summary
from support.their_tasks import KINDS
from vlmrl.record.faults import read_faults
from vlmrl.record.metrics import read_metrics
from vlmrl.record.step_keys import missing_keys

pytestmark = pytest.mark.slow

STEPS = 6
SWEEP = (
    *SHORT,
    *("--multirun", "hydra.sweep.subdir=${hydra:job.num}", "trainer.warmup.steps=2", f"trainer.max_steps={STEPS}"),
    *("algorithm.credit=episode", "orchestrator.eval.every=3", "orchestrator.eval.problems=6"),
    "algorithm.truncated=keep",  # these tasks reward every answer, whether it ends or not
)


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    def sweep(name: str, *arguments: str) -> tuple[Path, Ended]:
        folder = home.path / "outputs" / name
        return folder, home.vlmrl(*SWEEP, f"hydra.sweep.dir={folder}", *arguments)

    go_on = "task=their_tasks:Sound,their_tasks:SomeFaults,their_tasks:EqualRewards,their_tasks:BadDemonstrations"
    end = "task=their_tasks:AllFaults,their_tasks:AllTooLong,their_tasks:Poison"
    faults = "task=their_tasks:AllFaults,their_tasks:AllTooLong"
    return Scenarios(
        short=lambda: sweep("short", faults, "trainer.warmup.steps=0", "trainer.max_steps=2"),
        evaluation=lambda: sweep("evaluation", faults, "mode=eval", "orchestrator.eval.problems=4"),
        go_on=lambda: sweep("go_on", go_on, "task.args.shift=7"),
        end=lambda: sweep("end", end, "algorithm=dr_grpo", "trainer.warmup.steps=0"),
    )


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The training rollouts of problems of one kind."""
    files = [found for name, found in steady_rollouts(run).items() if name.startswith("step_")]
    return [record for found in files for record in found if record["problem_id"].endswith(f"/{kind}")]


def test_a_sound_one(runs: Scenarios) -> None:
    folder, ended = runs["go_on"]
    assert (ended.code, ended.err) == (0, "")
    lines = read_metrics(folder / "0/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert len(read_metrics(folder / "0/supervised.jsonl")) == 2, "its demonstrations"
    assert all(missing_keys(line) == [] for line in lines)
    assert max(line["grad_norm"] for line in lines[1:]) > 0
    assert sum(line["rollouts/dropped"] for line in lines[1:]) == 0
    assert {record["problem_id"] for record in records(folder / "0", "sound")} == {
        f"train/{index + 7}/sound" for index in range(2 * STEPS)
    }, "task.args reach the task"


# ── one rollout goes wrong ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "stop_reason", "dropped", "error"),
    [
        ("no_image", "image_error", "fault", "image"),
        ("raises", "task_error", "fault", "LookupError: no score for problem 9 ("),
        ("nan", "bad_reward", "fault", "step() returned turn_reward=nan, which is not a finite number"),
        ("too_long", "context_full", "empty", None),
    ],
)
def test_a_fault_costs_its_rollouts(
    kind: str, stop_reason: str, dropped: str, error: str | None, runs: Scenarios
) -> None:
    """The rollout is recorded with its reason and counted, and the run continues to its end."""
    run = runs["go_on"][0] / "1"
    found = records(run, kind)
    assert len(found) == STEPS * 2 // len(KINDS) * 4
    for record in found:
        assert (record["stop_reason"], record["dropped"], record["reward"]) == (stop_reason, dropped, 0.0)
        assert record["error"] is None if error is None else error.split(" problem")[0] in record["error"]
    assert error is None or any(error in record["error"] for record in found)
    step = KINDS.index(kind) // 2 + 1
    line = read_metrics(run / "metrics.jsonl")[step]
    assert line[f"rollouts/stop/{stop_reason}"] == 4
    assert line[f"rollouts/dropped/{dropped}"] >= 4


def test_a_run_with_some_faults(runs: Scenarios) -> None:
    run = runs["go_on"][0] / "1"
    found = summary(run)
    assert (found["exit_reason"], found["step"]) == ("finished", STEPS)
    assert any("rollouts were dropped as fault: " in warning for warning in found["warnings"])
    assert all(record["dropped"] is None for kind in ("sound", "equal") for record in records(run, kind))
    for line in read_metrics(run / "metrics.jsonl"):
        assert missing_keys(line) == []
        assert all(value is not None for value in line.values()), "no NaN came through"


def test_equal_rewards_are_said_and_go_on(runs: Scenarios) -> None:
    folder, ended = runs["go_on"]
    found = summary(folder / "2")
    assert (found["exit_reason"], found["step"]) == ("finished", STEPS)
    assert any("have been equal within every group" in warning for warning in found["warnings"])
    assert "warning: For 5 steps, the rewards that algorithm.credit=episode compares" in ended.out
    for line in read_metrics(folder / "2/metrics.jsonl")[1:]:
        assert (line["loss"], line["groups/equal_reward"], line["groups/zero_advantage"]) == (0.0, 1.0, 1.0)


# ── demonstrations, and mode=faults ─────────────────────────────────────────────────────────────────────────


def test_bad_demonstrations_cost_themselves(runs: Scenarios) -> None:
    """12 of 16 in each of the two warm-up steps, and 12 of 16 that join each RL step (trainer.warmup.rl_weight)."""
    run = runs["go_on"][0] / "3"
    assert summary(run)["exit_reason"] == "finished"
    steps = read_metrics(run / "supervised.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["loss"] > 0 for line in steps)
    faults = read_faults(run / "faults.jsonl")
    assert Counter((fault["phase"], fault["step"]) for fault in faults) == {
        **{("supervised", step): 12 for step in (1, 2)},
        **{("rl", step): 12 for step in range(1, STEPS + 1)},
    }
    assert {fault["rollout_id"].split("/")[0] for fault in faults} == {"sft"}
    assert {fault["stop_reason"] for fault in faults} == {"task_error"}
    for remainder, words in ((1, "LookupError: no answer to"), (2, "has no answer"), (3, "more than trainer.seq_len")):
        assert all(words in fault["error"] for fault in faults if (fault["problem_index"] + 7) % 4 == remainder)


def test_mode_faults_lists_and_plays_again(runs: Scenarios, home: Home) -> None:
    folder, _ = runs["go_on"]
    demonstrations, rollouts = folder / "3", folder / "1"
    listed = home.vlmrl("mode=faults", f"run={demonstrations}")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.startswith(f"96 faults in {demonstrations}\n")
    assert "32 × task_error (supervised 8, rl 24)" in listed.out
    found = json.loads((demonstrations / "faults.json").read_bytes())
    assert (found["faults"], found["phases"]) == (96, {"supervised": 24, "rl": 72})
    (raised,) = [kind for kind in found["kinds"] if "LookupError" in kind["error"]]
    assert "in demonstration" in raised["traceback"]
    assert raised["play"] in listed.out

    def play(run: Path, kind: str, *arguments: str) -> Ended:
        fault = next(fault for fault in read_faults(run / "faults.jsonl") if kind in fault["error"])
        return home.vlmrl("mode=faults", f"run={run}", f"rollout={fault['rollout_id']}", *arguments)

    again = play(demonstrations, "LookupError")
    assert again.code == 1
    assert "Traceback" in again.out
    assert "it happens again: task_error: demonstration() raised LookupError: no answer to" in again.out
    repaired = play(demonstrations, "LookupError", "task.args.repaired=true")
    assert repaired.code == 0
    assert "it does not happen again" in repaired.out
    step = play(rollouts, "LookupError")
    assert step.code == 1
    assert "answer 1: " in step.out
    assert "raise LookupError" in step.out
    image = play(rollouts, "image")
    assert image.code == 1
    assert "it happens again: image_error: " in image.out
    nothing = home.vlmrl("mode=faults", f"run={rollouts}", "rollout=train/000099/00/00")
    assert nothing.code == 2
    assert "is not a fault of" in nothing.err


# ── nothing else happens ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (0, "most often (24 of 24) they ended as task_error: step() raised LookupError: no score for problem 0 ("),
        (1, "most often (24 of 24) they ended as context_full: the first prompt leaves no room for an answer: raise"),
    ],
)
def test_nothing_but_faults_ends_the_run(job: int, message: str, runs: Scenarios) -> None:
    folder, ended = runs["end"]
    assert ended.code == 1
    assert f"error: every rollout of the last 3 steps failed, so there is nothing to learn from; {message}" in (
        ended.err
    )
    assert "Traceback" not in ended.err
    run = folder / str(job)
    found = summary(run)
    assert (found["exit_reason"], found["step"]) == ("error", 3)
    assert found["error"].startswith("TooManyFaultsError: every rollout of the last 3 steps failed")
    assert len(steady_rollouts(run)["step_000003.parquet"]) == 8
    assert (run / "checkpoints/step_000003/state.json").exists(), "to be continued when the task is fixed"


@pytest.mark.parametrize("job", [0, 1])
def test_nothing_but_faults_in_a_short_run(job: int, runs: Scenarios) -> None:
    folder, ended = runs["short"]
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert ended.err.count("error: every rollout of the last 2 steps failed, so there is nothing to learn from") == 2
    assert "repair them, and start the run again" in ended.err
    found = summary(folder / str(job))
    assert (found["exit_reason"], found["step"]) == ("error", 2)
    assert (folder / str(job) / "checkpoints/step_000002").is_dir()


@pytest.mark.parametrize("job", [0, 1])
def test_nothing_but_faults_in_an_evaluation(job: int, runs: Scenarios) -> None:
    folder, ended = runs["evaluation"]
    assert ended.code == 1
    assert "Traceback" not in ended.err
    reasons = ("task_error: step() raised LookupError: no score", "context_full: the first prompt leaves no room")
    assert (
        f"error: every rollout of the evaluation failed, so its rewards say nothing; most often (8 of 8) they ended "
        f"as {reasons[job]}" in ended.err
    )
    assert f"mode=faults run={folder / str(job)}, repair them, and evaluate again" in ended.err
    assert summary(folder / str(job))["exit_reason"] == "error"
    assert len(steady_rollouts(folder / str(job))["eval_000000.parquet"]) == 8, "the record stays"


def test_a_loss_that_is_not_finite_ends_the_run(runs: Scenarios) -> None:
    folder, ended = runs["end"]
    assert "at version 0, so the weights were not changed. " in ended.err
    assert "train/000001/0" in ended.err, "samples are named"
    found = summary(folder / "2")
    assert (found["exit_reason"], found["step"]) == ("error", 0)
    assert found["error"].startswith("NonFiniteLossError: ")
    named = records(folder / "2", "poison")
    assert len(named) == 8, "and can be looked up"
    assert {abs(record["reward"]) for record in named} == {3e38}
