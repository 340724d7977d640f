"""Turn rollouts into the bytes of one Parquet file (rollout_schema.py has its columns).

    list of Rollout ─▶ flat arrays: one per leaf, siblings one after the other ─▶ nested columns ─▶ row groups ─▶ zstd

The arrays are made flat, because building nested Python lists takes five times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from vlmrl.errors import safe_text
from vlmrl.record import rollout_schema as columns
from vlmrl.record.checksum import with_checksum
from vlmrl.record.image_files import mm_kwargs_digests
from vlmrl.record.sampling_text import sampling_text
from vlmrl.record.tool_fields import fields_text, tools_text
from vlmrl.types import Message, MMItem, Modality, Part, Rollout, Text, Turn, VideoItem, extends

LEVEL = 3
"""Of zstd."""
ROW_GROUP_TOKENS = 2**20
"""A row group ends with the rollout that reaches so many tokens, so that a reader needs little memory."""
PAGE_BYTES = 8 * 2**20
"""zstd sees one page at a time. Repeated prompts are found within a page."""

Row = TypeVar("Row")


def encode(step: int, rollouts: Mapping[str, Sequence[Rollout]]) -> bytes:
    """The file of the rollouts of `step`, by split."""
    rows = [(split, rollout) for split, group in rollouts.items() for rollout in group]
    table = _table(step, rows)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        columns.SCHEMA,
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=columns.DICTIONARIES,
        column_encoding=dict.fromkeys(columns.SPLIT_BYTES, "BYTE_STREAM_SPLIT") | dict.fromkeys(columns.PLAIN, "PLAIN"),
        write_statistics=["step", "reward", "problem_id"],
        data_page_size=PAGE_BYTES,
        store_schema=False,
    ) as writer:
        for start, end in pairwise(_row_groups([rollout for _, rollout in rows])):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
    return with_checksum(bytes(sink.getvalue()))


def _row_groups(rollouts: Sequence[Rollout]) -> list[int]:
    """Row numbers between which the row groups stand, both ends included."""
    ends, tokens = [0], 0
    for row, rollout in enumerate(rollouts, 1):
        tokens += sum(len(turn.prompt.token_ids) + len(turn.completion.token_ids) for turn in rollout.turns)
        supports = [turn.completion.supports for turn in rollout.turns if turn.completion.supports is not None]
        tokens += sum(len(each.token_ids) for each in supports)
        if tokens >= ROW_GROUP_TOKENS or row == len(rollouts):
            ends, tokens = [*ends, row], 0
    return ends


def _table(step: int, rows: Sequence[tuple[str, Rollout]]) -> pa.Table:
    rollouts = [rollout for _, rollout in rows]
    made = {
        "rollout_id": _texts(rollout.rollout_id for rollout in rollouts),
        "step": pa.array([step] * len(rows), pa.int32()),
        "split": _texts(split for split, _ in rows),
        "task": _texts(rollout.task for rollout in rollouts),
        "problem_id": _texts(rollout.problem_id for rollout in rollouts),
        "index": pa.array([rollout.index for rollout in rollouts], pa.int32()),
        "reward": pa.array([rollout.reward for rollout in rollouts], pa.float64()),
        "rewards": _pairs([rollout.rewards for rollout in rollouts]),
        "reference": _texts(reference_text(rollout.reference) for rollout in rollouts),
        "stop_reason": _texts(rollout.stop_reason.value for rollout in rollouts),
        "dropped": _texts(rollout.dropped and rollout.dropped.value for rollout in rollouts),
        "filtered": _lists([rollout.filtered for rollout in rollouts], lambda all: _texts(each.value for each in all)),
        "error": _texts(rollout.error for rollout in rollouts),
        "stdout": _texts(None if rollout.printed is None else rollout.printed.stdout for rollout in rollouts),
        "stderr": _texts(None if rollout.printed is None else rollout.printed.stderr for rollout in rollouts),
        "metrics": _pairs([rollout.metrics for rollout in rollouts]),
        "seconds": pa.array([rollout.seconds for rollout in rollouts], pa.float64()),
        "messages": _lists([_conversation(rollout) for rollout in rollouts], _messages),
        "images": _lists([_image_paths(rollout) for rollout in rollouts], _texts),
        "videos": _lists([_shown(rollout, "video") for rollout in rollouts], _videos),
        "turns": _lists([list(pairwise([None, *rollout.turns])) for rollout in rollouts], _turns),
    }
    return pa.table(made, schema=columns.SCHEMA)


# ── parts of a row ──────────────────────────────────────────────────────────────────────────────────────────


def reference_text(reference: Any) -> str | None:
    """A problem's answer as text: a text as it is, anything else as JSON.

    >>> reference_text("12"), reference_text([1, 2.5]), reference_text(None)
    ('12', '[1,2.5]', None)
    """
    if reference is None or isinstance(reference, str):
        return reference
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS
    try:
        return orjson.dumps(reference, default=lambda value: f"<{type(value).__name__}>", option=options).decode()
    except (orjson.JSONEncodeError, RecursionError):
        return f"<{type(reference).__name__}>"


def _conversation(rollout: Rollout) -> list[Message]:
    """The messages of every turn, each followed by the policy's answer."""
    return [each for turn in rollout.turns for each in (*turn.messages, Message("assistant", (Text(turn.text),)))]


def _image_paths(rollout: Rollout) -> list[str | None]:
    """The path of each image part of the conversation; None for an image that never reached the prompt."""
    return [None if item is None else _path(item.hash) for item in _shown(rollout, "image")]


def _path(hash: str) -> str:
    return f"{columns.IMAGE_FOLDER}{hash}.png"


def _shown(rollout: Rollout, kind: Modality) -> list[MMItem | None]:
    """The item of each image (video) part of the conversation. The parts of one kind in a turn's messages belong, in
    order, to the last placeholders of that kind in its prompt; None for a part that never reached the prompt."""
    found: list[MMItem | None] = []
    for turn in rollout.turns:
        parts = (part for message in turn.messages for part in message.content if not isinstance(part, Text))
        count = sum(part.modality == kind for part in parts)
        items = [item for item in turn.prompt.mm_items if item.modality == kind]
        found += [*[None] * count, *items][len(items) :] if count else []
    return found


def shared_prefix(turn: Turn, previous: Turn | None) -> int:
    """How many prompt tokens a turn shares with the turn before: that turn's prompt and completion, or 0.

    0 also where a turn of the same branch does not extend the one before, token for token and image for image. The
    record is then longer, but still exact.
    """
    if previous is None or previous.branch != turn.branch:
        return 0
    completion_ids = previous.completion.token_ids
    if not extends(turn.prompt, previous.prompt, completion_ids):
        return 0
    return len(previous.prompt.token_ids) + len(completion_ids)


# ── nested columns ──────────────────────────────────────────────────────────────────────────────────────────


def _lists(rows: Sequence[Sequence[Row]], make: Callable[[list[Row]], pa.Array]) -> pa.Array:
    """A column of lists: `make` turns all elements, one row after the other, into the column of the elements."""
    return pa.ListArray.from_arrays(_offsets([len(row) for row in rows]), make([each for row in rows for each in row]))


def _arrays(rows: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    """A column of lists of numbers; None is null."""
    present = [row for row in rows if row is not None]
    values = np.concatenate(present) if present else np.zeros(0)
    offsets = _offsets([0 if row is None else len(row) for row in rows])
    absent = pa.array([row is None for row in rows], pa.bool_()) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(offsets, pa.array(values).cast(kind), mask=absent)


def _offsets(counts: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *counts]), pa.int32())


def _struct(kind: pa.DataType, *arrays: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _texts(texts: Iterable[str | None]) -> pa.Array:
    """A column of texts. An exception may quote a file name that is not valid Unicode."""
    given = list(texts)
    try:
        return pa.array(given, pa.string())
    except UnicodeEncodeError:
        return pa.array([None if text is None else safe_text(text) for text in given], pa.string())


def _pairs(rows: Sequence[Mapping[str, float | None]]) -> pa.Array:
    def make(pairs: list[tuple[str, float | None]]) -> pa.Array:
        names, values = _texts(name for name, _ in pairs), pa.array([value for _, value in pairs], pa.float64())
        return _struct(columns.PAIRS.value_type, names, values)

    return _lists([list(row.items()) for row in rows], make)


def _messages(messages: list[Message]) -> pa.Array:
    contents = _lists([message.content for message in messages], _parts)
    return _struct(columns.MESSAGE, _texts(message.role for message in messages), contents)


def _parts(parts: list[Part]) -> pa.Array:
    kinds = _texts("text" if isinstance(part, Text) else part.modality for part in parts)
    return _struct(columns.PART, kinds, _texts(part.text if isinstance(part, Text) else None for part in parts))


def _videos(shown: list[MMItem | None]) -> pa.Array:
    """The column of videos; an entry without a value for a part that never reached the prompt."""
    videos = [item if isinstance(item, VideoItem) else None for item in shown]
    digests = {video.hash: orjson.dumps(mm_kwargs_digests(video)).decode() for video in set(videos) if video}
    return _struct(
        columns.VIDEO,
        _texts(video.hash if video else None for video in videos),
        _lists([list(map(_path, video.frame_hashes)) if video else [] for video in videos], _texts),
        _arrays([video.times if video else np.zeros(0) for video in videos], pa.float64()),
        pa.array([video.rate if video else None for video in videos], pa.float64()),
        _texts(digests[video.hash] if video else None for video in videos),
    )


def _turns(pairs: list[tuple[Turn | None, Turn | None]]) -> pa.Array:
    """The column of turns, from each turn and the one before it."""
    turns = [turn for _, turn in pairs if turn is not None]
    offsets = [shared_prefix(turn, before) for before, turn in pairs if turn is not None]
    places = [
        [place for place in turn.prompt.placeholders if place.offset >= offset]
        for turn, offset in zip(turns, offsets, strict=True)
    ]
    supports = [turn.completion.supports for turn in turns]
    token_ids = [turn.prompt.token_ids[offset:] for turn, offset in zip(turns, offsets, strict=True)]
    return _struct(
        columns.TURN,
        pa.array([turn.branch for turn in turns], pa.int32()),
        pa.array([turn.starts_over for turn in turns], pa.bool_()),
        _texts(tools_text(turn.tools) for turn in turns),
        _texts(fields_text(turn.messages) for turn in turns),
        _texts(turn.completion.stop for turn in turns),
        _texts(sampling_text(turn.sampling) for turn in turns),
        _arrays([None if each is None else each.sizes for each in supports], pa.int32()),
        _arrays([None if each is None else each.token_ids for each in supports], pa.int32()),
        pa.array([len(turn.messages) for turn in turns], pa.int32()),
        pa.array(offsets, pa.int32()),
        _arrays(token_ids, pa.int32()),
        _lists(places, _placeholders),
        _arrays([turn.completion.token_ids for turn in turns], pa.int32()),
        _arrays([turn.completion.logprobs for turn in turns], pa.float32()),
        _arrays([turn.completion.versions for turn in turns], pa.int32()),
        _arrays([turn.learned.trainer_logprobs if turn.learned else None for turn in turns], pa.float32()),
        _arrays([turn.learned.entropies if turn.learned else None for turn in turns], pa.float32()),
        _texts(turn.completion.finish_reason for turn in turns),
        pa.array([turn.reward for turn in turns], pa.float64()),
        pa.array([turn.advantage for turn in turns], pa.float64()),
    )


def _placeholders(places: list[Any]) -> pa.Array:
    return _struct(
        columns.PLACEHOLDER,
        pa.array([place.offset for place in places], pa.int32()),
        pa.array([place.length for place in places], pa.int32()),
        _texts(place.hash for place in places),
        _lists([place.gaps for place in places], _gaps),
    )


def _gaps(gaps: list[tuple[int, int]]) -> pa.Array:
    starts, lengths = (pa.array([gap[part] for gap in gaps], pa.int32()) for part in (0, 1))
    return _struct(columns.GAP, starts, lengths)
