"""JSON in its four shapes, and lines that are broken in every way that we know."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources import json_file
from vlmrl.tasks.dataset.sources.json_file import open_json
from vlmrl.tasks.dataset.sources.reader import UnreadableRow

ROWS: list[dict[str, Any]] = [
    {"q": "Wie viele Äpfel?", "n": 1},
    {"q": 'a "b" \\ ]}', "n": 2.5},
    {"q": None, "images": ["a.png", {"x": []}]},
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1, max_size=8)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    reader = open_json(path)
    return [reader.row(index) for index in range(len(reader))]


def lines(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", lines(ROWS).rstrip()),
        ("a.jsonl", lines(ROWS, "\r\n")),
        ("a.jsonl", "\n\r\n" + lines(ROWS, "\n\n\r\n")),
        ("a.jsonl", "\ufeff" + lines(ROWS)),
        ("a.ndjson", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS, indent=2) + "\n"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": "1.0", "data": ROWS}, indent=1)),
    ],
)
def test_every_shape_has_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str) -> None:
    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(lines(ROWS).encode())
    assert read(path) == ROWS


def test_a_truncated_compressed_file_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(lines(ROWS * 1000).encode())
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        read(write(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2]))


@pytest.mark.parametrize(
    "content", ['{"q": ["a", "b"], "n": [1, 2]}', '{"q": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}']
)
def test_an_object_of_columns(tmp_path: Path, content: str) -> None:
    assert read(write(tmp_path / "a.json", content)) == [{"q": "a", "n": 1}, {"q": "b", "n": 2}]


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30, 2**64 - 1, -(2**63), 1e300])
def test_large_numbers_keep_their_digits(tmp_path: Path, number: float) -> None:
    assert read(write(tmp_path / "a.jsonl", lines([{"id": number}, {"ids": [{"id": number}]}]))) == [
        {"id": number},
        {"ids": [{"id": number}]},
    ]
    assert read(write(tmp_path / "a.json", json.dumps([{"id": number}]))) == [{"id": number}]


@settings(max_examples=60, deadline=None)
@given(rows=OBJECTS, indent=st.none() | st.integers(0, 2), ascii_only=st.booleans())
def test_rows_of_any_content_are_found(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert read(write(folder / "a.json", array)) == rows
    each = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert read(write(folder / "a.jsonl", each)) == rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"q": ', "is not JSON: Expecting value at character 5"),
        (b'{"q": "a"} {"q": "b"}', "is not JSON: Extra data"),
        (b"[1, 2]", "of type list, not an object"),
        (b'"text"', "of type str, not an object"),
        (b"   ", "is not JSON"),
        (b'{"q": "\xff\xfe"}', "is not UTF-8"),
        (b'{"q": "\x00"}', "is not JSON: Invalid control character"),
        (b'{"q": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"q": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"q": ' + b"9" * 5000 + b"}", "cannot be parsed"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_broken_line_is_one_unreadable_row(tmp_path: Path, line: bytes, reason: str) -> None:
    reader = open_json(write(tmp_path / "a.jsonl", b'{"q": "before"}\n' + line + b'\n{"q": "after"}\n'))
    assert len(reader) == 3
    assert [reader.row(0), reader.row(2)] == [{"q": "before"}, {"q": "after"}]
    with pytest.raises(UnreadableRow, match=reason):
        reader.row(1)


def test_a_row_without_end_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_ROW_BYTES", 100)
    reader = open_json(write(tmp_path / "a.jsonl", '{"q": "b"}\n' + json.dumps({"q": "a" * 200}) + "\n"))
    with pytest.raises(UnreadableRow, match=r"the row has 21\d bytes; 100 are the most"):
        reader.row(1)


def test_what_python_writes_is_read(tmp_path: Path) -> None:
    content = json.dumps({"big": 2**80, "nan": math.nan, "inf": -math.inf, "q": "\U0001f600"})
    row = read(write(tmp_path / "a.jsonl", content))[0]
    assert (row["big"], row["inf"], row["q"]) == (2**80, -math.inf, "\U0001f600")
    assert math.isnan(row["nan"])


def test_lines_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "CHUNK", 7)
    assert read(write(tmp_path / "a.jsonl", lines(ROWS, "\r\n\r\n"))) == ROWS
    assert read(write(tmp_path / "a.json", lines(ROWS))) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"q": 1}, 3]', "element 1 of its array is not an object"),
        ('[{"q": 1}, "x"]', "element 1 of its array is not an object"),
        ('["x"]', "element 0 of its array is not an object"),
        ('[{"q": 1}, {"q": "cut', "ends inside its array"),
        ('[{"q": 1}', "ends inside its array"),
        ('{"q": 1}', "one JSON object .*no rows"),
        ('{"q": [1, 2], "n": [1]}', "one JSON object .*no rows"),
        ('{"q": [1, 2', "cannot be read: it is not JSON"),
        ("nothing of the kind", "none of its first rows can be read"),
        ("\xff\xfe{\x00}\x00".encode("latin-1").decode("latin-1"), "none of its first rows can be read"),
    ],
)
def test_a_file_without_rows_of_objects_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_json(write(tmp_path / "a.json", content))


def test_utf_16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is written in UTF-16.*iconv -f UTF-16 -t UTF-8"):
        open_json(write(tmp_path / "a.jsonl", lines(ROWS).encode("utf-16")))


def test_an_object_that_is_too_large_to_parse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_OBJECT_BYTES", 10)
    with pytest.raises(ConfigError, match="would have to be parsed as a whole: write one object per line"):
        open_json(write(tmp_path / "a.json", '{"q": ["a"], "n": [1]}'))


def test_types_come_from_the_first_rows(tmp_path: Path) -> None:
    reader = open_json(write(tmp_path / "a.jsonl", lines(ROWS)))
    assert {name: str(kind) for name, kind in reader.columns.items()} == {
        "q": "text",
        "n": "number",
        "images": "list of mixed",
    }
