"""Rows of a Parquet file: random access for the price of a few pages.

When a file is opened its footer is read, and no data. A row in a small row group is read with its whole group, which is
kept, so that rows in file order cost one read per group. In a large group only the pages that hold the row are decoded
(see `parquet_pages`), one leaf column after another, and the leaves are put together again:

    images.list.element.bytes ──page──▶ [{"bytes": b"…"}]  ┐
    images.list.element.path  ──page──▶ [{"path": "7.png"}] ┴─▶ [{"bytes": b"…", "path": "7.png"}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.arrow_types import is_map_or_dotted, row_of, schema_types
from vlmrl.tasks.dataset.sources.parquet_pages import (
    Chunk,
    Leaf,
    Pages,
    Part,
    RowStarts,
    chunk_of,
    read_pages,
    read_row_starts,
    read_schema,
    small_file,
)
from vlmrl.tasks.dataset.sources.raw_file import RawFile
from vlmrl.tasks.dataset.sources.reader import UnreadableRow

SMALL_GROUP_BYTES = 4 << 20
"""A row group of at most so many bytes is decoded as a whole: one row of it takes about 3 ms."""

HEADER_BYTES = 2000
"""What the header of a page takes in memory once it is parsed."""


class ParquetReader:
    """Rows of a Parquet file. Threads share nothing but the cache."""

    def __init__(self, path: Path, cache: ByteLRU[Any, Any]) -> None:
        """Raises `ConfigError` where the file is no whole Parquet file."""
        import pyarrow
        from pyarrow import parquet

        self._file = RawFile(path)
        self._cache = cache
        try:
            with parquet.ParquetFile(path, pre_buffer=False) as opened:
                self._about, schema = opened.metadata, opened.schema_arrow
            self._schema, self._leaves = read_schema(self._file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _not_whole(self._file, error) from None
        self._ends = np.cumsum([self._about.row_group(group).num_rows for group in range(self._about.num_row_groups)])
        self.columns: Mapping[str, ColumnType] = schema_types(path, schema)
        self._by_pages = not any(is_map_or_dotted(field) for field in schema)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[group - 1]) if group else 0)
        about = self._about.row_group(group)
        if about.total_byte_size <= SMALL_GROUP_BYTES or not self._by_pages:
            return row_of(self._group(group, about), place)
        found: dict[str, Any] = {}
        for leaf in self._leaves:
            part = self._leaf_row(group, about, leaf, place)
            try:
                found = _together(found, part)
            except ValueError:
                raise UnreadableRow("the Parquet file is damaged (lists of one column differ): copy it again") from None
        return found

    def _group(self, number: int, about: Any) -> Any:
        """A whole row group, as a `pyarrow.Table`."""

        def read() -> Any:
            chunks = [chunk_of(leaf, about.column(leaf.number)) for leaf in self._leaves]
            parts = [Part(chunk, chunk.num_values, self._file.read(chunk.start, chunk.end)) for chunk in chunks]
            return self._decoded(about.num_rows, parts, None)

        return self._cache.get_or_make((self._file, number), read, lambda table: int(table.nbytes))

    def _leaf_row(self, group: int, about: Any, leaf: Leaf, place: int) -> dict[str, Any]:
        """Row `place` of a row group, of one leaf alone: {"images": [{"bytes": b"…"}]}."""
        chunk = chunk_of(leaf, about.column(leaf.number))
        pages = self._pages(group, chunk)
        rows = self._row_starts(group, about, chunk)
        starts = pages.first_values
        first = int(np.searchsorted(starts, rows.value(place), side="right")) - 1
        last = int(np.searchsorted(starts, rows.value(place + 1), side="left")) - 1
        while not rows.is_start(int(starts[first])):  # a page may begin inside a row
            first -= 1
        first_row = rows.row(int(starts[first]))

        def read() -> Any:
            wanted = pages.pages[first : last + 1]
            data = self._file.read(wanted[0].start, wanted[-1].end)
            if pages.dictionary is not None and any(page.in_dictionary for page in wanted):
                data = self._file.read(*pages.dictionary) + data
            num_values = int(starts[last + 1] - starts[first])
            part = Part(chunk, num_values, data)
            return self._decoded(rows.row(int(starts[last + 1])) - first_row, [part], [".".join(leaf.path)])

        key = (self._file, group, leaf.number, first, last)
        return row_of(self._cache.get_or_make(key, read, lambda table: int(table.nbytes)), place - first_row)

    def _pages(self, group: int, chunk: Chunk) -> Pages:
        key = (self._file, group, chunk.leaf.number)
        pages: Pages = self._cache.get_or_make(
            key, lambda: read_pages(self._file, chunk), lambda pages: HEADER_BYTES * len(pages.pages)
        )
        return pages

    def _row_starts(self, group: int, about: Any, chunk: Chunk) -> RowStarts:
        """Which values of a chunk begin a row. Every leaf of a list has the same, so the smallest is read."""
        if chunk.leaf.repetition == 0 or chunk.num_values == about.num_rows:
            return RowStarts(None)
        siblings = [
            chunk_of(leaf, about.column(leaf.number))
            for leaf in self._leaves
            if leaf.path[0] == chunk.leaf.path[0] and leaf.lists == chunk.leaf.lists
        ]
        smallest = min(siblings, key=lambda sibling: sibling.end - sibling.start)

        def read() -> RowStarts:
            return read_row_starts(self._file, smallest, self._pages(group, smallest), about.num_rows)

        key = (self._file, group, smallest.leaf.number, "rows")
        found: RowStarts = self._cache.get_or_make(key, read, lambda rows: rows.num_bytes)
        return found

    def _decoded(self, num_rows: int, parts: Sequence[Part], columns: list[str] | None) -> Any:
        """Some pages as a `pyarrow.Table`. Raises `UnreadableRow`."""
        import pyarrow
        from pyarrow import parquet

        data = small_file(self._schema, self._about, num_rows, parts, self._leaves)
        try:
            with parquet.ParquetFile(pyarrow.BufferReader(data), pre_buffer=False) as opened:
                return opened.read_row_group(0, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableRow(
                f"its part of the Parquet file cannot be decoded ({error}): copy the file again"
            ) from None


def _together(one: Any, other: Any) -> Any:
    """Two leaves of one value.

    >>> _together({"images": [{"bytes": b"1"}]}, {"images": [{"path": "a"}], "n": 5})
    {'images': [{'bytes': b'1', 'path': 'a'}], 'n': 5}
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: _together(one[name], value) if name in one else value for name, value in other.items()}
    if isinstance(one, list) and isinstance(other, list):
        return [_together(*items) for items in zip(one, other, strict=True)]
    return other


def _not_whole(file: RawFile, error: Exception) -> ConfigError:
    what = "is empty" if file.size == 0 else f"is no whole Parquet file ({str(error).rstrip('.')})"
    return ConfigError(f"task.path={file.path} {what}, so there are no rows: copy it again, or write it again")
