"""tasks/dataset: what is said of a row of the other split."""

from __future__ import annotations

import json
from pathlib import Path

from vlmrl.config.dataset import DatasetConfig
from vlmrl.tasks.base import NotInSplit, Split
from vlmrl.tasks.dataset.task import DatasetTask

SPLITS: tuple[Split, ...] = ("train", "eval")


def test_a_row_of_the_other_split_is_named_in_a_sentence(tmp_path: Path) -> None:
    """The run quotes it where a whole pass has no problem."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(40)))
    task = DatasetTask(DatasetConfig(path=str(file), eval_fraction=0.5), seed=0)
    said = {split: {_refusal(task, split, row) for row in range(40)} - {""} for split in SPLITS}
    assert said == {
        "train": {"the row belongs to the evaluation split"},
        "eval": {"the row belongs to the training split"},
    }


def _refusal(task: DatasetTask, split: Split, row: int) -> str:
    try:
        task.problem_of_row(split, row)
    except NotInSplit as error:
        return str(error)
    return ""
