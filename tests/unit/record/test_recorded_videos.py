"""What a run records of videos: each frame once, and in the row which frames, when, and what the processor made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.rollout_builders import image, rollout
from support.rollout_files import edit
from support.video_rollouts import GAP, TIMES, digest, frames_of, video, video_rollout
from vlmrl.record import disk_bound
from vlmrl.record.image_files import recorded_digests
from vlmrl.record.rollout_rows import image_hashes
from vlmrl.record.rollouts import RolloutRecord, RolloutRecorder, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import Message, Rollout, Video


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def written(run_dir: RunDir, *rollouts: Rollout, step: int = 1, mib: int | None = None) -> list[RolloutRecord]:
    recorder = RolloutRecorder(run_dir, mib)
    recorder.write(step, {"train": rollouts})
    recorder.close()
    return list(read_rollouts(run_dir.rollouts_file("step", step)))


def test_a_video_comes_back(run_dir: RunDir) -> None:
    """Siblings and turns share it. Frames are PNGs, and times, rate and digests are exact."""
    first, second = written(run_dir, video_rollout(), video_rollout(index=1))
    assert first["videos"] == second["videos"]
    assert list(first["videos"]) == [video(1).hash, video(2).hash]
    for seed in (1, 2):
        item, found = video(seed), first["videos"][video(seed).hash]
        assert (found["times"], found["fps"]) == (list(TIMES), 1.5)
        assert found["tensors"] == {name: digest(array) for name, array in item.mm_kwargs.items()}
        shown = [np.asarray(PIL.Image.open(run_dir.image(hash))) for hash in found["frames"]]
        assert np.array_equal(np.stack(shown), frames_of(seed)), "every frame, in the order of the video"
    places = first["turns"][1]["placeholders"]
    assert [(length, hash, gaps) for _, length, hash, gaps in places] == [
        (2, image(10).hash, ()),
        (5, video(1).hash, GAP),
        (2, image(20).hash, ()),
        (5, video(2).hash, GAP),
    ]
    content = first["turns"][0]["messages"][0]["content"]
    assert [(part["type"], part.get("hash")) for part in content] == [
        ("text", None),
        ("image", image(10).hash),
        ("video", video(1).hash),
        ("image", image(20).hash),
    ]


def test_a_frame_of_several_videos_is_one_file(run_dir: RunDir) -> None:
    """Frames backwards, and twice the same frame, make no further file; an image of the same pixels has its digests."""
    frames = frames_of(1)
    backwards, twice = video(0, frames[::-1]), video(0, frames[[0, 0, 1, 1]])
    still = replace(image(10), pixels=frames[2], hash=video(1).frame_hashes[2], mm_kwargs={"a": frames[2]})
    written(run_dir, video_rollout((video(1), backwards, twice, still)))
    assert len(list(run_dir.images.iterdir())) == 4
    with PIL.Image.open(run_dir.image(still.hash)) as picture:
        assert recorded_digests(picture) == {"a": digest(frames[2])}
    with PIL.Image.open(run_dir.image(video(1).frame_hashes[0])) as picture:
        assert recorded_digests(picture) is None


def test_a_video_that_reached_no_prompt_has_no_hash(run_dir: RunDir) -> None:
    made = video_rollout((video(1),))
    (turn,) = made.turns
    turn.messages = [Message.of("user", Video("lost.mp4")), *turn.messages]
    (record,) = written(run_dir, made)
    found = [part for message in record["turns"][0]["messages"] for part in message["content"] if "hash" in part]
    assert found == [{"type": "video", "hash": None}, {"type": "video", "hash": video(1).hash}]
    assert list(record["videos"]) == [video(1).hash]


def test_the_row_names_the_files_for_other_programs(run_dir: RunDir) -> None:
    written(run_dir, video_rollout())
    row = pandas.read_parquet(run_dir.rollouts_file("step", 1)).iloc[0]
    assert [part["type"] for message in row.messages for part in message["content"]].count("video") == len(row.videos)
    paths = [run_dir.rollouts / path for each in row.videos for path in each["frames"]]
    assert len(paths) == 8
    assert all(path.exists() for path in paths)
    assert [list(each["times"]) for each in row.videos] == [list(TIMES)] * 2
    assert len(row.images) == 2


@pytest.mark.parametrize("made", [rollout(), video_rollout((image(10),))], ids=["images", "one image"])
def test_a_file_of_before_there_were_videos(run_dir: RunDir, made: Rollout) -> None:
    (whole,) = written(run_dir, made)
    path = run_dir.rollouts_file("step", 1)
    pq.write_table(pq.read_table(path).drop_columns(["videos"]), path)
    assert list(read_rollouts(path)) == [whole]
    assert whole["videos"] == {}
    assert image_hashes(path) == {hash for turn in whole["turns"] for _, _, hash, _ in turn["placeholders"]}


def test_frames_count_and_go_with_their_rollouts(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that a newer video shows as well stays."""
    monkeypatch.setattr(disk_bound, "MIB", 2**10)
    shared = frames_of(100, 1, side=64)
    for step in range(1, 6):
        frames = np.concatenate([frames_of(step, 2, side=64), shared])
        made = video_rollout((video(step, frames, TIMES[:3]),), step=step)
        written(run_dir, made, step=step, mib=150)
        assert image_hashes(run_dir.rollouts_file("step", step)) == set(made.turns[0].prompt.videos[0].frame_hashes)
    kept = run_dir.rollouts_steps("step")
    assert kept[-1] == 5
    assert 1 < len(kept) < 5
    assert len(list(run_dir.images.iterdir())) == 2 * len(kept) + 1
    size = sum(path.stat().st_size for folder in (run_dir.rollouts, run_dir.images) for path in folder.iterdir())
    assert 100 * 2**10 < size <= 150 * 2**10


def no_frames(row: dict[str, Any]) -> None:
    row["videos"][0]["frames"] = []


def a_time_too_few(row: dict[str, Any]) -> None:
    row["videos"][0]["times"].pop()


def a_time_that_is_no_number(row: dict[str, Any]) -> None:
    row["videos"][0]["times"][1] = float("nan")


def no_rate(row: dict[str, Any]) -> None:
    row["videos"][0]["fps"] = 0.0


def another_folder(row: dict[str, Any]) -> None:
    row["videos"][0]["frames"][0] = "/etc/passwd"


def no_json(row: dict[str, Any]) -> None:
    row["videos"][0]["tensors"] = "{"


@pytest.mark.parametrize(
    "change", [no_frames, a_time_too_few, a_time_that_is_no_number, no_rate, another_folder, no_json]
)
def test_a_video_that_no_run_wrote_is_damage(run_dir: RunDir, change: Callable[[dict[str, Any]], None]) -> None:
    written(run_dir, video_rollout(), video_rollout(index=1))
    path = run_dir.rollouts_file("step", 1)
    edit(path, lambda rows: change(rows[0]))
    said: list[str] = []
    assert [record["index"] for record in read_rollouts(path, damaged=said.append)] == [1]
    assert "no run wrote it" in said[0]


def test_a_column_of_another_type_is_refused(run_dir: RunDir) -> None:
    written(run_dir, video_rollout())
    path = run_dir.rollouts_file("step", 1)
    table = pq.read_table(path)
    at = table.schema.get_field_index("videos")
    pq.write_table(table.set_column(at, "videos", pa.array([["a"]])), path)
    said: list[str] = []
    assert not list(read_rollouts(path, damaged=said.append))
    assert "column videos has the type list" in said[0]
