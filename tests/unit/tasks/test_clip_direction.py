"""clip_direction: what the frames of a clip say of its answer without their order, and the task's contract."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlmrl.config.clip_direction import ClipDirectionConfig, Frames
from vlmrl.rendering.images import image_hash
from vlmrl.tasks.check import check_task
from vlmrl.tasks.clip_direction import COLORS, WAYS, Clip, ClipDirection, all_clips, draw, video
from vlmrl.types import Video

SIZE = 32
GREY = (128, 128, 128)


def frames_of(clip: Clip) -> Counter[str]:
    return Counter(image_hash(frame) for frame in draw(clip, SIZE))


def begin(frame: np.ndarray, color: str, axis: int) -> int:
    """The first row or column of the square."""
    mask = (frame == COLORS[color][1]).all(-1).any(1 - axis)
    assert mask.sum() == 16
    return int(mask.argmax())


@pytest.mark.parametrize("way", WAYS)
def test_the_square_crosses_the_frame_twice_in_two_colors(way: str) -> None:
    """By hand: 16 of 32 pixels wide, it begins at 0, 5, 10 and 16; to the left and up the other way round."""
    axis, begins = {
        "L": (1, [16, 10, 5, 0]),
        "R": (1, [0, 5, 10, 16]),
        "U": (0, [16, 10, 5, 0]),
        "D": (0, [0, 5, 10, 16]),
    }[way]
    frames = draw(Clip(way, "2", "3", lane=3), SIZE)
    assert frames.shape == (9, SIZE, SIZE, 3)
    assert {tuple(pixel) for pixel in frames[0].reshape(-1, 3)} == {GREY}
    for number, color in enumerate("22223333"):
        frame = frames[1 + number]
        assert {tuple(pixel) for pixel in frame.reshape(-1, 3)} == {GREY, COLORS[color][1]}
        assert begin(frame, color, axis) == begins[number % 4]
        assert begin(frame, color, 1 - axis) == 3


def test_the_frames_without_their_order_fit_four_answers() -> None:
    """The same frames in reverse order, and with the colors exchanged: so no policy without time beats one in four."""
    answers: dict[frozenset[tuple[str, int]], set[str]] = {}
    for clip in all_clips(4):
        answers.setdefault(frozenset(frames_of(clip).items()), set()).add(clip.answer)
    assert {len(found) for found in answers.values()} == {4}
    assert all(len({each[0] for each in found}) == len({each[1] for each in found}) == 2 for found in answers.values())


def test_the_controls_show_what_they_say() -> None:
    clip = Clip("L", "1", "4", 2)
    whole, shuffled, first = (video(clip, SIZE, shown).source for shown in Frames)
    assert Counter(map(image_hash, shuffled)) == Counter(map(image_hash, whole))
    assert not np.array_equal(shuffled, whole)
    assert first.shape == whole.shape
    assert (first == 128).all()


def test_training_asks_for_every_answer_as_often_and_never_for_a_held_out_clip() -> None:
    task = ClipDirection(ClipDirectionConfig(), seed=3)
    clips = [task.problem("train", index) for index in range(160)]
    assert set(Counter(clip.answer for clip in clips).values()) == {10}
    held_out = {task.problem("eval", index).id for index in range(768)}
    assert 60 < len(held_out) < 140  # an eighth of 768
    assert not held_out & {clip.id for clip in clips}
    other = ClipDirection(ClipDirectionConfig(), seed=4)
    assert [other.problem("eval", index) for index in range(9)] == [task.problem("eval", index) for index in range(9)]
    assert [other.problem("train", index) for index in range(9)] != clips[:9]


def test_an_episode_asks_twice_and_shows_the_clip_once() -> None:
    task = ClipDirection(ClipDirectionConfig(), seed=0)
    env = task.env(Clip("U", "3", "1", 0))
    (opening,) = env.reset()
    assert [type(part) for part in opening.content][1:] == [Video]
    reply = env.step("U")
    assert (reply.turn_reward, reply.done, reply.reward) == (1.0, False, 0.0)
    last = env.step("It was blue: 3")
    assert (last.turn_reward, last.done, last.reward) == (1.0, True, 1.0)
    assert last.metrics == {"exact_match": 1.0, "way": 1.0, "first_color": 1.0}


def test_it_keeps_the_contract_of_tasks() -> None:
    task = ClipDirection(ClipDirectionConfig(), seed=0)
    assert check_task(task, max_turns=2) == []
