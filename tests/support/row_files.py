"""Data sets of a few rows, written as JSON lines next to pictures `img/<n>.png`, whose shade is ten times n."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.config.dataset import ColumnsConfig, DatasetConfig
from vlmrl.tasks.dataset.task import DatasetProblem, DatasetTask
from vlmrl.types import Image, Text

PICTURES = 6


def png(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", size, (shade,) * 3).save(data, "PNG")
    return data.getvalue()


def written(folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        (folder / f"img/{number}.png").write_bytes(png(10 * number))
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(folder: Path, *rows: Mapping[str, Any], seed: int = 0, **settings: Any) -> DatasetTask:
    """The task of these rows, all of them for training."""
    columns = ColumnsConfig(**settings.pop("columns", {}))
    given: dict[str, Any] = {"eval_fraction": 0.0, "path": str(written(folder, rows))} | settings
    return DatasetTask(DatasetConfig(columns=columns, **given), seed=seed)


def first(folder: Path, row: Mapping[str, Any], **settings: Any) -> DatasetProblem:
    """The problem of one row."""
    return task_of(folder, row, **settings).problem_of_row("train", 0)


def shown(problem: DatasetProblem) -> list[str]:
    """`role: text`, with `<n>` for picture number n."""
    return [
        f"{message.role}: "
        + "".join(
            part.text if isinstance(part, Text) else f"<{part.source[0, 0, 0] // 10}>" for part in message.content
        )
        for message in problem.messages
    ]


def images(problem: DatasetProblem) -> list[np.ndarray]:
    return [part.source for message in problem.messages for part in message.content if isinstance(part, Image)]
