"""One data file, read by row: the contract of the readers, and the choice of a reader by the file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.rows import ColumnType

PACKED = (".gz", ".bz2", ".zst")
"""A data file may be compressed as a whole. It is unpacked to a temporary file when it is opened."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Names of data files end so, or so and one of `PACKED`."""


class UnreadableRow(Exception):  # noqa: N818 — becomes a `BadRow`, which knows the file and the row
    """One row of a file cannot be read. The text says why, without the row's number."""


class Reader(Protocol):
    """The rows of one file. Safe for threads; opening reads no more than it must to know how many rows there are."""

    @property
    def columns(self) -> Mapping[str, ColumnType]: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0. Raises `UnreadableRow`."""
        ...


def refuse_doubled(path: Path, names: Sequence[str]) -> None:
    """Raise `ConfigError` where two columns have one name."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(
            f"task.path={path} has two columns named {doubled[0]!r}, so it is unclear which is meant: rename one"
        )


def is_data_file(name: str) -> bool:
    """Whether a file of this name can be read as rows.

    >>> [is_data_file(name) for name in ("a.parquet", "b.JSONL.gz", "README.md", "c.png")]
    [True, True, False, False]
    """
    return suffix_of(name) is not None


def suffix_of(name: str) -> str | None:
    """The format of a data file, one of `SUFFIXES`; None if it is none.

    >>> suffix_of("b.JSONL.gz")
    '.jsonl'
    """
    name = name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def open_file(path: Path, cache: ByteLRU[Any, Any]) -> Reader:
    """A reader of the file, which exists; what it decodes may be kept in `cache`.

    Raises `ConfigError` where the file as a whole cannot be read."""
    suffix = suffix_of(path.name)
    try:
        if suffix in (".jsonl", ".ndjson", ".json"):
            from vlmrl.tasks.dataset.sources.json_file import open_json

            return open_json(path)
        if suffix == ".parquet":
            from vlmrl.tasks.dataset.sources.parquet_file import ParquetReader

            return ParquetReader(path, cache)
        if suffix in (".csv", ".tsv"):
            from vlmrl.tasks.dataset.sources.csv_file import CsvReader

            return CsvReader(path)
        if suffix in (".arrow", ".feather"):
            from vlmrl.tasks.dataset.sources.arrow_file import ArrowReader

            return ArrowReader(path, cache)
    except PermissionError:
        raise ConfigError(
            f"task.path={path} may not be read by this user, so there are no rows: give the user permission "
            f"(chmod +r), or copy the file"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"task.path={path} cannot be read ({error.strerror or error}), so there are no rows: copy the file again"
        ) from None
    raise ConfigError(
        f"task.path={path} is no data file, so there are no rows: name a file that ends in {', '.join(SUFFIXES)}, "
        f"or in one of these and {', '.join(PACKED)}"
    )
