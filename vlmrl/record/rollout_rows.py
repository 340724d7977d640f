"""Read rollouts/*.parquet: rows become `RolloutRecord`s, a few at a time.

    names and types of the columns ─▶ sizes of a row group ─▶ rollout_id ─▶ batches with a wanted id ─▶ records

A run folder may have been edited or damaged, or come from a stranger. So the columns must be those of
rollout_schema.py, a row group that claims more values than a run writes is not read, the whole file is checked against
its checksum, and each record passes `is_rollout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from vlmrl.errors import safe_text
from vlmrl.record import rollout_schema as columns
from vlmrl.record.checksum import is_whole
from vlmrl.record.files import open_regular
from vlmrl.record.rollout_check import is_rollout
from vlmrl.record.tool_fields import is_fields, read_json

Report: TypeAlias = Callable[[str, str], None]
"""Called with the place of a damage ("rollout 3 of <path>") and its reason."""

BATCH_ROWS = 64
"""Rollouts that are in memory at once."""
MAX_ROW_GROUP_ROWS = 2**20
MAX_ROW_GROUP_BYTES = 2**30
MAX_COLUMN_VALUES = 2**26
"""Most values of one column in a row group; a run ends a row group with the rollout that reaches 2^20 tokens, those of
its supports included, and a completion of 2^16 tokens may have supports of 2^10 each."""
MAX_FOOTER_BYTES = 2**26
LONGEST_REASON = 300
"""Characters of a reason that pyarrow gives."""

MAY_BE_NULL = frozenset(
    (
        *(
            "dropped",
            "error",
            "stdout",
            "stderr",
            "reference",
            "rewards[].value",
            "metrics[].value",
            "messages[].content[].text",
            "videos[].hash",
            "videos[].fps",
            "videos[].tensors",
        ),
        *("images[]", "turns[].trainer_logprobs", "turns[].entropies", "turns[].tools", "turns[].message_fields"),
        *("turns[].stop", "turns[].sampling", "turns[].support_sizes", "turns[].support_ids"),
    )
)
"""Where a row may have no value."""


class _Damaged(Exception):  # noqa: N818 — always caught in this module
    """Rows cannot be read; the text says why."""


def read_rows(path: Path, wanted: Callable[[str], bool], damaged: Report) -> Iterator[dict[str, Any]]:
    """The records of the wanted rollouts of a file, each with its prompt tokens from `prompt_offset` on.

    `damaged` is called for the whole file, or for rows of it, that cannot be read; they are skipped. Raises OSError
    where there is no such regular file.
    """
    with open_regular(path) as file:
        try:
            parquet = _opened(file)
        except _Damaged as error:
            damaged(str(path), str(error))
            return
        first = 1
        for group in range(parquet.num_row_groups):
            try:
                yield from _read_group(parquet, group, path, first, wanted, damaged)
            except _Damaged as error:
                damaged(f"the rest of {path} from rollout {first} on", str(error))
                return
            first += parquet.metadata.row_group(group).num_rows


def image_hashes(path: Path) -> set[str]:
    """The hashes of all images, and of all frames of videos, in the prompts of a file, as far as it can be read."""
    found: set[str] = set()
    with suppress(_Damaged, OSError), open_regular(path) as file:
        parquet = _opened(file)
        for group in range(parquet.num_row_groups):
            _check_size(parquet.metadata.row_group(group))
            videos, hashes = [], _nested(parquet, group, "turns", "placeholders", "hash")
            if "videos" in parquet.schema_arrow.names:
                videos = [hash for hash in _nested(parquet, group, "videos", "hash") if hash is not None]
                hashes += map(_hash_in, _nested(parquet, group, "videos", "frames"))
            found |= set(hashes) - set(videos)
    return found


def _nested(parquet: pq.ParquetFile, group: int, *names: str) -> list[Any]:
    """All values of a column that is inside of lists of a row group, one after the other."""
    path = ".list.element.".join(names)
    with _arrow_errors():
        array = parquet.read_row_group(group, [path + ".list.element" * (path not in columns.LEAVES)]).column(0)
        array = array.combine_chunks().flatten()
        for _ in names[1:]:
            array = array.field(0)
            array = array.flatten() if pa.types.is_list(array.type) else array
    return _column(array, f"{names[0]}[].{names[-1]}")


def _hash_in(path: str) -> str:
    """The hash in the path of an image: ../images/<hash>.png."""
    return path.removeprefix(columns.IMAGE_FOLDER).removesuffix(".png")


def _opened(file: Any) -> pq.ParquetFile:
    """The file, once its columns are found to be those of a run."""
    with _arrow_errors():
        if not is_whole(file):
            raise _Damaged("its content is not what the run wrote")
        file.seek(0)
        limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": MAX_FOOTER_BYTES}
        metadata = pq.ParquetFile(file, **limits).metadata
        found = metadata.schema.to_arrow_schema()
    expected: set[str] = set()
    for field in columns.SCHEMA:
        index = found.get_field_index(field.name)
        if index < 0 and field.name in columns.LATER and field.name not in found.names:
            continue
        if index < 0:
            raise _Damaged(f"it has no column {field.name}, or several")
        kind = found.field(index).type
        known = (field.type, *(columns.OLD_TURNS if field.name == "turns" else ()))
        if not any(map(kind.equals, known)):
            raise _Damaged(f"column {field.name} has the type {safe_text(kind)[:LONGEST_REASON]}")
        expected |= columns.leaves(field.name, kind).keys()
    present = {metadata.schema.column(i).path for i in range(metadata.num_columns)}
    if missing := expected - present:
        raise _Damaged(f"it has no column {min(missing)}")
    with _arrow_errors():
        return pq.ParquetFile(
            file,
            metadata=metadata,
            # A text that many rows share is in memory once. An older file lacks some columns.
            read_dictionary=[path for path in columns.STRINGS if path in present],
            page_checksum_verification=True,  # of files that another program has written
        )


def _read_group(
    parquet: pq.ParquetFile, group: int, path: Path, first: int, wanted: Callable[[str], bool], damaged: Report
) -> Iterator[dict[str, Any]]:
    """The records of the wanted rollouts of a row group, whose first row has the number `first` in the file."""
    _check_size(parquet.metadata.row_group(group))
    with _arrow_errors():
        table = parquet.read_row_group(group, ["rollout_id"], use_threads=False)
        ids = _column(table.column(0).combine_chunks(), "rollout_id")
    if not any(map(wanted, ids)):
        return
    row = 0
    names = [name for name in columns.SCHEMA.names if name in parquet.schema_arrow.names]
    batches = parquet.iter_batches(BATCH_ROWS, [group], names, use_threads=False)
    while row < len(ids):
        with _arrow_errors():
            batch = next(batches, None)
        if batch is None or batch.num_rows == 0:
            raise _Damaged(f"there are {row} rows and not {len(ids)}")
        here = [number for number in range(batch.num_rows) if wanted(ids[row + number])]
        for number, content in zip(here, _rows(batch, here), strict=True):
            record = _record(content)
            if record is not None:
                yield record
            else:
                damaged(f"rollout {first + row + number} of {path}", "no run wrote it")
        row += batch.num_rows


def _check_size(group: pq.RowGroupMetaData) -> None:
    if group.num_rows > MAX_ROW_GROUP_ROWS or group.total_byte_size > MAX_ROW_GROUP_BYTES:
        raise _Damaged(f"{group.num_rows} rows of {group.total_byte_size} bytes are more than a run writes at once")
    for number in range(group.num_columns):
        column = group.column(number)
        if column.num_values > MAX_COLUMN_VALUES or column.total_uncompressed_size > MAX_ROW_GROUP_BYTES:
            raise _Damaged(
                f"{column.num_values} values of {column.total_uncompressed_size} bytes in column "
                f"{safe_text(column.path_in_schema)} are more than a run writes at once"
            )


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into `_Damaged`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _Damaged(safe_text(error).partition("\n")[0][:LONGEST_REASON]) from error


# ── from columns to Python values ───────────────────────────────────────────────────────────────────────────


def _rows(batch: pa.RecordBatch, numbers: list[int]) -> list[dict[str, Any]]:
    """Some rows of a batch as dictionaries. Raises `_Damaged`."""
    if not numbers:
        return []
    with _arrow_errors():
        batch.validate(full=True)
        batch = batch.take(pa.array(numbers, pa.int64()))
        made = {name: _column(batch.column(name), name) for name in batch.schema.names}
        made |= {name: [None] * len(numbers) for name in columns.LATER - made.keys()}
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


def _column(array: pa.Array, path: str) -> list[Any]:
    """The values of an array: what `to_pylist` gives, in a tenth of its time. Raises `_Damaged` for a null where no run
    writes one."""
    if array.null_count and path not in MAY_BE_NULL:
        raise _Damaged(f"column {path} has an empty value")
    if pa.types.is_dictionary(array.type):
        words = array.dictionary.to_pylist()
        return [None if index is None else words[index] for index in array.indices.to_pylist()]
    if pa.types.is_struct(array.type):
        fields = [_column(array.field(i), f"{path}.{field.name}") for i, field in enumerate(array.type)]
        names = [field.name for field in array.type]
        return [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)]
    if pa.types.is_list(array.type):
        ends = array.offsets.to_pylist()
        start = ends[0]
        values = _column(array.values.slice(start, ends[-1] - start), f"{path}[]")
        lists = [values[a - start : b - start] for a, b in pairwise(ends)]
        if not array.null_count:
            return lists
        return [each if valid else None for each, valid in zip(lists, array.is_valid().to_pylist(), strict=True)]
    if array.null_count or pa.types.is_string(array.type) or pa.types.is_boolean(array.type):
        return list(array.to_pylist())
    return list(array.to_numpy().tolist())


# ── from a row to a record ──────────────────────────────────────────────────────────────────────────────────


def _record(row: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a row; None where no run wrote the row."""
    turns = _turns(row)
    if turns is None:
        return None
    videos = {video["hash"]: _video(video) for video in row["videos"] or () if video["hash"] is not None}
    record = {key: value for key, value in row.items() if key not in ("messages", "images")}
    record["turns"], record["videos"] = turns, videos
    for pairs in ("rewards", "metrics"):
        record[pairs] = {pair["name"]: pair["value"] for pair in row[pairs]}
    return record if is_rollout(record) else None


def _turns(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    messages, turns = iter(row["messages"]), []
    hashes = {
        "image": (path and _hash_in(path) for path in row["images"]),
        "video": (video["hash"] for video in row["videos"] or ()),
    }
    for turn in row["turns"]:
        new = list(islice(messages, max(turn.pop("new_messages"), 0)))
        answer = next(messages, None)
        fields = read_json(turn.pop("message_fields", None), [{}] * len(new))
        if answer is None or len(answer["content"]) != 1 or not is_fields(fields, len(new)):
            return None
        turn["tools"] = read_json(turn.get("tools"), [])
        turn["messages"] = [
            {"role": message["role"], "content": [_part(part, hashes) for part in message["content"]], **beside}
            for message, beside in zip(new, fields, strict=True)
        ]
        turn.setdefault("starts_over", False)
        turn |= {name: turn.get(name) for name in ("stop", "support_sizes", "support_ids")}
        sampling = turn.get("sampling")
        turn["sampling"] = read_json(sampling, None)
        if (sampling is None) is not (turn["sampling"] is None):
            return None
        turn["text"] = answer["content"][0]["text"]
        turn["placeholders"] = [
            [place["offset"], place["length"], place["hash"], [list(gap.values()) for gap in place.get("gaps", ())]]
            for place in turn["placeholders"]
        ]
        turns.append(turn)
    return turns


def _part(part: dict[str, Any], hashes: Mapping[str, Iterator[str | None]]) -> dict[str, Any]:
    """`hashes`: those of the images and videos of the row, by the type of their part, in order."""
    if part["type"] not in hashes:
        return part
    return {"type": part["type"], "hash": next(hashes[part["type"]], None)}


def _video(video: dict[str, Any]) -> dict[str, Any]:
    frames, tensors = [_hash_in(path) for path in video["frames"]], read_json(video["tensors"], None)
    return {"frames": frames, "times": video["times"], "fps": video["fps"], "tensors": tensors}
