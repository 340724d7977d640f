"""What the name, the type or the values of a column tell of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmrl.tasks.dataset.column_names import ROLE_KEYS
from vlmrl.tasks.dataset.columns import as_list, is_missing, plain, value_at
from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.videos import names_a_file


def folded(name: str) -> str:
    """A column's name without the differences that do not count.

    >>> folded("Ground-Truth"), folded("reward_model.ground_truth")
    ('ground_truth', 'reward_model.ground_truth')
    """
    return re.sub(r"[^a-z0-9.]+", "_", name.strip().lower()).strip("_")


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages.

    >>> is_conversation([{"from": "human", "value": "Hi"}]), is_conversation(["Hi"]), is_conversation("Hi")
    (True, False, False)
    """
    items = as_list(value) if isinstance(value, str | list | tuple) else as_list(plain(value))
    return bool(items) and all(
        isinstance(item, Mapping) and any(set(keys) <= set(item) for keys in ROLE_KEYS) for item in items
    )


def shown_type(kind: ColumnType, role: str) -> str:
    """A type as it is printed; a struct in which `datasets` stores an image or a video is one."""
    return str(kind).replace("struct {bytes: bytes, path: text}", "video" if role == "videos" else "image")


def holds_image(kind: ColumnType) -> bool:
    """Whether the file says that a column holds images, or it has the form in which `datasets` stores them."""
    kind = _innermost(kind)
    is_stored = kind.kind == "bytes" or (kind.kind == "struct" and {"bytes", "path"} <= set(kind.fields))
    return kind.is_image or (is_stored and not kind.is_video)


def is_video(kind: ColumnType) -> bool:
    """Whether the file says that a column holds videos."""
    return _innermost(kind).is_video


def _innermost(kind: ColumnType) -> ColumnType:
    while kind.kind == "list" and kind.item is not None:
        kind = kind.item
    return kind


def names_videos(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether all texts of a column in some rows are names of video files.

    >>> names_videos([{"media": "a.mp4"}, {"media": ["b.webm"]}], "media"), names_videos([{"media": "a.png"}], "media")
    (True, False)
    """
    values = [item for row in rows for item in as_list(value_at(row, column)) if not is_missing(item)]
    return bool(values) and all(names_a_file(value) for value in values)
