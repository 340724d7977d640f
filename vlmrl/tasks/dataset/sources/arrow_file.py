"""Rows of an Arrow file: a stream, as `save_to_disk` of Hugging Face `datasets` writes it, or a file with a footer.

Opening finds the record batches by their headers. A batch is mapped into memory, or unpacked, when a row is drawn.

    file ──headers──▶ batch 0: rows 0 to 999, batch 1: …  ──row(1417)──▶ batch 1, row 417
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError, UserFault, fenced
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.arrow_types import row_of, schema_types
from vlmrl.tasks.dataset.sources.reader import UnreadableRow

_MAGIC = b"ARROW1\0\0"
_LENGTH, _COMPRESSION = 0, 3
"""Fields of Arrow's `RecordBatch`: https://github.com/apache/arrow/blob/main/format/Message.fbs."""
_HEADER = 2
"""Field of Arrow's `Message`."""


class ArrowReader:
    """Rows of an Arrow file by record batches."""

    def __init__(self, path: Path, cache: ByteLRU[Any, Any]) -> None:
        """Raises `ConfigError` where the file is no whole Arrow file."""
        import pyarrow

        self._cache = cache
        try:
            self._schema, self._batches, lengths = _read_batches(path)
        except (pyarrow.ArrowException, OSError, EOFError, struct.error, ValueError) as error:
            what = "is empty" if path.stat().st_size == 0 else f"is no whole Arrow file ({str(error).rstrip('.')})"
            raise ConfigError(f"task.path={path} {what}, so there are no rows: copy it again") from None
        self._ends = np.cumsum(lengths)
        self.columns: Mapping[str, ColumnType] = schema_types(path, self._schema)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> dict[str, Any]:
        import pyarrow

        number = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[number - 1]) if number else 0)
        try:
            return row_of(self._batch(number), place)
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableRow(f"the Arrow file is damaged ({error}): copy it again") from None

    def _batch(self, number: int) -> Any:
        import pyarrow

        batch = self._batches[number]
        if isinstance(batch, pyarrow.RecordBatch):
            return batch

        def read() -> Any:
            return pyarrow.ipc.read_record_batch(batch, self._schema)

        if not _is_packed(batch):  # the batch is a view of the mapped file, made in 50 µs
            return read()
        return self._cache.get_or_make((batch, number), read, lambda made: int(made.nbytes))


class TableReader:
    """Rows of a `pyarrow.Table` that `datasets` has made, mapped into memory. Its images and videos may be files in the
    cache of `datasets` or in an archive there (`zip://1.png::/cache/train.zip`)."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.columns: Mapping[str, ColumnType] = schema_types(Path(), table.schema)
        self._media = [name for name, kind in self.columns.items() if kind.is_image or kind.is_video]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> dict[str, Any]:
        row = row_of(self._table, index)
        for name in self._media:
            cell = row[name]
            if cell is not None and cell["bytes"] is None and cell["path"] is not None:
                row[name] = {"bytes": _content(cell["path"]), "path": None}
        return row


def _content(path: str) -> bytes:
    """What is in a file that `datasets` names. Raises `UnreadableRow`."""
    from datasets.utils.file_utils import xopen

    try:
        with fenced("reading it"), xopen(path, "rb") as file:
            content: bytes = file.read()
            return content
    except UserFault as fault:
        raise UnreadableRow(
            f"the file {path.partition('::')[0]} cannot be read ({fault.text}): download it again"
        ) from None


def _read_batches(path: Path) -> tuple[Any, list[Any], list[int]]:
    """The schema, and of each record batch: its message, or itself where the file has dictionaries, and its rows."""
    import pyarrow

    file = pyarrow.memory_map(str(path))
    has_footer = file.read(len(_MAGIC)) == _MAGIC
    file.seek(len(_MAGIC) if has_footer else 0)
    first = pyarrow.ipc.read_message(file)
    schema = pyarrow.ipc.read_schema(first)
    messages = list(_messages(file))
    if all(message.type == "record batch" for message in messages):
        return schema, messages, [_number(message, _LENGTH) for message in messages]
    file.seek(0)
    if has_footer:
        opened = pyarrow.ipc.open_file(file)
        batches = [opened.get_batch(number) for number in range(opened.num_record_batches)]
    else:
        batches = list(pyarrow.ipc.open_stream(file))
    return schema, batches, [batch.num_rows for batch in batches]


def _messages(file: Any) -> Iterator[Any]:
    """The messages up to the end of the stream, which is eight bytes or the end of the file."""
    import pyarrow

    while True:
        try:
            yield pyarrow.ipc.read_message(file)
        except EOFError:
            return


def _is_packed(message: Any) -> bool:
    data, table = _batch_table(message)
    return _place(data, table, _COMPRESSION) is not None


def _number(message: Any, field: int) -> int:
    """A field of 64 bits of a record batch's header."""
    data, table = _batch_table(message)
    place = _place(data, table, field)
    return 0 if place is None else int(struct.unpack_from("<q", data, place)[0])


def _batch_table(message: Any) -> tuple[bytes, int]:
    """The metadata of a message, and where the `RecordBatch` begins in it."""
    data = message.metadata.to_pybytes()
    place = _place(data, struct.unpack_from("<I", data, 0)[0], _HEADER)
    if place is None:
        raise ValueError("a record batch has no header")
    return data, place + struct.unpack_from("<I", data, place)[0]


def _place(data: bytes, table: int, field: int) -> int | None:
    """Where a field of a flatbuffers table stands; None if it is left out."""
    offsets = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * field >= struct.unpack_from("<H", data, offsets)[0]:
        return None
    offset = struct.unpack_from("<H", data, offsets + 4 + 2 * field)[0]
    return table + offset if offset else None
