"""JSON rows: one object per line, an array of objects, an object with one list, or an object of columns.

The content decides, not the name, since many files named .json hold lines. Lines and arrays are indexed: an array of
numbers says where each row begins (8 bytes a row), and a row is parsed when it is drawn. The two kinds of objects are
parsed at once.

    file ──find the beginnings──▶ int64 [rows] ──row(i)──▶ bytes ──parse──▶ dict
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.json_types import column_types
from vlmrl.tasks.dataset.sources.raw_file import TextFile
from vlmrl.tasks.dataset.sources.reader import Reader, UnreadableRow, suffix_of

CHUNK = 8 << 20
"""Bytes that are searched for line ends at a time."""

SAMPLE = 100
"""Rows from which the columns and their types are taken; JSON has no schema."""

SAMPLE_BYTES = 32 << 20
"""The sample ends after so many bytes, however few rows they are: a row may hold images."""

MAX_ROW_BYTES = 512 << 20
"""A longer row is one bad row: its file has no line ends rather than rows of that size."""

MAX_OBJECT_BYTES = 1 << 30
"""A larger JSON object of lists is refused: it is parsed as a whole, into about five times its bytes of memory."""

_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL)
"""Strings, and the brackets outside of them."""


def open_json(path: Path) -> Reader:
    """Open a file of JSON, whichever of the four shapes it has. Raises `ConfigError`."""
    file = TextFile(path)
    first = file.read(file.start, file.start + 4096).lstrip()[:1]
    if first == b"[":
        return JsonIndex(file, _array_starts(file), separator=b",")
    if first == b"{" and suffix_of(path.name) == ".json" and not _is_lines(file):
        return _open_object(file)
    return JsonIndex(file, _line_starts(file))


class JsonIndex:
    """Rows of a JSON file by the positions where they begin: lines, or elements of an array."""

    def __init__(self, file: TextFile, starts: NDArray[np.int64], separator: bytes = b"") -> None:
        """`starts` int64 [rows + 1]: where each row begins, and the end of the last. `separator` may follow a row."""
        self._file = file
        self._starts = starts
        self._separator = separator
        self.columns: Mapping[str, ColumnType] = column_types(self._sample())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int) -> dict[str, Any]:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        if end - start > MAX_ROW_BYTES:
            raise UnreadableRow(f"the row has {end - start} bytes; {MAX_ROW_BYTES} are the most that a row may have")
        return parse_object(self._file.read(start, end).strip().removesuffix(self._separator))

    def _sample(self) -> Iterator[dict[str, Any]]:
        """The first rows, without those that cannot be read. Raises `ConfigError` where that leaves none."""
        reason, good, num_bytes = "", 0, 0
        for index in range(min(len(self), SAMPLE)):
            try:
                row = self.row(index)
            except UnreadableRow as error:
                reason = reason or str(error)
                continue
            yield row
            good += 1
            num_bytes += int(self._starts[index + 1] - self._starts[index])
            if num_bytes > SAMPLE_BYTES:
                return
        if reason and not good:
            raise ConfigError(
                f"task.path={self._file.path}: none of its first rows can be read ({reason}), "
                "so it seems to be no file of JSON rows: write one object per line, or an array of objects"
            )


class JsonObjects:
    """Rows that were parsed at once."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows
        self.columns: Mapping[str, ColumnType] = column_types(row for row in rows[:SAMPLE] if isinstance(row, dict))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        return dict(_checked(self._rows[index]))


class JsonColumns:
    """Rows of an object of columns, {"question": ["…", "…"], "answer": ["7", "9"]}."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], count: int) -> None:
        self._columns = columns
        self._count = count
        self.columns: Mapping[str, ColumnType] = column_types(self.row(index) for index in range(min(count, SAMPLE)))

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> dict[str, Any]:
        return {name: cells[index] for name, cells in self._columns.items()}


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that a row is. Raises `UnreadableRow`.

    >>> parse_object(b'{"a": 36893488147419103232, "b": NaN}'), parse_object(b'{"a": [36893488147419103232]}')
    ({'a': 36893488147419103232, 'b': nan}, {'a': [36893488147419103232]})
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = _parsed_by_python(data)
    else:
        if _may_be_rounded(value):
            value = _parsed_by_python(data)
    return _checked(value)


def _may_be_rounded(value: Any) -> bool:
    """Whether a number in the row may be an integer of more than 64 bits, such as an id: orjson makes a float of it."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, float) and abs(each) >= 2.0**63:
            return True
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return False


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnreadableRow(f"the row is JSON of type {type(value).__name__}, not an object with columns")
    return value


def _parsed_by_python(data: bytes) -> Any:
    """Python's own parser takes what orjson refuses and Python writes: NaN, and integers of more than 64 bits."""
    try:
        text = data.decode()
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UnreadableRow(f"the row is not UTF-8 (byte {error.start}): convert the file to UTF-8") from None
    except UnicodeEncodeError:
        raise UnreadableRow("the row has half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except json.JSONDecodeError as error:
        raise UnreadableRow(f"the row is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise UnreadableRow("the row is nested too deeply") from None
    except ValueError as error:  # an integer of more than 4300 digits
        raise UnreadableRow(f"the row cannot be parsed: {error}") from None
    return value


# ── where rows begin ────────────────────────────────────────────────────────────────────────────────────────


def _line_starts(file: TextFile) -> NDArray[np.int64]:
    """int64 [lines + 1]: where each line that is not empty begins, and the end of the file."""
    ends = [np.array([file.start - 1], np.int64)]
    for start in range(file.start, file.size, CHUNK):
        chunk = np.frombuffer(file.read(start, start + CHUNK), np.uint8)
        ends.append(np.flatnonzero(chunk == ord("\n")) + start)
    ends.append(np.array([file.size], np.int64))
    marks = np.concatenate(ends)
    starts, lengths = marks[:-1] + 1, np.diff(marks) - 1
    filled = lengths > 1
    for place in np.flatnonzero(lengths == 1):  # an empty line of Windows is a carriage return
        filled[place] = file.read(int(starts[place]), int(starts[place]) + 1).strip() != b""
    return np.append(starts[filled], file.size)


def _array_starts(file: TextFile) -> NDArray[np.int64]:
    """int64 [elements + 1]: where each element of the array begins, and the end of the last. Raises `ConfigError`."""
    starts: list[int] = []
    end, depth = file.start, 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for token in _TOKENS.finditer(data, file.start):
            mark = data[token.start()]
            if depth == 1 and mark in b'{["':
                gap = data[end : token.start()].strip()
                if gap != (b"," if starts else b"") or mark == ord('"'):
                    raise _not_objects(file, len(starts))
                starts.append(token.start())
            if mark in b"{[":
                depth += 1
                end = token.end() if depth == 1 else end
            elif mark in b"}]":
                depth -= 1
                end = token.end() if depth == 1 else end
            if depth == 0:
                if data[end : token.start()].strip():
                    raise _not_objects(file, len(starts))
                return np.array([*starts, end], np.int64)
    raise ConfigError(
        f"task.path={file.path} ends inside its array, in row {max(len(starts) - 1, 0)}: copy the whole file"
    )


def _not_objects(file: TextFile, element: int) -> ConfigError:
    return ConfigError(
        f"task.path={file.path}: element {element} of its array is not an object, so it is no row: write an array of "
        "objects, or one object per line"
    )


# ── objects that are parsed at once ─────────────────────────────────────────────────────────────────────────


def _is_lines(file: TextFile) -> bool:
    """Whether the first line is an object by itself and more lines follow."""
    head = b""
    for start in range(file.start, min(file.size, file.start + MAX_ROW_BYTES), CHUNK):
        part = file.read(start, start + CHUNK)
        line, newline, _ = (head + part).lstrip().partition(b"\n")
        if newline:
            break
        head += part
    else:
        return False
    try:
        parse_object(line)
    except UnreadableRow:
        return False
    return file.read(file.start, file.start + len(head) + CHUNK).strip() != line.strip()


def _open_object(file: TextFile) -> Reader:
    """An object with one list of rows, or an object of columns. Raises `ConfigError`."""
    if file.size > MAX_OBJECT_BYTES:
        raise ConfigError(
            f"task.path={file.path} is one JSON object of {file.size / 2**30:.1f} GiB, which would have to be parsed "
            "as a whole: write one object per line"
        )
    try:
        value = parse_object(file.read(file.start, file.size))
    except UnreadableRow as error:
        reason = str(error).replace("the row", "it")
        raise ConfigError(f"task.path={file.path} cannot be read: {reason}. Write one object per line") from None
    lists = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    lengths = {len(cells) for cells in lists.values()}
    if len(lists) == 1 and (rows := next(iter(lists.values()))) and all(isinstance(row, dict) for row in rows):
        return JsonObjects(rows)
    if lists and len(lists) == len(value) and len(lengths) == 1:
        return JsonColumns(lists, lengths.pop())
    if value and all(isinstance(cells, dict) for cells in value.values()):  # as pandas' to_json writes columns
        names = list(next(iter(value.values())))
        if all(list(cells) == names for cells in value.values()):
            return JsonColumns({name: list(cells.values()) for name, cells in value.items()}, len(names))
    found = ", ".join(f"{name}: {type(cells).__name__}" for name, cells in list(value.items())[:8]) or "nothing"
    raise ConfigError(
        f"task.path={file.path} is one JSON object ({found}), which is neither one list of objects nor columns of "
        "equal length, so it has no rows: write one object per line, or an array of objects"
    )
