"""Data sets of a hub on the loopback device: configs, splits, revisions, refusals, the cache, and a dead network."""

from __future__ import annotations

import io
import socket
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from support.loopback_hub import LoopbackHub
from support.video_files import encoded, moving
from vlmrl.config.dataset import ColumnsConfig, DatasetConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources.hub import same_commits
from vlmrl.tasks.dataset.sources.opening import open_rows
from vlmrl.tasks.dataset.task import DatasetTask
from vlmrl.types import Image, Text, Video

README = b"""---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/*.jsonl
  - split: test
    path: easy_test.csv
- config_name: hard
  default: true
  data_files: hard.parquet
---
# Rows
"""


def parquet(**columns: list[Any]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


FILES = {
    "README.md": README,
    "easy/0.jsonl": b'{"q": "1"}\n{"q": "2"}\n',
    "easy/1.jsonl": b'{"q": "3"}\n',
    "easy_test.csv": b"q\n4\n",
    "hard.parquet": parquet(q=["5", "6"]),
    "picture.png": b"no rows",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        use(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HOME do in a process that has not imported the hub's library yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


def questions(**keys: Any) -> list[str]:
    rows = open_rows("someone/rows", **keys)
    return [str(rows.row(index)["q"]) for index in range(len(rows))]


def test_configs_splits_and_ranges(hub: LoopbackHub) -> None:
    commit = hub.commit("someone/rows", FILES)
    assert questions() == ["5", "6"]
    assert questions(name="hard") == ["5", "6"]
    assert questions(name="easy") == ["1", "2", "3"]
    assert questions(name="easy", split="test") == ["4"]
    assert questions(name="easy", rows="1:") == ["2", "3"]
    assert open_rows("someone/rows").origin == (
        f"someone/rows of the hub, revision {commit}, config hard, split train: 1 file"
    )


def test_a_branch_that_moves_is_read_as_before(hub: LoopbackHub) -> None:
    """With and without `task.revision`; only what no earlier run has read is the newest."""
    first = hub.commit("someone/rows", {"train.csv": b"q\n1\n"})
    second = hub.commit("someone/rows", {"train.csv": b"q\n2\n"}, branch="v2")
    known: dict[str, str] = {}
    with same_commits(known):
        assert (questions(), questions(revision="v2")) == (["1"], ["2"])
    assert known == {"someone/rows": first, "someone/rows@v2": second}
    newest = hub.commit("someone/rows", {"train.csv": b"q\n3\n"})
    hub.commit("someone/rows", {"train.csv": b"q\n4\n"}, branch="v2")
    with same_commits(known):
        assert (questions(), questions(revision="v2"), questions(revision="main")) == (["1"], ["2"], ["3"])
    assert known["someone/rows@main"] == newest
    assert questions() == ["3"]


def test_only_the_files_of_the_split_are_downloaded_and_only_once(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", FILES)
    questions()
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert {request.rpartition("/")[2] for request in fetched} == {"README.md", "hard.parquet"}
    questions()
    assert [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request] == fetched


def test_splits_by_the_names_of_files(hub: LoopbackHub) -> None:
    parts = {f"data/train-0000{n}-of-00002.parquet": parquet(q=[f"train {n}"]) for n in range(2)}
    parts["data/testmini-00000-of-00001.parquet"] = parquet(q=["mini"])
    hub.commit("someone/rows", {**parts, "dataset_infos.json": b"{}"})
    assert questions() == ["train 0", "train 1"]
    assert questions(split="testmini") == ["mini"]


def test_two_revisions_have_two_contents(hub: LoopbackHub) -> None:
    old = hub.commit("someone/rows", {"train.jsonl": b'{"q": "old"}\n'})
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "new"}\n'})
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "other"}\n'}, branch="v2")
    assert questions() == ["new"]
    assert questions(revision=old) == ["old"]
    assert questions(revision="v2") == ["other"]


def test_a_moved_branch_is_followed(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "old"}\n'})
    assert questions() == ["old"]
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "new"}\n'})
    assert questions() == ["new"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "middle"}, "task.name=middle: someone/rows has no config of this name.*choose one of easy, hard$"),
        ({"name": "easy", "split": "dev"}, "task.split=dev: .*no split of this name.*choose one of train, test$"),
        ({"revision": "v9"}, "task.revision=v9: .*no branch, tag or commit.*choose one of main, v2, or a commit$"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(hub: LoopbackHub, keys: dict[str, str], message: str) -> None:
    hub.commit("someone/rows", FILES)
    hub.commit("someone/rows", FILES | {"more.md": b""}, branch="v2")
    with pytest.raises(ConfigError, match=message):
        questions(**keys)


def test_several_configs_without_a_default_are_refused(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", FILES | {"README.md": README.replace(b"  default: true\n", b"")})
    with pytest.raises(ConfigError, match=r"2 configs and task.name is not set.*set it to one of easy, hard"):
        questions()


def test_an_unknown_id_is_refused(hub: LoopbackHub) -> None:
    with pytest.raises(ConfigError, match="someone/rows is neither a file or folder on this machine nor a data set of"):
        questions()


def test_a_gated_data_set_is_refused(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", FILES)
    hub.gated.add("someone/rows")
    with pytest.raises(ConfigError, match=rf"gated.*accept its terms on {hub.url}/datasets/someone/rows, then run hf"):
        questions()


def test_a_local_folder_wins(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("someone/rows", FILES)
    monkeypatch.chdir(tmp_path)
    Path("someone/rows").mkdir(parents=True)
    Path("someone/rows/train.jsonl").write_text('{"q": "mine"}')
    assert questions() == ["mine"]
    assert "which wins over a hub data set of this name" in open_rows("someone/rows").origin
    assert hub.requests == []
    with pytest.raises(ConfigError, match=r"task\.revision=main: task\.path=someone/rows is a folder on this machine"):
        questions(revision="main")


def test_a_dead_hub_is_one_sentence_and_no_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use(monkeypatch, url, tmp_path)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"cannot be downloaded from {url} \(.*refused\), so there are no rows"):
            questions()
        assert time.monotonic() - began < 10


def test_offline_reads_the_cache(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("someone/rows", FILES)
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "other"}\n'}, branch="v2")
    assert questions(name="easy") == ["1", "2", "3"]
    assert questions(revision="v2") == ["other"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(hub.requests)
    assert questions(name="easy") == ["1", "2", "3"]
    assert questions(revision="v2") == ["other"]
    with pytest.raises(ConfigError, match=r"no files of this split|do not exist"):
        questions(name="easy", split="test")
    with pytest.raises(ConfigError, match=r"not in the hub's cache, and HF_HUB_OFFLINE is set"):
        open_rows("someone/else")
    assert len(hub.requests) == seen


def test_offline_refuses_a_cache_without_some_shards(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"data/train-0000{n}-of-00002.parquet": parquet(q=[f"train {n}"]) for n in range(2)}
    hub.commit("someone/rows", parts)
    questions()
    cache = Path(constants.HF_HUB_CACHE)
    next(cache.rglob("train-00001-of-00002.parquet")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"has data/train-00000-of-00002.parquet and not data/train-00001-of-00002"):
        questions()


def test_a_header_that_is_no_yaml_is_refused(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", {"README.md": b"---\nconfigs: [\n---\n", "train.jsonl": b'{"q": "1"}'})
    with pytest.raises(ConfigError, match=r"the header of its README.md is no YAML"):
        questions()


def test_pictures_that_rows_of_text_name_come_along(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "1", "image": "a/1.png"}', "a/1.png": b"pixels", "b.md": b""})
    rows = open_rows("someone/rows")
    folder = rows.folder(0)
    assert folder is not None
    assert (Path(folder) / "a/1.png").read_bytes() == b"pixels"


def test_videos_that_rows_of_text_name_come_along(hub: LoopbackHub) -> None:
    hub.commit("someone/rows", {"train.jsonl": b'{"q": "1", "video": "a/1.MP4"}', "a/1.MP4": b"frames", "a/1.wav": b""})
    rows = open_rows("someone/rows")
    folder = rows.folder(0)
    assert folder is not None
    assert (Path(folder) / "a/1.MP4").read_bytes() == b"frames"
    assert not (Path(folder) / "a/1.wav").exists()


# ── repositories without files of rows, which `datasets` reads ──────────────────────────────────────────────


def png(shade: int) -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade,) * 3).save(data, "PNG")
    return data.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


PICTURES = {f"{number}.png": png(10 * number) for number in range(3)}
METADATA = b"".join(b'{"file_name": "%d.png", "question": "Which?", "answer": "%d"}\n' % (n, n) for n in range(3))
CSV = b"file_name,question,answer\n" + b"".join(b"%d.png,Which?,%d\n" % (n, n) for n in range(3))
SAMPLES = {f"{n}.json": b'{"question": "Which?", "answer": "%d"}' % n for n in range(3)}
BUILT: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "images and metadata.jsonl": (
        {f"train/{k}": v for k, v in PICTURES.items()} | {"train/metadata.jsonl": METADATA},
        {},
    ),
    "images and metadata.csv": ({f"train/{k}": v for k, v in PICTURES.items()} | {"train/metadata.csv": CSV}, {}),
    "a zip archive of both": ({"train.zip": zipped(PICTURES | {"metadata.jsonl": METADATA})}, {}),
    "a webdataset": (
        {"data/train-000.tar": tar(dict(sorted((PICTURES | SAMPLES).items())))},
        {"columns": ColumnsConfig(prompt="json.question", images="png", answer="json.answer")},
    ),
    "a folder per class": (
        {f"train/{number}/{number}.png": png(10 * number) for number in range(3)},
        {"template": "Which?", "columns": ColumnsConfig(answer="label")},
    ),
}


@pytest.fixture
def _fresh_datasets(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import datasets.config
    from huggingface_hub import HfFileSystem

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "datasets/downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "datasets/extracted")
    HfFileSystem.clear_instance_cache()


@pytest.mark.usefixtures("_fresh_datasets")
@pytest.mark.parametrize("kind", BUILT)
def test_pictures_of_a_repository_are_rows(kind: str, hub: LoopbackHub) -> None:
    files, settings = BUILT[kind]
    hub.commit("someone/pictures", files)
    task = DatasetTask(DatasetConfig(path="someone/pictures", eval_fraction=0.0, **settings), seed=0)
    seen = []
    for row in range(3):
        problem = task.problem_of_row("train", row)
        image, text = problem.messages[0].content
        assert isinstance(image, Image)
        assert isinstance(text, Text)
        seen.append((image.source[0, 0, 0] // 10, text.text, problem.answer))
    assert seen == [(number, "Which?", str(number)) for number in range(3)]


def clips() -> dict[str, bytes]:
    return {f"{n}.mp4": encoded(moving(3, seed=n), rate=4, kind=("mp4", "mpeg4", "yuv420p")) for n in range(2)}


@pytest.mark.usefixtures("_fresh_datasets")
@pytest.mark.parametrize("kind", ["a folder", "a webdataset"])
def test_videos_of_a_repository_are_rows(kind: str, hub: LoopbackHub) -> None:
    lines = b"".join(b'{"file_name": "%d.mp4", "question": "Which?", "answer": "%d"}\n' % (n, n) for n in range(2))
    asked = {f"{n}.json": b'{"question": "Which?", "answer": "%d"}' % n for n in range(2)}
    files = {f"train/{name}": content for name, content in (clips() | {"metadata.jsonl": lines}).items()}
    columns = ColumnsConfig()
    if kind == "a webdataset":
        files = {"data/train-000.tar": tar(dict(sorted((clips() | asked).items())))}
        columns = ColumnsConfig(prompt="json.question", answer="json.answer")
    hub.commit("someone/clips", files)
    task = DatasetTask(DatasetConfig(path="someone/clips", eval_fraction=0.0, columns=columns), seed=0)
    for row, content in enumerate(clips().values()):
        problem = task.problem_of_row("train", row)
        (video,) = [part for part in problem.messages[0].content if isinstance(part, Video)]
        source = video.source if isinstance(video.source, bytes) else Path(video.source).read_bytes()
        assert (source, problem.answer) == (content, str(row))


@pytest.mark.usefixtures("_fresh_datasets")
@pytest.mark.parametrize("files", [{"rows.py": b"raise SystemExit"}, {"README.md": b"# none"}])
def test_what_datasets_cannot_read_is_refused_in_one_sentence(files: dict[str, bytes], hub: LoopbackHub) -> None:
    hub.commit("someone/rows", files)
    with pytest.raises(
        ConfigError, match=r"no files of rows, and .*executed\): set task\.revision=refs/convert"
    ) as error:
        questions()
    assert ".py:" not in str(error.value), "no place in a library"
