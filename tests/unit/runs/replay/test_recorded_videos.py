"""Videos that are made again from the files of a run: equal to what was recorded, and each change is found."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.families.clips import MESSAGES, video_renderer, vlm_of
from support.packages import needs_videos
from support.rollout_builders import completion
from support.rollout_files import edit
from vlmrl.errors import VlmrlError
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.runs.replay.comparisons import RerenderedTurn, pictures, prompts, tensors
from vlmrl.runs.replay.recorded import load_items, load_records, rollout_of
from vlmrl.runs.verdicts import State, Verdict
from vlmrl.types import Rollout, StopReason, Turn, VideoItem


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def renderer(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> FamilyRenderer:
    needs_videos()
    return video_renderer(family_folder(request.param), vlm_of(request.param))


@pytest.fixture(scope="module")
def played(renderer: FamilyRenderer) -> Rollout:
    prompt = asyncio.run(renderer.first_turn(MESSAGES))
    turn = Turn(prompt, completion([5, 6]), "AB", MESSAGES, 0, 0.5, 0.5)
    return Rollout("train/000001/00/00", "clips", 0, [turn], 0.5, {}, StopReason.TERMINATED)


@pytest.fixture(scope="module")
def recorded(played: Rollout, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = RunDir(tmp_path_factory.mktemp("recorded") / "run")
    run_dir.create()
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": [played]})
    recorder.close()
    return run_dir


@pytest.fixture
def run_dir(recorded: RunDir, tmp_path: Path) -> RunDir:
    """A copy that may be changed."""
    return RunDir(shutil.copytree(recorded.path, tmp_path / "copy"))


def lines(run_dir: RunDir, renderer: FamilyRenderer) -> list[Verdict]:
    records = load_records(run_dir, 1)
    items = load_items(run_dir, records, renderer)
    (rollout,) = (rollout_of(record, items) for record in records)
    again = asyncio.run(renderer.first_turn(rollout.turns[0].messages))
    return [
        pictures("pictures", items, [rollout]),
        tensors("tensors", items, [rollout]),
        prompts("prompts", [RerenderedTurn(rollout, 0, again)], {}),
    ]


def first_video(played: Rollout) -> VideoItem:
    return played.turns[0].prompt.videos[0]


def test_all_is_as_it_was(run_dir: RunDir, renderer: FamilyRenderer, played: Rollout) -> None:
    found = lines(run_dir, renderer)
    assert [line.state for line in found] == [State.SAME] * 3
    assert "3 distinct images and videos" in found[0].finding
    assert "video_grid_thw of 3 images and videos" in found[1].finding
    records = load_records(run_dir, 1)
    again = rollout_of(records[0], load_items(run_dir, records, renderer)).turns[0].prompt
    original = played.turns[0].prompt
    assert again.placeholders == original.placeholders
    for item, wanted in zip(again.videos, original.videos, strict=True):
        assert (item.hash, item.times.tolist(), item.rate) == (wanted.hash, wanted.times.tolist(), wanted.rate)
        assert np.array_equal(item.mm_kwargs["pixel_values_videos"], wanted.mm_kwargs["pixel_values_videos"])


def test_two_frames_swapped(run_dir: RunDir, renderer: FamilyRenderer, played: Rollout) -> None:
    """Their files hold each other's pixels."""
    one, _, other, *_ = first_video(played).frame_hashes
    shutil.copy(run_dir.image(one), run_dir.path / "spare.png")
    shutil.copy(run_dir.image(other), run_dir.image(one))
    shutil.copy(run_dir.path / "spare.png", run_dir.image(other))
    of_pixels, of_tensors, of_tokens = lines(run_dir, renderer)
    assert (of_pixels.state, of_tensors.state, of_tokens.state) == (State.DIFFERS, State.DIFFERS, State.SAME)
    assert f"images/{one}.png, frame 0 of the video {first_video(played).hash}" in of_pixels.finding
    assert f"the video processor makes other tensors of 1 of 3 {'images and videos'}" in of_tensors.finding
    assert "pixel_values_videos of video" in of_tensors.finding


def change(run_dir: RunDir, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the first video of the row."""
    edit(run_dir.rollouts_file("step", 1), lambda rows: how(rows[0]["videos"][0]))


def test_two_frames_swapped_in_the_row(run_dir: RunDir, renderer: FamilyRenderer) -> None:
    change(run_dir, lambda video: video["frames"].insert(0, video["frames"].pop(2)))
    of_pixels, of_tensors, _ = lines(run_dir, renderer)
    assert (of_pixels.state, of_tensors.state) == (State.DIFFERS, State.DIFFERS)
    assert "the order, the times or the rate of the frames of the video" in of_pixels.finding


def test_a_time_moved(run_dir: RunDir, renderer: FamilyRenderer) -> None:
    """It is part of the hash; tensors stay as they are."""

    def later(video: dict[str, Any]) -> None:
        video["times"][-1] += 1.0

    change(run_dir, later)
    of_pixels, of_tensors, _ = lines(run_dir, renderer)
    assert (of_pixels.state, of_tensors.state) == (State.DIFFERS, State.SAME)
    assert "the order, the times or the rate of the frames of the video" in of_pixels.finding


def test_two_frames_lost(run_dir: RunDir, renderer: FamilyRenderer) -> None:
    """Other tensors; where the number of tokens changes, the prompt too."""

    def shorter(video: dict[str, Any]) -> None:
        del video["frames"][-2:], video["times"][-2:]

    change(run_dir, shorter)
    assert [line.state for line in lines(run_dir, renderer)] == [State.DIFFERS] * 3


def test_a_file_that_is_missing_is_named(run_dir: RunDir, renderer: FamilyRenderer, played: Rollout) -> None:
    lost = run_dir.image(first_video(played).frame_hashes[3])
    lost.unlink()
    with pytest.raises(VlmrlError, match=rf"video {first_video(played).hash} .*cannot be replayed: .*{lost.name}"):
        lines(run_dir, renderer)
