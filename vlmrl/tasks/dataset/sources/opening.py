"""From `task.path` to rows: a file, a glob, a folder, a list of them, or a hub id."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow
from vlmrl.tasks.dataset.rows import ColumnType, Rows
from vlmrl.tasks.dataset.sources.json_types import merged
from vlmrl.tasks.dataset.sources.reader import Reader, UnreadableRow, is_data_file, open_file

CACHE_BYTES = 64 << 20
"""Decoded row groups and pages that the files of a source keep together."""

_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
"""Of `task.rows`."""


def open_rows(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    rows: str | None = None,
) -> Rows:
    """Open the rows of `task.path` and the keys next to it. Raises `ConfigError`."""
    paths = [path] if isinstance(path, str) else list(path)
    files = [file for each in paths for file in _local_files(each)]
    short = Path(paths[0]).name if len(paths) == 1 else f"{len(paths)} paths"
    cache: ByteLRU[Any, Any] = ByteLRU(CACHE_BYTES)
    opened = FileRows(short, ", ".join(paths), [(file, open_file(file, cache)) for file in files])
    return opened if rows is None else RowRange(opened, rows)


def _local_files(path: str) -> list[Path]:
    """The data files that one entry of `task.path` names."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if is_data_file(file.name))
    if place.exists():
        return [place]
    found = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
    if not found:
        raise ConfigError(f"task.path={path} is no file, so there are no rows: correct the path")
    return found


class FileRows:
    """The rows of files, one file after another."""

    def __init__(self, name: str, origin: str, files: Sequence[tuple[Path, Reader]]) -> None:
        self.name = name
        self.origin = origin
        self._files = files
        self._ends = np.cumsum([len(reader) for _, reader in files])
        if not self._ends[-1]:
            raise ConfigError(f"task.path={origin} has no rows, so there is nothing to learn from: name another file")
        self.columns = _one_schema(files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> dict[str, Any]:
        file, place = self._place(index)
        path, reader = self._files[file]
        try:
            found = reader.row(place)
        except UnreadableRow as error:
            raise BadRow(str(error), source=path.name, row=place) from None
        return dict.fromkeys(self.columns) | found

    def where(self, index: int) -> tuple[str, int]:
        file, place = self._place(index)
        return self._files[file][0].name, place

    def folder(self, index: int) -> str | None:
        return str(self._files[self._place(index)[0]][0].parent)

    def _place(self, index: int) -> tuple[int, int]:
        """File and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)


class RowRange:
    """A part of other rows: `task.rows=100:200`, with the meaning of Python's slices."""

    def __init__(self, rows: Rows, text: str) -> None:
        match = _RANGE.fullmatch(text if ":" in text else f":{text}")
        if match is None:
            raise ConfigError(
                f"task.rows={text} is no range of rows: write first:end, for example 0:500, 500: or -500:"
            )
        start, end = (None if part is None else int(part) for part in match.groups())
        self._rows = rows
        self._range = range(len(rows))[start:end]
        if not self._range:
            raise ConfigError(
                f"task.rows={text} is empty, because {rows.name} has {len(rows)} rows, so there is nothing to learn "
                f"from: choose a range within 0:{len(rows)}"
            )
        self.name = rows.name
        self.columns: Mapping[str, ColumnType] = rows.columns
        self.origin = f"{rows.origin}, rows {self._range.start} to {self._range.stop - 1} of {len(rows)}"

    def __len__(self) -> int:
        return len(self._range)

    def row(self, index: int) -> dict[str, Any]:
        return self._rows.row(self._range[index])

    def where(self, index: int) -> tuple[str, int]:
        return self._rows.where(self._range[index])

    def folder(self, index: int) -> str | None:
        return self._rows.folder(self._range[index])


def _one_schema(files: Sequence[tuple[Path, Reader]]) -> dict[str, ColumnType]:
    """The columns of all files. A column that a file lacks is None in its rows; one that has another type in two files
    is refused."""
    columns: dict[str, ColumnType] = {}
    first: dict[str, Path] = {}
    for path, reader in files:
        for name, kind in reader.columns.items():
            known = columns.get(name, kind)
            both = merged(known, kind)
            if both.kind == "mixed" and "mixed" not in (known.kind, kind.kind):
                raise ConfigError(
                    f"task.path: column {name!r} is {known} in {first[name]} and {kind} in {path}, so the two have no "
                    "common meaning: convert one of them, or name only one of the files"
                )
            columns[name] = both
            first.setdefault(name, path)
    return columns
