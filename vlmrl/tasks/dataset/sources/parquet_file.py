"""Rows of a Parquet file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.arrow_types import schema_types


class ParquetReader:
    """Rows of a Parquet file, a row group at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"task.path={path} is no whole Parquet file ({error}): copy it again") from None
        groups = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups)
        self.columns: Mapping[str, ColumnType] = schema_types(path, self._file.schema_arrow)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        with self._lock:
            table = self._file.read_row_group(group)
        row: dict[str, Any] = table.slice(index - first, 1).to_pylist()[0]
        return row
