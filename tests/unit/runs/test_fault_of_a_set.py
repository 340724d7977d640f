"""A fault of an evaluation set is played again with the task and the split of that set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.record.faults import FaultRecord
from vlmrl.runs.fault_again import _of_its_set

OWN, SEEN = "orchestrator.eval.sets.own", "orchestrator.eval.sets.seen"
SETS = (
    *(f"+eval_set@{OWN}=default", f"+task@{OWN}.task=dataset", f"{OWN}.task.path=rows.jsonl"),
    *(f"+eval_set@{SEEN}=default", f"{SEEN}.split=train"),
)


def fault(rollout_id: str) -> FaultRecord:
    label = rollout_id.partition("/")[0].removesuffix("-greedy")
    return {
        "step": 3,
        "phase": "eval",
        "rollout_id": rollout_id,
        "problem_id": "p",
        "split": label,
        "problem_index": 1,
        "stop_reason": "task_error",
        "error": "",
        "traceback": None,
    }


@pytest.mark.parametrize(
    ("rollout_id", "task", "split"),
    [
        ("eval_own/000003/01/00", DatasetConfig, "eval"),
        ("eval_own-greedy/000003/01/00", DatasetConfig, "eval"),
        ("eval_seen/000003/01/00", ColorCodewordConfig, "train"),
        ("eval/000003/01/00", ColorCodewordConfig, "eval"),
        ("train/000003/01/00", ColorCodewordConfig, "train"),
    ],
)
def test_the_task_and_the_split(rollout_id: str, task: type, split: str, run_config: Callable[..., RunConfig]) -> None:
    config, found = _of_its_set(run_config(*SETS), fault(rollout_id))
    assert (type(config.task), found["split"]) == (task, split)
    if isinstance(config.task, DatasetConfig):
        assert config.task.eval_path == "rows.jsonl", "all rows of the file are asked"
