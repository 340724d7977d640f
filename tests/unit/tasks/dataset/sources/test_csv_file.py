"""Rows of CSV files are those of Python's csv module, found again by position."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources.csv_file import CsvReader
from vlmrl.tasks.dataset.sources.reader import UnreadableRow

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


def read(path: Path) -> list[dict[str, str | None]]:
    reader = CsvReader(path)
    return [reader.row(index) for index in range(len(reader))]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    tabs=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], end: str, tabs: bool, quoting: int
) -> None:
    content = io.StringIO(newline="")
    writer = csv.writer(content, lineterminator=end, delimiter="\t" if tabs else ",", quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([("question", "image", "answer"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / ("a.tsv" if tabs else "a.csv"), content.getvalue())
    expected = [dict(zip(("question", "image", "answer"), (text or None for text in row), strict=True)) for row in rows]
    assert read(path) == expected


@pytest.mark.parametrize(
    "content",
    [
        "q,a\nx,007\n",
        "\ufeffq,a\r\nx,007\r\n",
        "q;a\nx;007\n",
        " q , a\n\n\nx,007\n\n",
        '"q","a"\n"x","007"',
        "q\ta\nx\t007\n",
    ],
)
def test_what_programs_write(tmp_path: Path, content: str) -> None:
    assert read(write(tmp_path / "a.csv", content)) == [{"q": "x", "a": "007"}]


def test_line_ends_within_quotes_and_odd_separators_of_lines(tmp_path: Path) -> None:
    content = 'q,a\n"one\r\ntwo\n\nthree",1\nx\u2028y\x0bz,2\n'
    assert read(write(tmp_path / "a.csv", content)) == [
        {"q": "one\r\ntwo\n\nthree", "a": "1"},
        {"q": "x\u2028y\x0bz", "a": "2"},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"only one", "the row has 1 fields, but the first row names 2 columns"),
        (b"a,b,c", "the row has 3 fields, but the first row names 2 columns"),
        (b"caf\xe9,1", r"the row is not UTF-8 \(byte 3\)"),
    ],
)
def test_a_broken_row_is_one_unreadable_row(tmp_path: Path, row: bytes, reason: str) -> None:
    reader = CsvReader(write(tmp_path / "a.csv", b"q,a\nbefore,1\n" + row + b"\nafter,2\n"))
    assert [reader.row(0)["q"], reader.row(2)["q"]] == ["before", "after"]
    with pytest.raises(UnreadableRow, match=reason):
        reader.row(1)


def test_a_field_of_a_megabyte(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", f"q,image\nx,{'A' * 10**6}\n"))[0]["image"] == "A" * 10**6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a,q\n1,2,3\n", "two columns named 'q'"),
        ('q,a\nx,1\n"y,2\nz,3\n', "a quote .* that row 1 opens is never closed, so all rows behind it are lost"),
        ("q,a\rx,1\ry,2\r", "is no CSV, from row 0 on"),
        (b"caf\xe9,a\nx,1\n", "the names of its columns cannot be read: the row is not UTF-8"),
        ("q,a\nx,1\n".encode("utf-16"), "is written in UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CsvReader(write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("content", ["", "q,a\n", "\n\n"])
def test_no_rows(tmp_path: Path, content: str) -> None:
    assert len(CsvReader(write(tmp_path / "a.csv", content))) == 0
