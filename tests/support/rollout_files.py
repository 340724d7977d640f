"""Edit a recorded file of rollouts, as a stranger or a bug of ours would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def edit(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Let `change` change the rows of a Parquet file in place, and write them with the same columns."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
