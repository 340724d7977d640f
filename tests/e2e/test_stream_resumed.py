"""Rows, refill, a curriculum, several evaluation sets and several reward terms, of which one abstains: a run that was
stopped and resumed is the run that was not. The mixture is of a task that scores itself and a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.command_line import Home, Scenarios, steady, steady_rollouts
from vlmrl.record.bad_rows import read_bad_rows
from vlmrl.record.difficulty import Difficulty

pytestmark = pytest.mark.slow

TABLE = ("task=their_tasks:Table",)

OWN = "orchestrator.eval.sets.own"


def mixture(rows: Path) -> tuple[str, ...]:
    return (
        "task=mixture",
        "+task@task.tasks.first=imported",
        "task.tasks.first.target=their_tasks:Table",
        "+task@task.tasks.second=dataset",
        f"task.tasks.second.path={rows}",
        "task.tasks.second.eval_fraction=0.3",
        "+reward@task.tasks.second.reward.terms.sometimes=their_tasks:sometimes",
        "+reward@task.tasks.second.reward.terms.exact=exact",
        "task.tasks.second.reward.terms.exact.weight=0.5",
        "+task.weights.first=2",
        *(f"+eval_set@{OWN}=default", f"+task@{OWN}.task=dataset", f"{OWN}.task.path={rows}"),
        *(f"+reward@{OWN}.task.reward.terms.exact=exact", f"{OWN}.problems=3", f"{OWN}.samples=2"),
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
    "orchestrator.eval.every=3",
    "orchestrator.eval.problems=9",
    "+eval_set@orchestrator.eval.sets.seen=default",
    "orchestrator.eval.sets.seen.split=train",
    "orchestrator.eval.sets.seen.problems=3",
    "reward=[format,their_tasks:sometimes]",
    "reward.terms.format.pattern=never",
    "reward.terms.format.weight=0.25",
    "reward.terms.sometimes.weight=0.5",
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
    rows = home.path / "letters.jsonl"
    lines = [{"question": f"Letter {number}?", "answer": "abc"[number % 3]} for number in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"question": "Letter 12?"}\n')

    def pair(name: str, *task: str) -> tuple[Path, Path]:
        """A run that was not stopped, and one that was stopped after step 3 and resumed."""
        run = (*task, *RUN, "trainer.keep_best=eval/seen/reward")
        whole = home.made(name, (*run, "trainer.max_steps=8"))
        return whole, home.made(f"{name}_resumed", (*run, "trainer.max_steps=3"), ("trainer.max_steps=8",))

    return Scenarios(
        table=lambda: pair("table", *TABLE),
        mixture=lambda: pair("mixture", *mixture(rows)),
        epochs=lambda: home.made("epochs", (*TABLE, *RUN, "trainer.max_epochs=1.5", "orchestrator.eval.every=0")),
    )


@pytest.mark.parametrize("name", ["table", "mixture"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_stopped(name: str, runs: Scenarios) -> None:
    whole, resumed = runs[name]
    assert steady(resumed / "metrics.jsonl") == steady(whole / "metrics.jsonl")
    assert steady(resumed / "supervised.jsonl") == steady(whole / "supervised.jsonl")
    assert steady_rollouts(resumed) == steady_rollouts(whole)
    for part in (1, 2):
        shard = f"checkpoints/step_000008/shard-00001-model-0000{part}-of-00002.safetensors"
        tensors = [load_file(run / shard) for run in (resumed, whole)]
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
    rows = [read_bad_rows(run / "bad_rows.jsonl") for run in (resumed, whole)]
    assert rows[0] == rows[1]
    loops = [json.loads((run / "checkpoints/step_000008/loop.json").read_bytes()) for run in (resumed, whole)]
    assert loops[0] == loops[1]
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


def test_every_task_term_and_set_of_the_mixture_has_its_part(runs: Scenarios) -> None:
    run = runs["mixture"][0]
    lines = [line for line in steady(run / "metrics.jsonl") if line["step"] > 0]
    for key in ("refill/discarded", "data/bad_rows"):
        assert sum(line[key] for line in lines) > 0, key
    sampled = [record for name, of in steady_rollouts(run).items() if name.startswith("step_") for record in of]
    terms = {(record["task"], name, value) for record in sampled for name, value in record["rewards"].items()}
    for task in ("first", "second"):
        found = {value for of, name, value in terms if (of, name) == (task, "sometimes")}
        assert {None} < found, "it abstains for some rollouts and scores others"
    assert {name for task, name, _ in terms if task == "first"} == {"format", "sometimes"}
    assert {name for task, name, _ in terms if task == "second"} == {"exact", "sometimes"}
    assert {"eval/reward", "eval/seen/reward", "eval/own/reward", "eval/own/pass@2"} <= lines[-1].keys()


def test_a_run_ends_after_its_epochs(runs: Scenarios) -> None:
    lines = [line for line in steady(runs["epochs"] / "metrics.jsonl") if line["step"] > 0]
    assert lines[-2]["data/epoch"] < 1.5 <= lines[-1]["data/epoch"]


def test_bad_rows_are_listed(runs: Scenarios, home: Home) -> None:
    listed = home.vlmrl("mode=faults", f"run={runs['table'][0]}")
    assert listed.code == 0
    assert "rows of the data cannot be used and were passed over" in listed.out
    assert "× the answer is empty" in listed.out
    assert "table.csv row 13" in listed.out
