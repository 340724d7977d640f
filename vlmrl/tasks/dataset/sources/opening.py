"""From `task.path` to rows: a file, a pattern of files, a folder, a list of them, or a hub id.

task.path ─▶ exists here? ──yes──▶ file ──────────────────────────────▶ one reader
                          │        folder of save_to_disk ─▶ its split ─▶ readers
                          │        other folder ─▶ repository.choose ──▶ readers
                          ├─a pattern──▶ its files ────────────────────▶ readers
                          └─no───▶ hub.download ─▶ repository.choose ──▶ readers
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError
from vlmrl.record.run_dir import ROLLOUTS_NAME
from vlmrl.tasks.base import BadRow
from vlmrl.tasks.dataset.rows import ColumnType, Rows
from vlmrl.tasks.dataset.sources import hub
from vlmrl.tasks.dataset.sources.json_types import merged
from vlmrl.tasks.dataset.sources.reader import Reader, UnreadableRow, open_file
from vlmrl.tasks.dataset.sources.repository import Chosen, by_split, choose

CACHE_BYTES = 16 << 20
"""Decoded row groups and pages that the files of a source keep together. Rows in file order need those of one place;
for shuffled rows of a million, 64 MB were no faster (16 ms a row) and cost 55 MB of memory more."""

_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
"""Of `task.rows`."""

_README_BYTES = 1 << 20


@dataclass(frozen=True)
class Keys:
    """The keys next to `task.path`."""

    config: str | None = None
    """`task.name`."""
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class DataFile:
    """One opened file."""

    name: str
    """As records and messages name it."""
    folder: str | None
    reader: Reader
    root: str | None
    """The folder of its hub data set; None for a file of this machine."""


@dataclass(frozen=True)
class Entry:
    """What one entry of `task.path` names."""

    name: str
    origin: str
    files: Sequence[Path] = ()
    table: Reader | None = None
    """Rows that `datasets` has made, of a repository without files of rows."""
    root: str | None = None
    """The folder of a hub data set."""


def open_rows(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    rows: str | None = None,
) -> Rows:
    """Open the rows of `task.path`, with the keys next to it: `name` is the config of a hub data set, and `rows` a
    range such as "0:500". Raises `ConfigError`.

    Reads headers, footers and, of formats without an index, the file; of a hub data set, what is not in its cache is
    downloaded first.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ConfigError("task.path=[] names no file, so there are no rows: name one")
    keys = Keys(name, split, revision)
    entries = [_entry(each, keys) for each in paths]
    cache: ByteLRU[Any, Any] = ByteLRU(CACHE_BYTES)
    files = [file for entry in entries for file in _opened(entry, cache)]
    short = entries[0].name if len(entries) == 1 else f"{entries[0].name} and {len(entries) - 1} more"
    opened = FileRows(short, "; ".join(entry.origin for entry in entries), files)
    return opened if rows is None else RowRange(opened, rows)


def _opened(entry: Entry, cache: ByteLRU[Any, Any]) -> list[DataFile]:
    if entry.table is not None:
        return [DataFile(entry.name, None, entry.table, entry.root)]
    return [DataFile(file.name, str(file.parent), open_file(file, cache), entry.root) for file in entry.files]


def _entry(path: str, keys: Keys) -> Entry:
    """What one entry of `task.path` names. Raises `ConfigError`."""
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return _folder_entry(path, place, keys)
    if place.exists():
        _refuse_hub_keys(path, keys, "a file")
        return _files_entry(path, [place], keys)
    if glob.has_magic(path):
        _refuse_hub_keys(path, keys, "a pattern of files")
        found = _matching_files(str(place))
        if not found:
            raise ConfigError(f"task.path={path} matches no file, so there are no rows: correct the pattern")
        if keys.split is None and _are_rollouts(found):
            keys = dataclasses.replace(keys, split="train")
        return _files_entry(path, found, keys)
    if not hub.is_hub_id(path):
        raise ConfigError(f"task.path={path} does not exist, so there are no rows: correct the path")
    return _hub_entry(path, keys)


def _matching_files(pattern: str) -> list[Path]:
    """The files that a pattern matches, each once: a link to a folder can lead to the same files again, without end."""
    files: dict[tuple[str, str], Path] = {}
    for file in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if file.is_file():
            files.setdefault((os.path.realpath(file.parent), file.name), file)
    return list(files.values())


def _are_rollouts(files: Sequence[Path]) -> bool:
    """Whether files are rollouts of runs, of training steps and of evaluations. A run that learns from them learns from
    the training steps, because the others are its held-out problems."""
    kinds = {name[1] if name else None for name in (ROLLOUTS_NAME.fullmatch(file.name) for file in files)}
    return kinds == {"step", "eval"}


def _files_entry(path: str, files: Sequence[Path], keys: Keys) -> Entry:
    """Files that are named themselves: all of them, or with `task.split` those whose name says this split."""
    others: list[str] = []
    if keys.split is not None:
        splits = by_split([str(file) for file in files])
        if keys.split not in splits:
            raise ConfigError(
                f"task.split={keys.split}: by their names, the files of task.path={path} are of {', '.join(splits)}, "
                "so there are no rows: leave the split out, or choose one of these"
            )
        files = [Path(file) for file in splits[keys.split]]
        others = [split for split in splits if split != keys.split]
    count = "" if len(files) == 1 and not others else f" ({_of_splits(len(files), others)})"
    origin = path + count
    return Entry(files[0].name if len(files) == 1 else Path(path).name, origin, files)


def _folder_entry(path: str, folder: Path, keys: Keys) -> Entry:
    """A folder: of `save_to_disk`, of a run, or of data files."""
    if (folder / "config.yaml").is_file() and (folder / "rollouts").is_dir():
        path, folder = f"{path.rstrip('/')}/rollouts", folder / "rollouts"
    wins = ", a folder on this machine, which wins over a hub data set of this name" if hub.is_hub_id(path) else ""
    if (folder / "dataset_dict.json").is_file():
        splits = [name for name in _noted(folder / "dataset_dict.json", "splits") if isinstance(name, str)]
        chosen = choose(
            [f"{split}/{file}" for split in splits for file in _saved_files(folder / split)],
            _configs_of(splits),
            config=keys.config,
            split=keys.split,
            where=path,
        )
    elif (folder / "state.json").is_file():
        _refuse_hub_keys(path, keys, "a folder of save_to_disk")
        if keys.split not in (None, "train"):
            raise ConfigError(
                f"task.split={keys.split}: {path} was saved as one split, so it has no other: leave task.split out"
            )
        chosen = Chosen(tuple(_saved_files(folder)), "default", "train")
    else:
        files = [place.relative_to(folder).as_posix() for place in folder.rglob("*") if place.is_file()]
        readme = folder / "README.md"
        text = readme.read_bytes()[:_README_BYTES].decode(errors="replace") if readme.is_file() else ""
        chosen = choose(files, text, config=keys.config, split=keys.split, where=path)
    if keys.revision is not None:
        _refuse_hub_keys(path, Keys(revision=keys.revision), "a folder")
    return Entry(folder.name, f"{path}{wins}, {_described(chosen)}", [folder / file for file in chosen.files])


def _hub_entry(path: str, keys: Keys) -> Entry:
    """A data set of the hub."""
    found = hub.download(path, config=keys.config, split=keys.split, revision=keys.revision)
    at = f"{path} of the hub, revision {found.commit}"
    if found.table is not None:
        return Entry(path, f"{at}, read by datasets", table=found.table, root=str(found.folder))
    files = [found.folder / file for file in found.chosen.files]
    return Entry(path, f"{at}, {_described(found.chosen)}", files, root=str(found.folder))


def _described(chosen: Chosen) -> str:
    files = _of_splits(len(chosen.files), chosen.other_splits)
    left_out = f"; not read: {len(chosen.left_out)} in another format, {chosen.left_out[0]}" if chosen.left_out else ""
    config = "" if chosen.config == "default" else f"config {chosen.config}, "
    return f"{config}split {chosen.split}: {files}{left_out}"


def _of_splits(files: int, others: Sequence[str]) -> str:
    """The number of files of a split, and what the other splits are called."""
    count = "1 file" if files == 1 else f"{files} files"
    return count + (f"; task.split={'|'.join(others)} reads others" if others else "")


def _saved_files(folder: Path) -> list[str]:
    """The Arrow files of a `save_to_disk` folder, in order."""
    files = _noted(folder / "state.json", "_data_files")
    return [str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file]


def _configs_of(splits: Sequence[str]) -> str:
    """What a README.md would say of these splits, each in a folder of its name."""
    files = [{"split": split, "path": f"{glob.escape(split)}/*"} for split in splits]
    return f"---\n{orjson.dumps({'configs': [{'config_name': 'default', 'data_files': files}]}).decode()}\n---\n"


def _noted(path: Path, key: str) -> list[Any]:
    """A list in a JSON file that `save_to_disk` wrote. Raises `ConfigError`."""
    try:
        noted = orjson.loads(path.read_bytes())[key]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"task.path={path.parent} is no whole folder of save_to_disk ({path.name}: {error}), so there are no rows: "
            "save it again"
        ) from None
    return noted if isinstance(noted, list) else []


def _refuse_hub_keys(path: str, keys: Keys, what: str) -> None:
    """Refuse keys that have a meaning for a hub data set alone."""
    for key, value in (("task.name", keys.config), ("task.revision", keys.revision)):
        if value is not None:
            raise ConfigError(
                f"{key}={value}: task.path={path} is {what} on this machine, which has none, so the key would have no "
                "effect: leave it out"
            )


class FileRows:
    """The rows of files, one file after another."""

    def __init__(self, name: str, origin: str, files: Sequence[DataFile]) -> None:
        """Raises `ConfigError` where there is no row, or where two files contradict each other."""
        self.name = name
        self.origin = origin
        self._files = files
        self._ends = np.cumsum([len(file.reader) for file in files])
        if not self._ends[-1]:
            raise ConfigError(f"task.path={origin} has no rows, so there is nothing to learn from: name another file")
        self.columns: Mapping[str, ColumnType] = _one_schema(files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> dict[str, Any]:
        file, place = self._place(index)
        try:
            found = file.reader.row(place)
        except UnreadableRow as error:
            raise BadRow(str(error), source=file.name, row=place) from None
        except OSError as error:
            reason = f"the file cannot be read ({error.strerror or error})"
            raise BadRow(reason, source=file.name, row=place) from None
        return dict.fromkeys(self.columns) | found

    def where(self, index: int) -> tuple[str, int]:
        file, place = self._place(index)
        return file.name, place

    def folder(self, index: int) -> str | None:
        return self._place(index)[0].folder

    def root(self, index: int) -> str | None:
        return self._place(index)[0].root

    def _place(self, index: int) -> tuple[DataFile, int]:
        """File, and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[number], index - (int(self._ends[number - 1]) if number else 0)


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

    def root(self, index: int) -> str | None:
        return self._rows.root(self._range[index])


def _one_schema(files: Sequence[DataFile]) -> dict[str, ColumnType]:
    """The columns of all files. A column that a file lacks is None in its rows; one that has another type in two files
    is refused."""
    columns: dict[str, ColumnType] = {}
    first: dict[str, str] = {}
    for file in files:
        for name, kind in file.reader.columns.items():
            known = columns.get(name, kind)
            both = merged(known, kind)
            if both.kind == "mixed" and "mixed" not in (known.kind, kind.kind):
                raise ConfigError(
                    f"task.path: column {name!r} is {known} in {first[name]} and {kind} in {file.name}, so they have "
                    "no common meaning: convert one of them, or name only one of the files"
                )
            columns[name] = both
            first.setdefault(name, file.name)
    return columns
