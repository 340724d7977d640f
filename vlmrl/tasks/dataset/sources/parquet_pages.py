"""Some pages of a Parquet file, decoded by themselves.

pyarrow decodes whole row groups, and a row group may be the whole file: pandas writes up to a million rows into one. So
the pages that hold a row are found by their headers, and pyarrow decodes a small file in memory that has those pages
and no others.

    column chunk   [dictionary][page 0][page 1][page 2]…      headers are read one after another, values are not
                        │                 │
    small file     "PAR1" [dictionary][page 1] footer "PAR1" ──pyarrow──▶ the rows of page 1

A page of a column without lists has one value per row. With lists, the rows that begin in a page are counted from the
repetition levels at its front (0: a row begins), of the smallest column of the same list.

Format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmrl.tasks.dataset.sources.raw_file import RawFile
from vlmrl.tasks.dataset.sources.reader import UnreadableRow
from vlmrl.tasks.dataset.sources.thrift import (
    BINARY,
    I32,
    I64,
    LIST,
    STRUCT,
    Truncated,
    read_struct,
    read_value,
    write_list,
    write_struct,
)

MAGIC = b"PAR1"
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
_DICTIONARY_ENCODINGS = (2, 8)
_RLE = 3
_REPEATED = 2
_CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "BROTLI": 4, "ZSTD": 6, "LZ4": 7}
_HEADER_BYTES = (256, 1 << 14, 1 << 22)
"""Bytes that are read for a page header, until it is whole: its statistics may quote long values."""


@dataclass(frozen=True)
class Leaf:
    """A column of values: Parquet stores a struct as one for each of its fields."""

    number: int
    path: tuple[str, ...]
    physical: int
    """Number of its type in the format."""
    repetition: int
    """Lists around the value; 0: one value per row."""
    lists: tuple[str, ...]
    """The path up to its innermost list. Leaves with the same one have their rows begin at the same values."""


@dataclass(frozen=True)
class Chunk:
    """The pages of one leaf in one row group. Offsets are bytes in the file."""

    leaf: Leaf
    codec: str
    num_values: int
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a page says of itself."""

    kind: int
    num_bytes: int
    """Of its content, as it stands in the file."""
    unpacked_bytes: int
    num_values: int
    encoding: int
    level_encoding: int
    """How the repetition levels are written, in a page of the first version."""
    level_bytes: int
    """Bytes of the repetition levels, in a page of the second version."""


@dataclass(frozen=True)
class Page:
    """A page of values."""

    header: Header
    start: int
    body: int
    """Where its content begins, behind the header."""
    end: int

    @property
    def in_dictionary(self) -> bool:
        """Whether the values are positions in the chunk's dictionary page."""
        return self.header.encoding in _DICTIONARY_ENCODINGS


@dataclass(frozen=True)
class Part:
    """Some pages of a chunk, as they stand in the file, with the dictionary page before them where they need it."""

    chunk: Chunk
    num_values: int
    content: bytes


@dataclass(frozen=True)
class Pages:
    """The pages of a chunk, by their headers."""

    dictionary: tuple[int, int] | None
    """Where the dictionary page begins and ends."""
    pages: tuple[Page, ...]
    first_values: NDArray[np.int64]
    """int64 [pages + 1]: values before each page, and all of them."""


class RowStarts:
    """The values with which rows begin."""

    def __init__(self, starts: NDArray[np.int64] | None) -> None:
        """`starts` int64 [rows + 1]: the first value of each row, counted from 0, and the number of values. None: each
        row has one value."""
        self._starts = starts

    @property
    def num_bytes(self) -> int:
        return 0 if self._starts is None else self._starts.nbytes

    def value(self, row: int) -> int:
        """The first value of a row."""
        return row if self._starts is None else int(self._starts[row])

    def row(self, value: int) -> int:
        """How many rows begin before a value."""
        return value if self._starts is None else int(np.searchsorted(self._starts, value))

    def is_start(self, value: int) -> bool:
        return self._starts is None or int(self._starts[self.row(value)]) == value


def read_schema(file: RawFile) -> tuple[bytes, list[Leaf]]:
    """The schema in the footer of a Parquet file: as it stands there, and its leaves."""
    tail = file.read(file.size - 8, file.size)
    footer = file.read(file.size - 8 - int.from_bytes(tail[:4], "little"), file.size - 8)
    _, start = read_struct(footer, until=2)
    elements, end = read_value(footer, start, LIST)
    leaves: list[Leaf] = []
    unread = iter(elements)

    def walk(path: tuple[str, ...], lists: tuple[str, ...], repetition: int) -> None:
        element = next(unread)
        path = (*path, element[4].decode())
        if element.get(3) == _REPEATED:
            lists, repetition = path, repetition + 1
        for _ in range(element.get(5) or 0):
            walk(path, lists, repetition)
        if not element.get(5) and 1 in element:
            leaves.append(Leaf(len(leaves), path, element[1], repetition, lists))

    for _ in range(next(unread)[5]):
        walk((), (), 0)
    return footer[start:end], leaves


def chunk_of(leaf: Leaf, column: Any) -> Chunk:
    """The chunk that a `pyarrow.parquet.ColumnChunkMetaData` describes."""
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
        start = column.dictionary_page_offset
    return Chunk(leaf, column.compression, column.num_values, start, start + column.total_compressed_size)


def read_pages(file: RawFile, chunk: Chunk) -> Pages:
    """Find the pages of a chunk by reading their headers. Raises `UnreadableRow`."""
    pages: list[Page] = []
    dictionary = None
    start, values = chunk.start, 0
    while values < chunk.num_values:
        header, body = _read_header(file, start, chunk.end)
        end = body + header.num_bytes
        if end > chunk.end:
            raise _damaged("a page reaches beyond its column")
        if header.kind == DICTIONARY_PAGE:
            dictionary = (start, end)
        elif header.kind in (DATA_PAGE, DATA_PAGE_V2):
            pages.append(Page(header, start, body, end))
            values += header.num_values
        start = end
    counts = np.array([0, *(page.header.num_values for page in pages)], np.int64)
    return Pages(dictionary, tuple(pages), np.cumsum(counts))


def read_row_starts(file: RawFile, chunk: Chunk, pages: Pages, num_rows: int) -> RowStarts:
    """With which values of a chunk its rows begin. Reads each page of the chunk. Raises `UnreadableRow`."""
    starts = []
    for first, page in zip(pages.first_values, pages.pages, strict=False):
        levels = _repetition_levels(file, chunk, page)
        starts.append(np.flatnonzero(levels == 0) + first)
    found = np.concatenate([*starts, np.array([chunk.num_values], np.int64)])
    if len(found) != num_rows + 1 or found[0] != 0:
        raise _damaged("its lists do not add up to its rows")
    return RowStarts(found)


def small_file(schema: bytes, about: Any, num_rows: int, parts: Sequence[Part], leaves: Sequence[Leaf]) -> bytes:
    """A Parquet file of one row group with some pages of some leaves. The other leaves of the schema have no values.

    `schema` is the list of the original footer, as bytes, and `about` its `pyarrow.parquet.FileMetaData`.
    """
    content, columns = [MAGIC], {}
    size = len(MAGIC)
    for part in parts:
        leaf = part.chunk.leaf
        columns[leaf.number] = _column(leaf, part.chunk.codec, part.num_values, size, len(part.content))
        content.append(part.content)
        size += len(part.content)
    empty = [columns.get(leaf.number) or _column(leaf, "UNCOMPRESSED", 0, len(MAGIC), 0) for leaf in leaves]
    group = write_struct([(1, LIST, write_list(STRUCT, empty)), (2, I64, size), (3, I64, num_rows)])
    notes = [write_struct([(1, BINARY, key), (2, BINARY, value)]) for key, value in (about.metadata or {}).items()]
    footer = write_struct(
        [
            (1, I32, 2),
            (2, LIST, schema),
            (3, I64, num_rows),
            (4, LIST, write_list(STRUCT, [group])),
            (5, LIST, write_list(STRUCT, notes)),
            (6, BINARY, about.created_by.encode()),
        ]
    )
    return b"".join((*content, footer, len(footer).to_bytes(4, "little"), MAGIC))


def _column(leaf: Leaf, codec: str, num_values: int, start: int, size: int) -> bytes:
    """`ColumnChunk` with its `ColumnMetaData`. A dictionary page is recognized by its header."""
    about = [
        (1, I32, leaf.physical),
        (2, LIST, write_list(I32, [0, _RLE, 8])),
        (3, LIST, write_list(BINARY, [name.encode() for name in leaf.path])),
        (4, I32, _CODECS[codec]),
        (5, I64, num_values),
        (6, I64, size),
        (7, I64, size),
        (9, I64, start),
    ]
    return write_struct([(2, I64, 0), (3, STRUCT, write_struct(about))])


def _read_header(file: RawFile, start: int, end: int) -> tuple[Header, int]:
    """A `PageHeader`, and where the content of the page begins. Raises `UnreadableRow`."""
    for most in _HEADER_BYTES:
        data = file.read(start, min(start + most, end))
        try:
            fields, size = read_struct(data)
            return _header(fields), start + size
        except Truncated:
            continue
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    raise _damaged("a page has no readable header")


def _header(fields: dict[int, Any]) -> Header:
    """The `PageHeader` of these fields. Raises KeyError, TypeError or ValueError where they make no header."""
    kind = operator.index(fields[1])
    numbers = {DATA_PAGE: (5, 1, 2, 4, None), DATA_PAGE_V2: (8, 1, 4, None, 6), DICTIONARY_PAGE: (7, 1, 2, None, None)}
    about, *places = numbers.get(kind, (None, None, None, None, None))
    inner = fields[about] if about is not None else {}
    found = (operator.index(number) for number in (fields[3], fields[2]))
    header = Header(kind, *found, *(0 if place is None else operator.index(inner[place]) for place in places))
    if min(header.num_bytes, header.unpacked_bytes, header.num_values, header.level_bytes) < 0:
        raise ValueError("a size is negative")
    return header


def _damaged(what: str) -> UnreadableRow:
    return UnreadableRow(f"the Parquet file is damaged ({what}): copy it again")


# ── repetition levels ───────────────────────────────────────────────────────────────────────────────────────


def _repetition_levels(file: RawFile, chunk: Chunk, page: Page) -> NDArray[np.int64]:
    """int64 [values] of a page: 0 where a row begins."""
    import pyarrow

    width = chunk.leaf.repetition.bit_length()
    content = file.read(page.body, page.end)
    if page.header.kind == DATA_PAGE_V2:  # uncompressed levels come first
        return _unpack_levels(content[: page.header.level_bytes], width, page.header.num_values)
    if page.header.level_encoding != _RLE:
        raise UnreadableRow("the Parquet file packs its lists in a way that is out of use since 2013: write it again")
    if chunk.codec != "UNCOMPRESSED":
        try:
            content = pyarrow.decompress(
                content,
                page.header.unpacked_bytes,
                {"LZ4": "lz4_raw"}.get(chunk.codec, chunk.codec.lower()),
                asbytes=True,
            )
        except (OSError, ValueError) as error:
            raise _damaged(f"a page cannot be unpacked: {error}") from None
    size = int.from_bytes(content[:4], "little")
    return _unpack_levels(content[4 : 4 + size], width, page.header.num_values)


def _unpack_levels(data: bytes, width: int, count: int) -> NDArray[np.int64]:
    """Decode Parquet's hybrid of run lengths and bit-packed integers of `width` bits."""
    runs: list[NDArray[np.int64]] = []
    place = done = 0
    try:
        while done < count:
            head = shift = 0
            while True:
                head |= (data[place] & 0x7F) << shift
                shift += 7
                place += 1
                if data[place - 1] < 0x80:
                    break
            if head & 1:
                size = (head >> 1) * width
                bits = np.unpackbits(np.frombuffer(data, np.uint8, size, place), bitorder="little")
                run = bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
                place += size
            else:
                run = np.full(min(head >> 1, count - done), data[place], np.int64)  # levels are below 256
                place += 1
            runs.append(run)
            done += len(run)
    except (IndexError, ValueError):
        raise _damaged("the lists of a page cannot be read") from None
    return np.concatenate(runs)[:count] if runs else np.zeros(0, np.int64)
