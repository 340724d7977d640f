"""Public layouts are recognized: each fixture's columns and types, without a word about them in the config."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.layout_fixtures import LAYOUTS, ROWS, Layout, shade
from vlmrl.config.dataset import ColumnsConfig, DatasetConfig
from vlmrl.tasks.base import NotInSplit
from vlmrl.tasks.check import check_task
from vlmrl.tasks.contract.observation import SPLITS
from vlmrl.tasks.dataset.task import DatasetTask
from vlmrl.types import Image, Message, Text


def opened(layout: Layout, folder: Path) -> DatasetTask:
    path = layout.write(folder)
    settings: dict[str, Any] = {"path": str(path)}
    for override in layout.overrides:
        key, _, text = shlex.split(override)[0].partition("=")
        if key.startswith("task.columns."):
            settings["columns"] = ColumnsConfig(**{key.removeprefix("task.columns."): text})
        elif key.startswith("task."):
            settings[key.removeprefix("task.")] = text
    return DatasetTask(DatasetConfig(eval_fraction=0.25, **settings), seed=0)


def shown(message: Message) -> str:
    return "".join(part.text if isinstance(part, Text) else "<image>" for part in message.content)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "_"))
def test_a_public_layout(layout: Layout, tmp_path: Path) -> None:
    task = opened(layout, tmp_path)
    seen = 0
    for row in range(ROWS):
        for split in SPLITS:
            try:
                problem = task.problem_of_row(split, row)
            except NotInSplit:
                continue
            seen += 1
            assert problem.answer == layout.answer(row)
            assert shown(problem.messages[-1]) == layout.question(row)
            assert problem.messages[-1].role == "user"
            images = [part for message in problem.messages for part in message.content if isinstance(part, Image)]
            assert [np.unique(image.source).tolist() for image in images] == [
                [shade((row + k) % ROWS)] for k in range(layout.images)
            ]
            system = [shown(message) for message in problem.messages if message.role == "system"]
            assert system == ([] if layout.system is None else [layout.system])
    assert seen == ROWS, "each row is in one split"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "_"))
def test_it_keeps_the_contract(layout: Layout, tmp_path: Path) -> None:
    assert check_task(opened(layout, tmp_path), problems=2, max_turns=1) == []
