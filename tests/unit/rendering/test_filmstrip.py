from __future__ import annotations

import numpy as np
import pytest

from support.rollout_builders import image
from support.video_rollouts import frames_of, video, video_rollout
from vlmrl.monitor.glimpse import Glimpse, size_of
from vlmrl.monitor.loggers import last_items, strip
from vlmrl.rendering.filmstrip import FRAME_HEIGHT, TEXT_HEIGHT, filmstrip
from vlmrl.types import VideoItem


def places_of(made: np.ndarray, frames: np.ndarray) -> list[int]:
    """Where each frame stands in a filmstrip: the column of its left edge."""
    height, width = frames.shape[1:3]
    columns = range(made.shape[1] - width + 1)
    return [next(x for x in columns if np.array_equal(made[:height, x : x + width], frame)) for frame in frames]


def test_frames_stand_side_by_side_in_their_order_with_times_below() -> None:
    frames = frames_of(1, side=48)
    made = filmstrip(video(1, frames))
    left = places_of(made, frames)
    assert left == sorted(left)
    assert len(set(left)) == 4
    below = made[48:]
    assert below.shape[0] == TEXT_HEIGHT
    for start, end in zip(left, [*left[1:], made.shape[1]], strict=True):
        assert (below[:, start:end] < 128).any(), "a time is written"
    swapped = filmstrip(video(1, frames[[1, 0, 2, 3]]))
    assert places_of(swapped, frames)[0] == left[1]


@pytest.mark.parametrize(("count", "side"), [(2, 8), (40, 300)])
def test_long_videos_and_large_frames_fit(count: int, side: int) -> None:
    made = filmstrip(video(1, frames_of(1, count, side), list(range(count))))
    assert made.shape[0] == min(side, FRAME_HEIGHT) + TEXT_HEIGHT
    assert made.shape[1] < 12 * (FRAME_HEIGHT + 8)


def test_loggers_show_videos_between_images() -> None:
    made = video_rollout()
    items = last_items(made)
    assert [item.modality for item in items] == ["image", "video", "image", "video"]
    whole = strip(items)
    film = filmstrip(video(1))
    wide = image(10).pixels.shape[1]
    assert np.array_equal(whole[: film.shape[0], wide + 4 : wide + 4 + film.shape[1]], film)


def test_a_terminal_shows_the_first_the_middle_and_the_last_frame() -> None:
    item = video(1, np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (10, 20, 30, 40, 50)]), range(5))
    thumbnails = Glimpse(squares=True)._thumbnails_of(item)
    shades = [part.spans[0].style.color.triplet.red for part in thumbnails]  # type: ignore[union-attr]
    assert shades == [10, 30, 50]
    assert isinstance(item, VideoItem)
    assert size_of(item) == "[video 5 frames of 8 × 8, from 0 to 4 s]"
