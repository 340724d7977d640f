"""Rows of a data set: what every source gives, whatever it is read from.

    path, hub id ──sources.opening.open_rows──▶ Rows ──row(417)──▶ {"question": "…", "answer": "7"}

A `Rows` opens without reading the data, gives any row for the price of that row, and may be used by several threads.
Cells arrive raw: `vlmrl.tasks.dataset.columns` and `images` give them a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

Kind: TypeAlias = Literal["text", "integer", "number", "boolean", "bytes", "list", "struct", "time", "null", "mixed"]
"""`null`: no value but None was seen. `mixed`: values of several kinds, as only JSON can have, or of a rare one."""


@dataclass(frozen=True)
class ColumnType:
    """What the cells of a column are. Any cell may be None."""

    kind: Kind
    item: ColumnType | None = None
    """Of a list: what its items are."""
    fields: Mapping[str, ColumnType] = field(default_factory=dict)
    """Of a struct: the type of each field."""
    is_image: bool = False
    """The file says that this is an image (`Image` of Hugging Face `datasets`): a struct {bytes, path}."""
    is_video: bool = False
    """The file says that this is a video (`Video` of `datasets`): a struct {bytes, path}."""
    labels: tuple[str, ...] = ()
    """The file has names for the integers of this column (`ClassLabel` of `datasets`): the name of 0, of 1, …"""

    def __str__(self) -> str:
        """As it is printed: `list of struct {bytes: bytes, path: text}`."""
        if self.is_image:
            return "image"
        if self.is_video:
            return "video"
        if self.kind == "list" and self.item is not None:
            return f"list of {self.item}"
        if self.kind == "struct":
            return "struct {" + ", ".join(f"{name}: {kind}" for name, kind in self.fields.items()) + "}"
        return self.kind


class Rows(Protocol):
    """A finite sequence of rows with random access."""

    @property
    def name(self) -> str:
        """Short name for records and messages: `train.parquet`, or `hiyouga/geometry3k` for a hub id."""
        ...

    @property
    def origin(self) -> str:
        """One line for the run's log: which files of which source, split and revision were opened."""
        ...

    @property
    def columns(self) -> Mapping[str, ColumnType]:
        """Column → type, in the order of the file. Of JSON, which has no schema: as found in the first rows."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, 0 to `len` - 1: every name of `columns`, None where the row has no value, and what else it has.

        Raises `vlmrl.tasks.base.BadRow` where this row cannot be read.
        """
        ...

    def where(self, index: int) -> tuple[str, int]:
        """File and row (from 0) in it, for records and messages: `("train-00001-of-00002.parquet", 417)`."""
        ...

    def folder(self, index: int) -> str | None:
        """The folder of the file of this row, to which paths in its cells are relative; None where there is no file."""
        ...

    def root(self, index: int) -> str | None:
        """Of a row from a hub: the folder of its data set, which paths in its cells may not leave. None: the row is of
        this machine, and its paths may lead anywhere."""
        ...
