"""Rows, refill, a curriculum and evaluation sets: a run that was stopped and resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.command_line import Home, Scenarios, steady, steady_rollouts
from vlmrl.record.bad_rows import read_bad_rows
from vlmrl.record.difficulty import Difficulty

pytestmark = pytest.mark.slow

TABLE = ("task=their_tasks:Table",)

MIXTURE = (
    "task=mixture",
    "+task@task.tasks.first=imported",
    "task.tasks.first.target=their_tasks:Table",
    "+task@task.tasks.second=imported",
    "task.tasks.second.target=their_tasks:Table",
    "+task.weights.first=2",
)

RUN = (
    "trainer.decay=constant",
    "trainer.checkpoint_every=1",
    "trainer.keep_checkpoints=9",
    "trainer.warmup.steps=2",
    "trainer.warmup.batch_size=3",
    "trainer.warmup.rl_weight=0.1",
    "trainer.warmup.rl_batch_size=2",
    "orchestrator.groups_per_step=2",
    "orchestrator.group_size=3",
    "orchestrator.max_new_tokens=6",
    "orchestrator.eval.every=2",
    "orchestrator.eval.problems=9",
    "+eval_set@orchestrator.eval.sets.seen=default",
    "orchestrator.eval.sets.seen.split=train",
    "orchestrator.eval.sets.seen.problems=3",
    "algorithm.credit=episode",
    "algorithm.truncated=keep",
    "algorithm.refill.budget=4",
    "task.curriculum.solved=1",
    "task.curriculum.hopeless=0",
    "task.curriculum.rest=1",
    "monitor.wandb.mode=disabled",
    "monitor.report=false",
    "monitor.vision_gap_every=0",
)


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    def pair(name: str, *task: str) -> tuple[Path, Path]:
        """A run that was not stopped, and one that was stopped after step 3 and resumed."""
        whole = home.made(name, (*task, *RUN, "trainer.max_steps=8"))
        return whole, home.made(f"{name}_resumed", (*task, *RUN, "trainer.max_steps=3"), ("trainer.max_steps=8",))

    return Scenarios(
        table=lambda: pair("table", *TABLE),
        mixture=lambda: pair("mixture", *MIXTURE),
        epochs=lambda: home.made("epochs", (*TABLE, *RUN, "trainer.max_epochs=1.5", "orchestrator.eval.every=0")),
    )


@pytest.mark.parametrize("name", ["table", "mixture"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_stopped(name: str, runs: Scenarios) -> None:
    whole, resumed = runs[name]
    ours, theirs = ([line for line in steady(run / "metrics.jsonl") if line["step"] > 3] for run in (resumed, whole))
    assert ours == theirs
    assert steady(resumed / "supervised.jsonl") == steady(whole / "supervised.jsonl")
    later = [{k: v for k, v in steady_rollouts(run).items() if "000003" not in k} for run in (resumed, whole)]
    assert later[0] == later[1]
    for part in (1, 2):
        shard = f"checkpoints/step_000008/shard-00001-model-0000{part}-of-00002.safetensors"
        tensors = [load_file(run / shard) for run in (resumed, whole)]
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
    rows = [read_bad_rows(run / "bad_rows.jsonl") for run in (resumed, whole)]
    assert rows[0] == rows[1]
    known = [Difficulty.read(run / "checkpoints/step_000008/difficulty.parquet").by_id for run in (resumed, whole)]
    assert list(known[0].items()) == list(known[1].items())


def test_the_run_above_does_what_it_is_to_show(runs: Scenarios) -> None:
    lines = [line for line in steady(runs["table"][0] / "metrics.jsonl") if line["step"] > 0]
    assert sum(line["refill/discarded"] for line in lines) > 0
    assert sum(line["curriculum/passed_over"] for line in lines) > 0
    assert lines[-1]["data/epoch"] > 1.0, "the curriculum has known problems to choose from"
    rows = read_bad_rows(runs["table"][0] / "bad_rows.jsonl")
    assert {row["row"] for row in rows if row["source"] == "table.csv"} <= {3, 13, 23, 33}
    assert any("leaves no room for an answer in trainer.seq_len=1024" in row["reason"] for row in rows)
    assert len({(row["source"], row["row"]) for row in rows}) == len(rows), "each row once"


def test_a_run_ends_after_its_epochs(runs: Scenarios) -> None:
    lines = [line for line in steady(runs["epochs"] / "metrics.jsonl") if line["step"] > 0]
    assert lines[-2]["data/epoch"] < 1.5 <= lines[-1]["data/epoch"]


def test_bad_rows_are_listed(runs: Scenarios, home: Home) -> None:
    listed = home.vlmrl("mode=faults", f"run={runs['table'][0]}")
    assert listed.code == 0
    assert "rows of the data cannot be used and were passed over" in listed.out
    assert "× the answer is empty" in listed.out
    assert "table.csv row 13" in listed.out
