"""Rows whose images or videos are not found, and the folder in which they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmrl.runs.preview.seen import Refused
from vlmrl.types import Modality

NOT_FOUND = re.compile(r"the (?:image|video) file (.+) does not exist: set task\.(image|video)_root", re.DOTALL)
"""How a row says that its image or video is not there (tasks/dataset/files.py)."""

LARGEST_SEARCH = 2000
"""Folders that are searched for the files."""

DEEPEST_SEARCH = 3
"""Levels of folders below the data."""


@dataclass(frozen=True)
class ImagesNotFound:
    """Rows that are refused because an image, or a video, is not where they say."""

    kind: Modality

    count: int
    rows: tuple[str, ...]
    """`<file>:<row>` of each."""
    first: str
    """The path that was looked for first."""
    candidate: str | None
    """A folder from which the same path exists; None where none was found."""


def images_not_found(
    refused: Sequence[Refused], starts: Mapping[Modality, Path | None], data: Path
) -> ImagesNotFound | None:
    """The rows of `refused` without their images, and where the images may be; or those without their videos, where the
    first of them lacks a video.

    `starts` are `task.image_root` and `task.video_root`, and `data` is the folder of the data, from which paths start
    without one. None where every image and video was found.
    """
    found = [(each, match) for each in refused if (match := NOT_FOUND.search(each.reason)) is not None]
    if not found:
        return None
    kind: Modality = "image" if found[0][1][2] == "image" else "video"
    missing = [(each, match[1].strip("'\"")) for each, match in found if match[2] == kind]
    path, start = Path(missing[0][1]), starts[kind]
    begun = data if start is None else start
    as_written = path.relative_to(begun) if path.is_relative_to(begun) else path
    return ImagesNotFound(
        kind=kind,
        count=len(missing),
        rows=tuple(f"{each.source}:{each.row}" for each, _ in missing),
        first=str(path),
        candidate=None if as_written.is_absolute() else _candidate(as_written, data),
    )


def _candidate(as_written: Path, data: Path) -> str | None:
    """The first folder in or next to the data from which a path exists."""
    return next((str(folder) for folder in _folders(data) if (folder / as_written).is_file()), None)


def _folders(data: Path) -> Iterator[Path]:
    """The folder of the data, those in it, and those around it, nearest first."""
    yield from _inside(data, DEEPEST_SEARCH)
    around = [data.parent, data.parent.parent]
    for folder in dict.fromkeys(around):
        yield from _inside(folder, 1)


def _inside(folder: Path, depth: int) -> Iterator[Path]:
    """A folder and those below it, by levels; at most `LARGEST_SEARCH`."""
    level, count = [folder], 0
    for _ in range(depth + 1):
        deeper: list[Path] = []
        for each in level:
            if (count := count + 1) > LARGEST_SEARCH:
                return
            yield each
            try:
                with os.scandir(each) as entries:
                    deeper += sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
            except OSError:
                continue
        level = deeper
