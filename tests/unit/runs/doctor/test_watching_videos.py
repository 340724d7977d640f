"""What the doctor keeps of the videos that a task shows: the frames as they were, or as they were read from a file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.families.clips import frames, video_renderer, vlm_of
from support.moving_clips import ClipsConfig, MovingClips
from support.packages import needs_videos
from support.video_files import encoded
from vlmrl.runs.doctor.noise_images import NoiseTask
from vlmrl.runs.doctor.placeholders import shown_otherwise
from vlmrl.runs.doctor.watching import WatchedRenderer
from vlmrl.types import Image, Message, Video


@pytest.fixture
def renderer(family_folder: Callable[[str], Path]) -> WatchedRenderer:
    needs_videos()
    return WatchedRenderer(video_renderer(family_folder("qwen3_vl"), vlm_of("qwen3_vl")))


def test_frames_are_kept_as_they_were_shown(renderer: WatchedRenderer) -> None:
    """An env may draw on its arrays later."""
    drawn = frames(0, 6)
    before = drawn.copy()
    asyncio.run(renderer.first_turn([Message.of("user", "What? ", Video(drawn, fps=2.0))]))
    drawn[:] = 0
    (turn,) = renderer.rendered
    (video,), (item,) = turn.videos, turn.prompt.videos
    assert np.array_equal(video.source, before)
    assert shown_otherwise(video, item) is None


def test_a_file_has_the_frames_that_were_read(renderer: WatchedRenderer, tmp_path: Path) -> None:
    source, path = frames(1, 12, 64, 64), tmp_path / "clip.mkv"
    path.write_bytes(encoded(source, rate=4))
    image = Image(frames(2, 1, 64, 64)[0])
    asyncio.run(renderer.first_turn([Message.of("user", Video(path), image, Video(frames(3, 4), times=[0, 1, 2, 4]))]))
    (turn,) = renderer.rendered
    read, given = turn.videos
    assert len(turn.hashes) == 1
    assert read.times == turn.prompt.videos[0].times.tolist()
    assert np.array_equal(read.source, source[np.round(np.array(read.times) * 4).astype(int)])
    assert given.times == [0, 1, 2, 4]
    for part, item in zip(turn.videos, turn.prompt.videos, strict=True):
        assert shown_otherwise(part, item) is None


@pytest.mark.parametrize(("most", "shown"), [(2, 2), (3, 3), (64, 5)])
def test_a_noise_video_is_within_the_runs_budget(most: int, shown: int) -> None:
    vlm = vlm_of("qwen3_vl")
    assert vlm.video is not None
    task = NoiseTask(MovingClips(ClipsConfig(), seed=0), replace(vlm, video=replace(vlm.video, max_frames=most)))
    own, in_noise = (task.env(task.problem("train", index)).reset()[0] for index in (0, 1))
    assert [type(part) for part in own.content] == [type(part) for part in in_noise.content]
    (video,) = (part for part in in_noise.content if isinstance(part, Video))
    assert len(video.source) == len(video.times or ()) == shown
    frames_shown = [frame.tobytes() for frame in video.source]
    assert len(set(frames_shown)) == shown, "no two frames are equal"
