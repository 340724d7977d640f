"""`task.path` and the keys next to it: files, patterns, lists, folders, saved folders, ranges; and every refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow
from vlmrl.tasks.dataset.rows import ColumnType, Rows
from vlmrl.tasks.dataset.sources import opening, reader
from vlmrl.tasks.dataset.sources.opening import RowRange, open_rows


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jsonl(path: str, *questions: Any, **more: Any) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps({"q": question, **more}) + "\n" for question in questions))
    return path


def parquet(path: str, **columns: Any) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def questions(path: str | list[str], **keys: Any) -> list[Any]:
    rows = open_rows(path, **keys)
    return [rows.row(index)["q"] for index in range(len(rows))]


def test_a_file_says_its_name_and_its_folder(tmp_path: Path) -> None:
    rows = open_rows(jsonl("data/a.jsonl", "x", "y"))
    assert (rows.name, rows.origin, len(rows)) == ("a.jsonl", "data/a.jsonl", 2)
    assert rows.where(1) == ("a.jsonl", 1)
    assert rows.folder(1) == "data"
    with pytest.raises(IndexError):
        rows.row(2)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl("a.jsonl", "x")
    assert questions("~/a.jsonl") == ["x"]


def test_patterns_and_lists_keep_the_order() -> None:
    for name in "bac":
        jsonl(f"data/{name}.jsonl", name)
    jsonl("data/deep/d.jsonl", "d")
    assert questions("data/*.jsonl") == ["a", "b", "c"]
    assert questions("data/**/*.jsonl") == ["a", "b", "c", "d"]
    assert questions(["data/c.jsonl", "data/[ab].jsonl"]) == ["c", "a", "b"]
    rows = open_rows(["data/c.jsonl", "data/a.jsonl"])
    assert (rows.name, rows.where(1)) == ("c.jsonl and 1 more", ("a.jsonl", 0))


def test_a_link_to_a_folder_above_does_not_repeat_rows() -> None:
    jsonl("data/a/rows.jsonl", 1)
    Path("data/a/up").symlink_to("../..", target_is_directory=True)
    assert questions("data/**/*.jsonl") == questions("data") == [1]


def test_a_name_with_the_signs_of_a_pattern_is_a_file() -> None:
    assert questions(jsonl("data[1].jsonl", "x")) == ["x"]


def test_files_of_several_formats_have_the_columns_of_all() -> None:
    jsonl("a.jsonl", "x", extra=[1])
    parquet("b.parquet", q=["y"], answer=["7"])
    Path("c.csv").write_text("q,answer\nz,8\n")
    feather.write_feather(pa.table({"q": ["w"]}), "d.feather")
    rows = open_rows(["a.jsonl", "b.parquet", "c.csv", "d.feather"])
    assert [rows.row(index) for index in range(4)] == [
        {"q": "x", "extra": [1], "answer": None},
        {"q": "y", "extra": None, "answer": "7"},
        {"q": "z", "extra": None, "answer": "8"},
        {"q": "w", "extra": None, "answer": None},
    ]
    assert {name: str(kind) for name, kind in rows.columns.items()} == {
        "q": "text",
        "extra": "list of integer",
        "answer": "text",
    }


def test_a_column_of_two_types_is_refused() -> None:
    jsonl("a.jsonl", "x", answer="7")
    parquet("b.parquet", q=["y"], answer=[7])
    with pytest.raises(ConfigError, match=r"column 'answer' is text in a\.jsonl and integer in b\.parquet"):
        open_rows(["a.jsonl", "b.parquet"])


def test_whole_numbers_and_fractions_are_numbers() -> None:
    parquet("a.parquet", q=[1])
    parquet("b.parquet", q=[0.5])
    assert str(open_rows("*.parquet").columns["q"]) == "number"


def test_splits_of_a_folder_by_the_names_of_files() -> None:
    jsonl("data/train.jsonl", "train")
    jsonl("data/val/rows.jsonl", "validation")
    jsonl("data/my_test_2.jsonl", "test")
    Path("data/README.md").write_text("# no header")
    Path("data/.hidden.jsonl").write_text("broken")
    assert questions("data") == ["train"]
    assert questions("data", split="validation") == ["validation"]
    assert questions("data", split="test") == ["test"]
    assert open_rows("data").origin == (
        "data, a folder on this machine, which wins over a hub data set of this name, split train: 1 file; "
        "task.split=test|validation reads others"
    )
    with pytest.raises(ConfigError, match=r"task\.split=dev: data has no split .*: choose one of"):
        open_rows("data", split="dev")


def test_configs_of_a_cloned_repository() -> None:
    jsonl("data/a/rows.jsonl", "a")
    jsonl("data/b/rows.jsonl", "b")
    Path("data/README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_dir: a\n- config_name: b\n  data_files:\n    test: b/*.jsonl\n---\n"
    )
    assert questions("data", name="a") == ["a"]
    assert questions("data", name="b") == ["b"]
    with pytest.raises(ConfigError, match=r"2 configs and task\.name is not set"):
        open_rows("data")


def test_a_folder_with_one_split_needs_no_name() -> None:
    jsonl("data/test.jsonl", "x")
    assert questions("data") == ["x"]


def test_a_folder_with_other_splits_than_train_needs_a_name() -> None:
    jsonl("data/test.jsonl", "x")
    jsonl("data/dev.jsonl", "y")
    with pytest.raises(ConfigError, match=r"2 splits and task\.split is not set.*validation"):
        open_rows("data")


def test_of_several_formats_the_most_frequent_is_read_and_that_is_said() -> None:
    parquet("data/a.parquet", q=["a"])
    parquet("data/b.parquet", q=["b"])
    jsonl("data/notes.jsonl", "no row")
    assert questions("data") == ["a", "b"]
    assert open_rows("data").origin.endswith("2 files; not read: 1 in another format, notes.jsonl")


def test_named_files_can_be_chosen_by_split() -> None:
    jsonl("train.jsonl", "train")
    jsonl("test.jsonl", "test")
    assert questions("*.jsonl") == ["test", "train"]
    assert questions("*.jsonl", split="train") == ["train"]
    with pytest.raises(ConfigError, match=r"task\.split=dev: by their names, .* are of test, train"):
        open_rows("*.jsonl", split="dev")


@pytest.mark.parametrize("path", ["run", "run/rollouts", "run/rollouts/*.jsonl", "r*/**/*.jsonl"])
def test_of_a_run_the_rollouts_of_training_are_read(path: str) -> None:
    """However they are named; those of evaluations where `task.split` says so."""
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    jsonl("run/rollouts/step_000001.jsonl", "trained 1")
    jsonl("run/rollouts/step_000002.jsonl", "trained 2")
    jsonl("run/rollouts/eval_000002.jsonl", "held out")
    assert questions(path) == ["trained 1", "trained 2"]
    assert "2 files; task.split=test reads others" in open_rows(path).origin
    assert questions(path, split="test") == ["held out"]


def test_evaluations_that_are_named_themselves_are_read() -> None:
    jsonl("run/rollouts/eval_000002.jsonl", "held out")
    assert questions("run/rollouts/eval_*.jsonl") == questions("run/rollouts") == ["held out"]


def test_folders_of_save_to_disk() -> None:
    import datasets

    data = datasets.Dataset.from_dict({"q": [str(n) for n in range(10)]})
    data.select([3, 1]).save_to_disk("one")
    data.save_to_disk("shards", num_shards=3)
    both = datasets.DatasetDict({"train": data.select(range(2)), "test": data.select(range(2, 5))})
    both.save_to_disk("dict")
    assert questions("one") == ["3", "1"]
    assert questions("shards") == [str(n) for n in range(10)]
    assert questions("dict") == ["0", "1"]
    assert questions("dict", split="test") == ["2", "3", "4"]
    with pytest.raises(ConfigError, match=r"task\.split=dev: dict has no split .*: choose one of train, test"):
        open_rows("dict", split="dev")
    with pytest.raises(ConfigError, match=r"task\.split=test: one was saved as one split"):
        open_rows("one", split="test")


def test_a_saved_folder_that_lost_a_file_is_refused() -> None:
    import datasets

    datasets.Dataset.from_dict({"q": ["x"]}).save_to_disk("data")
    Path("data/data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00000-of-00001\.arrow cannot be read \(No such file"):
        open_rows("data")
    Path("data/state.json").write_text("{")
    with pytest.raises(ConfigError, match="no whole folder of save_to_disk"):
        open_rows("data")


@pytest.mark.parametrize("content", ["whole", "compressed", "with labels"])
def test_arrow_files(content: str) -> None:
    table = pa.table({"q": [str(n) for n in range(5000)]})
    if content == "with labels":
        table = table.append_column("label", pa.array(["a", "b"] * 2500).dictionary_encode())
    feather.write_feather(table, "a.arrow", compression="zstd" if content == "compressed" else "uncompressed")
    rows = open_rows("a.arrow")
    assert len(rows) == 5000
    assert rows.row(4321) == table.slice(4321, 1).to_pylist()[0]
    data = Path("a.arrow").read_bytes()
    Path("cut.arrow").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"cut\.arrow is no whole Arrow file"):
        open_rows("cut.arrow")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", range(3)),
        (":3", range(3)),
        ("3", range(3)),
        ("7:", range(7, 10)),
        ("-2:", range(8, 10)),
        (":-8", range(2)),
        ("0:500", range(10)),
        (":", range(10)),
    ],
)
def test_ranges(text: str, expected: range) -> None:
    jsonl("a.jsonl", *range(10))
    rows = open_rows("a.jsonl", rows=text)
    assert [rows.row(index)["q"] for index in range(len(rows))] == list(expected)
    assert rows.where(len(rows) - 1) == ("a.jsonl", expected[-1])
    assert rows.origin == f"a.jsonl, rows {expected[0]} to {expected[-1]} of 10"


@given(start=st.integers(-12, 12) | st.none(), end=st.integers(-12, 12) | st.none())
def test_a_range_is_a_slice(start: int | None, end: int | None) -> None:
    class Ten:
        name = origin = "ten"
        columns: dict[str, ColumnType] = {}  # noqa: RUF012

        def __len__(self) -> int:
            return 10

        def row(self, index: int) -> dict[str, Any]:
            return {"n": index}

        def where(self, index: int) -> tuple[str, int]:
            return "ten", index

        def folder(self, index: int) -> None:
            return None

        def root(self, index: int) -> None:
            return None

    ten: Rows = Ten()
    expected = list(range(10))[start:end]
    text = f"{'' if start is None else start}:{'' if end is None else end}"
    if not expected:
        with pytest.raises(ConfigError, match="is empty, because ten has 10 rows"):
            RowRange(ten, text)
    else:
        rows = RowRange(ten, text)
        assert [rows.row(index)["n"] for index in range(len(rows))] == expected


def test_a_bad_row_names_its_file_and_its_row() -> None:
    jsonl("a.jsonl", "x")
    Path("b.jsonl").write_text('{"q": "y"}\n{broken\n')
    with pytest.raises(BadRow, match=r"^b\.jsonl row 1: the row is not JSON"):
        open_rows("*.jsonl").row(2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/rows.jsonl", r"task\.path=nowhere/rows\.jsonl does not exist"),
        ("./nowhere", r"task\.path=\./nowhere does not exist"),
        ("nowhere/*.jsonl", "matches no file"),
        ("empty", "has no data files"),
        ("empty.jsonl", "has no rows, so there is nothing to learn from"),
        ("empty.parquet", "is empty, so there are no rows"),
        ("rows.txt", "is no data file"),
        ([], r"task\.path=\[\] names no file"),
    ],
)
def test_what_cannot_be_opened(path: str | list[str], message: str) -> None:
    Path("empty").mkdir()
    for name in ("empty.jsonl", "empty.parquet", "rows.txt"):
        Path(name).touch()
    with pytest.raises(ConfigError, match=message):
        open_rows(path)


@pytest.mark.parametrize("text", ["a:b", "1:2:3", "0-500"])
def test_what_is_no_range(text: str) -> None:
    jsonl("a.jsonl", "x")
    with pytest.raises(ConfigError, match=rf"task\.rows={text} is no range of rows"):
        open_rows("a.jsonl", rows=text)


@pytest.mark.parametrize("keys", [{"name": "easy"}, {"revision": "main"}])
def test_keys_of_the_hub_are_refused_for_a_file(keys: dict[str, str]) -> None:
    jsonl("a.jsonl", "x")
    with pytest.raises(ConfigError, match="is a file on this machine, which has none, so the key would have no effect"):
        open_rows("a.jsonl", **keys)


def test_a_file_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl("a.jsonl", "x")

    def refused(*args: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)  # root may read everything
    with pytest.raises(ConfigError, match=r"task\.path=a\.jsonl may not be read by this user.*chmod \+r"):
        open_rows("a.jsonl")


def test_every_suffix_has_a_reader() -> None:
    for suffix in reader.SUFFIXES:
        Path(f"a{suffix}").touch()
        with pytest.raises(ConfigError) as refused:
            opening.open_rows(f"a{suffix}")
        assert "is no data file" not in str(refused.value)
