"""A run's rollouts are read by pandas, DuckDB and `datasets`, and trained on by `task=dataset`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from support.command_line import REPOSITORY, Home, steady
from vlmrl.record.rollouts import RolloutRecord, read_rollouts

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs/reading_a_run.md").read_text()


@pytest.fixture
def step(never_stopped: Path) -> Path:
    return never_stopped / "rollouts/step_000003.parquet"


@pytest.fixture
def records(step: Path) -> list[RolloutRecord]:
    return list(read_rollouts(step))


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
def test_the_documented_lines_run(block: str, never_stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    shutil.copytree(never_stopped, tmp_path / "outputs/latest", ignore=shutil.ignore_patterns("checkpoints"))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout or (tmp_path / "outputs/good.parquet").exists()


def test_every_column_is_documented(step: Path) -> None:
    table = PAGE.partition("## Rollouts are data")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    rows = pandas.read_parquet(step)
    assert documented == list(rows.columns)
    for name in rows.turns[0][0]:
        assert f"`{name}`" in table, name


def test_pandas_duckdb_and_datasets_read_the_same(step: Path, records: list[RolloutRecord], tmp_path: Path) -> None:
    import duckdb
    from datasets import load_dataset

    wanted = [(each["rollout_id"], each["reward"], each["turns"][0]["completion_ids"]) for each in records]
    table = pandas.read_parquet(step)
    rows = [table.iloc[i] for i in range(len(table))]
    assert [(row.rollout_id, row.reward, list(row.turns[0]["completion_ids"])) for row in rows] == wanted
    connection = duckdb.connect()
    found = connection.execute(f"select rollout_id, reward, turns[1].completion_ids from '{step}'").fetchall()
    assert found == wanted
    loaded = load_dataset("parquet", data_files=str(step), split="train", cache_dir=str(tmp_path))
    assert [(row["rollout_id"], row["reward"], row["turns"][0]["completion_ids"]) for row in loaded] == wanted


def test_the_conversation_is_whole(step: Path, records: list[RolloutRecord]) -> None:
    """The messages of all turns with the answers in their places, and a picture for each image part."""
    for row, record in zip(pandas.read_parquet(step).to_dict("records"), records, strict=True):
        messages = [(message["role"], message["content"]) for message in row["messages"]]
        said = [content[0]["text"] for role, content in messages if role == "assistant"]
        assert said == [turn["text"] for turn in record["turns"]]
        assert [role for role, _ in messages][:3] == ["system", "user", "assistant"]
        parts = [part["type"] for _, content in messages for part in content]
        assert parts.count("image") == len(row["images"])
        assert all((step.parent / path).resolve().is_file() for path in row["images"])


def test_the_runs_own_answers_are_trained_on(home: Home, never_stopped: Path) -> None:
    run = home.path / "outputs/on_rollouts"
    ended = home.vlmrl(
        *("mode=sft", "task=dataset", f"task.path={never_stopped}/rollouts", "model=qwen3vl_tiny"),
        *("trainer.warmup.steps=2", "trainer.warmup.batch_size=4", "trainer.warmup.demonstrations=correct"),
        *("orchestrator.eval.problems=4", "monitor.report=false", "monitor.wandb.mode=disabled"),
        f"hydra.run.dir={run}",
    )
    assert (ended.code, ended.err) == (0, "")
    assert len(steady(run / "supervised.jsonl")) == 2
    assert "task.split=test reads others" in ended.out, "no rollout of an evaluation is learned from"
    (line,) = steady(run / "metrics.jsonl")
    assert [key for key in line if key.startswith("eval/")] == ["eval/demonstration_loss"], "nothing scores an answer"
    assert re.search(r"^evaluation after step 2 \| held-out loss \d", ended.out, re.MULTILINE)
    assert re.search(r"^  held-out +loss \d", ended.out, re.MULTILINE)
    assert not (run / "bad_rows.jsonl").exists()
    assert re.search(r"messages +messages \(", ended.out)
    assert re.search(r"images +images \(", ended.out)
