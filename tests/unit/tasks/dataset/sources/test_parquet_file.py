"""Rows of Parquet files, read page by page, are those that pyarrow reads from the whole file."""

from __future__ import annotations

import datetime
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources import parquet_file
from vlmrl.tasks.dataset.sources.parquet_file import ParquetReader
from vlmrl.tasks.dataset.sources.reader import UnreadableRow

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("image", IMAGE),
        ("images", pa.list_(IMAGE)),
        ("pixels", pa.list_(pa.binary())),
        ("nested", pa.list_(pa.list_(pa.int32()))),
        ("deep", pa.struct([("a", pa.struct([("b", pa.list_(pa.string())), ("c", pa.float64())])), ("d", pa.bool_())])),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))),
        ("fixed", pa.list_(pa.float32(), 2)),
        ("number", pa.int64()),
        ("small", pa.uint8()),
        ("price", pa.decimal128(10, 2)),
        ("when", pa.timestamp("us")),
        ("day", pa.date32()),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("nothing", pa.null()),
    ]
)


def make_row(rng: random.Random) -> dict[str, Any]:
    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.15 else value

    def image() -> Any:
        data = maybe(rng.randbytes(rng.choice([0, 20, 3000])))
        return maybe({"bytes": data, "path": maybe(f"{rng.random()}.png")})

    def items(make: Any) -> Any:
        return maybe([make() for _ in range(rng.choice([0, 1, 1, 2, 5]))])

    def integer() -> int | None:
        number: int | None = maybe(rng.randrange(100))
        return number

    deep = {"a": maybe({"b": items(lambda: maybe("x" * rng.randrange(9))), "c": rng.random()}), "d": maybe(True)}
    return {
        "question": maybe("Wie viele Äpfel? " * rng.randrange(20)),
        "image": image(),
        "images": items(image),
        "pixels": items(lambda: maybe(rng.randbytes(2000))),
        "nested": items(lambda: items(integer)),
        "deep": maybe(deep),
        "messages": items(lambda: {"role": "user", "content": maybe("c" * rng.randrange(50))}),
        "fixed": maybe([1.5, float(rng.randrange(9))]),
        "number": maybe(rng.randrange(-(2**63), 2**63)),
        "small": rng.randrange(256),
        "price": maybe(Decimal(rng.randrange(10**6)) / 100),
        "when": maybe(datetime.datetime(2026, 1, 1) + datetime.timedelta(microseconds=rng.randrange(10**12))),
        "day": maybe(datetime.date(2026, 1, 1)),
        "kind": maybe(rng.choice("abc")),
        "nothing": None,
    }


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> pa.Table:
    table = pa.table({field.name: pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA})
    pq.write_table(table, path, **options)
    return pq.ParquetFile(path).read()


def opened(path: Path, limit_bytes: int = 1 << 20) -> ParquetReader:
    return ParquetReader(path, ByteLRU(limit_bytes))


@pytest.fixture
def by_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "SMALL_GROUP_BYTES", 0)


SMALL_PAGES = {"data_page_size": 2000, "write_batch_size": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 7},
        SMALL_PAGES,
        {**SMALL_PAGES, "row_group_size": 90},
        {**SMALL_PAGES, "use_dictionary": False},
        {**SMALL_PAGES, "dictionary_pagesize_limit": 500},
        {**SMALL_PAGES, "data_page_version": "2.0"},
        {**SMALL_PAGES, "data_page_version": "2.0", "compression": "none", "use_dictionary": False},
        {**SMALL_PAGES, "write_page_index": True},
        {**SMALL_PAGES, "write_page_checksum": True},
        {**SMALL_PAGES, "use_content_defined_chunking": True},
        {**SMALL_PAGES, "use_compliant_nested_type": False},
        {**SMALL_PAGES, "version": "1.0"},
        {**SMALL_PAGES, "store_schema": False},
        *({**SMALL_PAGES, "compression": codec} for codec in ("none", "gzip", "zstd", "lz4", "brotli")),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "defaults",
)
def test_pages_hold_the_rows_that_the_whole_file_holds(tmp_path: Path, by_pages: None, options: dict[str, Any]) -> None:
    rng = random.Random(1)
    whole = write(tmp_path / "rows.parquet", [make_row(rng) for _ in range(100)], **options)
    reader = opened(tmp_path / "rows.parquet")
    assert len(reader) == 100
    for index in [99, 0, *rng.sample(range(100), 18)]:
        row = reader.row(index)
        assert row == whole.slice(index, 1).to_pylist()[0]
        assert list(row) == SCHEMA.names


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 20), page=st.integers(1, 4000), batch=st.integers(2, 20))
def test_pages_of_any_size_are_read(tmp_path_factory: pytest.TempPathFactory, **drawn: int) -> None:
    rng = random.Random(drawn["seed"])
    path = tmp_path_factory.mktemp("pages") / "rows.parquet"
    rows = [make_row(rng) for _ in range(drawn["rows"])]
    try:
        whole = write(path, rows, data_page_size=drawn["page"], write_batch_size=drawn["batch"])
    except pa.ArrowInvalid:  # pyarrow 26 cannot read a list whose first page holds a null alone
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_file, "SMALL_GROUP_BYTES", 0)
        reader = opened(path, limit_bytes=rng.choice([0, 10_000, 1 << 20]))
        assert [reader.row(index) for index in range(len(rows))] == whole.to_pylist()


def test_small_row_groups_are_read_whole(tmp_path: Path) -> None:
    rng = random.Random(2)
    whole = write(tmp_path / "rows.parquet", [make_row(rng) for _ in range(50)], row_group_size=20)
    cache: ByteLRU[Any, Any] = ByteLRU(1 << 24)
    reader = ParquetReader(tmp_path / "rows.parquet", cache)
    assert [reader.row(index) for index in range(50)] == whole.to_pylist()
    assert len(cache) == 3


@pytest.mark.parametrize(
    "column",
    [pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())), pa.array([{"x.y": 1}, None, {"x.y": 2}])],
    ids=["map", "dotted field"],
)
def test_leaves_without_a_name_of_their_own_are_read_whole(tmp_path: Path, by_pages: None, column: pa.Array) -> None:
    table = pa.table({"question": ["a", "b", "c"], "odd.name": column})
    pq.write_table(table, tmp_path / "rows.parquet")
    reader = opened(tmp_path / "rows.parquet")
    assert [reader.row(index) for index in range(3)] == table.to_pylist()


def test_files_of_another_writer_are_read(tmp_path: Path, by_pages: None) -> None:
    import duckdb

    path = tmp_path / "rows.parquet"
    question = "repeat('How many? ', (i % 50)::INT)"
    images = "[{'bytes': repeat('x', 500)::BLOB, 'path': i::VARCHAR} for j in range(i % 3)]"
    duckdb.sql(f"COPY (SELECT i, {question} AS question, {images} AS images FROM range(30000) t(i)) TO '{path}'")
    whole = pq.read_table(path)
    reader = opened(path)
    for index in (0, 1, 2, 2047, 2048, 9999, 15000, 29998, 29999):
        assert reader.row(index) == whole.slice(index, 1).to_pylist()[0]


def test_threads_read_the_same_rows(tmp_path: Path, by_pages: None) -> None:
    rng = random.Random(3)
    rows = [make_row(rng) for _ in range(100)]
    whole = write(tmp_path / "rows.parquet", rows, **SMALL_PAGES).to_pylist()
    reader = opened(tmp_path / "rows.parquet", limit_bytes=20_000)
    start = threading.Barrier(8)

    def read(seed: int) -> bool:
        start.wait()
        order = random.Random(seed).sample(range(100), 8)
        return all(reader.row(index) == whole[index] for index in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_one_row_of_a_large_group_reads_a_small_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB of pixels in one row group, as Hugging Face `datasets` writes it: pages of at most 1 MB."""
    rng = random.Random(4)
    images = [{"bytes": rng.randbytes(20_000), "path": None} for _ in range(1000)]
    table = pa.table({"question": [f"{n}?" for n in range(1000)], "images": pa.array([[i] for i in images])})
    pq.write_table(table, tmp_path / "rows.parquet", use_content_defined_chunking=True, compression="none")
    reader = opened(tmp_path / "rows.parquet")
    read_bytes = 0
    read = reader._file.read

    def counted(start: int, end: int) -> bytes:
        nonlocal read_bytes
        read_bytes += end - start
        return read(start, end)

    monkeypatch.setattr(reader._file, "read", counted)
    assert reader.row(777)["images"] == [images[777]]
    assert read_bytes < 3e6


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write(path, [make_row(random.Random(5)) for _ in range(20)])
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:-1], content[:5], b"", b"no parquet at all" * 10):
        path.write_bytes(part)
        with pytest.raises(ConfigError, match=r"(is no whole Parquet file|is empty).*copy it again"):
            opened(path)


def test_a_damaged_page_costs_its_rows(tmp_path: Path, by_pages: None) -> None:
    """Whatever byte of the data is wrong, a row is read or refused; nothing else is raised."""
    path = tmp_path / "rows.parquet"
    whole = write(path, [make_row(random.Random(6)) for _ in range(60)], **SMALL_PAGES).to_pylist()
    content = bytearray(path.read_bytes())
    data_end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rng = random.Random(7)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[rng.randrange(4, data_end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        reader = opened(path)
        for index in rng.sample(range(60), 5):
            try:
                assert list(reader.row(index)) == list(whole[index])
            except UnreadableRow:
                refused += 1
    assert refused


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["answer", "answer"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="two columns named 'answer'"):
        opened(tmp_path / "rows.parquet")


def test_a_file_without_rows_has_none(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", [])
    assert len(opened(tmp_path / "rows.parquet")) == 0


def test_what_datasets_notes_is_known(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    image = {"bytes": b"x", "path": None}
    data = datasets.Dataset.from_dict({"images": [[image]], "image": [image], "label": [1]}, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    reader = opened(tmp_path / "rows.parquet")
    assert {name: str(kind) for name, kind in reader.columns.items()} == {
        "images": "list of image",
        "image": "image",
        "label": "integer",
    }
    assert reader.columns["label"].labels == ("cat", "dog")
    assert reader.row(0) == {"images": [image], "image": image, "label": 1}
