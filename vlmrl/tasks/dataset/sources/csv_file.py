"""Rows of a CSV or TSV file, whose first row names the columns.

The file is read once when it is opened, by Python's csv module, to find where rows begin: a quoted field may hold line
ends. Every cell is text as it stands there, so that an answer such as 007 stays what it is; an empty cell is None.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.raw_file import TextFile
from vlmrl.tasks.dataset.sources.reader import UnreadableRow, refuse_doubled, suffix_of

CHUNK = 1 << 20

MAX_FIELD_BYTES = (1 << 31) - 1
"""The csv module refuses fields of more than 131,072 characters by default; an image in base64 has more."""

_DELIMITERS = (",", ";", "\t")


class CsvReader:
    """Rows of a CSV file by the positions where they begin."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError`."""
        csv.field_size_limit(MAX_FIELD_BYTES)
        self._file = TextFile(path)
        self._delimiter = "\t" if suffix_of(path.name) == ".tsv" else _delimiter(self._file)
        starts = self._row_starts()
        try:
            names = [name.strip() for name in self._fields(int(starts[0]), int(starts[1]))] if len(starts) > 1 else []
        except UnreadableRow as error:
            raise ConfigError(f"task.path={path}: the names of its columns cannot be read: {error}") from None
        refuse_doubled(path, names)
        self._names = names
        self._starts = starts[1:]
        self.columns: Mapping[str, ColumnType] = {name: ColumnType("text") for name in names}

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def row(self, index: int) -> dict[str, Any]:
        fields = self._fields(int(self._starts[index]), int(self._starts[index + 1]))
        if len(fields) != len(self._names):
            raise UnreadableRow(f"the row has {len(fields)} fields, but the first row names {len(self._names)} columns")
        return {name: field or None for name, field in zip(self._names, fields, strict=True)}

    def _fields(self, start: int, end: int) -> list[str]:
        """The fields of the row in these bytes."""
        data = self._file.read(start, end)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UnreadableRow(f"the row is not UTF-8 (byte {error.start}): convert the file to UTF-8") from None
        try:
            return next(row for row in csv.reader(io.StringIO(text, newline="\n"), delimiter=self._delimiter) if row)
        except (csv.Error, StopIteration) as error:
            raise UnreadableRow(f"the row is no CSV: {error}") from None

    def _row_starts(self) -> NDArray[np.int64]:
        """int64 [rows + 1], with the first row, that of the names: where each begins, and the end of the file."""
        place = self._file.start
        starts = []

        def lines() -> Iterator[str]:
            nonlocal place
            for line in _lines(self._file):
                place += len(line)
                yield line.decode("latin-1")  # one character per byte; only quotes, delimiters and line ends matter

        before = place
        try:
            for row in csv.reader(lines(), delimiter=self._delimiter):
                if row:
                    starts.append(before)
                before = place
        except csv.Error as error:
            raise ConfigError(
                f"task.path={self._file.path} is no CSV, from row {len(starts)} on ({error}), so no row of it can be "
                "found: write it again, in UTF-8 with line ends of Linux or Windows"
            ) from None
        self._check_last(starts, place)
        return np.array([*starts, place], np.int64)

    def _check_last(self, starts: list[int], end: int) -> None:
        """Refuse a file in which a quote is opened and not closed: all rows behind it are one field."""
        if not starts:
            return
        last = self._file.read(starts[-1], end).decode("latin-1")
        try:
            list(csv.reader(io.StringIO(last, newline="\n"), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise ConfigError(
                    f'task.path={self._file.path}: a quote (") that row {max(0, len(starts) - 2)} opens is never '
                    'closed, so all rows behind it are lost: close it, or write it twice ("") where it is text'
                ) from None


def _lines(file: TextFile) -> Iterator[bytes]:
    """The lines of a file with their line ends."""
    rest = b""
    for start in range(file.start, file.size, CHUNK):
        *whole, rest = (rest + file.read(start, start + CHUNK)).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _delimiter(file: TextFile) -> str:
    """What separates the names of the columns: a comma, or what Excel writes in countries with a decimal comma."""
    names = file.read(file.start, file.start + CHUNK).split(b"\n", 1)[0].decode("latin-1")
    return max(_DELIMITERS, key=names.count)
