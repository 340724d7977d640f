"""Videos: each line of the doctor's table fails where its hop is broken, and no line fails unbroken.

The conversations show a still picture and two videos, one sampled at a frame rate and one with times of its own
(tests/support/moving_clips.py), and the same in noise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.broken_parts import TamperingEngine
from support.doctor_parts import (
    Parts,
    assert_fails,
    collected,
    config_of,
    engine_lines,
    engine_position_line,
    hash_line,
    pixel_line,
    placeholder_line,
    position_line,
    transformers_line,
)
from support.packages import needs_videos
from vlmrl.models.families.positions import SECONDS
from vlmrl.rendering.images import image_hash
from vlmrl.rendering.video_store import video_hash
from vlmrl.runs.doctor.tokens import first_turns, later_turns
from vlmrl.runs.verdicts import State
from vlmrl.types import MMItem, Prompt, Rollout, VideoItem, mm_token_type_ids

TASK = ("task=imported", "task.target=support.moving_clips:MovingClips", "task.max_turns=2")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def parts(
    request: pytest.FixtureRequest, family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Parts]:
    needs_videos()
    threads = torch.get_num_threads()
    composed = config_of(family_folder(request.param), *TASK, "orchestrator/renderer=template")
    yield collected(composed, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


def has_times_in_text(parts: Parts) -> bool:
    """Whether the family writes the time of each frame into the prompt."""
    return parts.run.config.model.name.endswith("qwen3_vl")


def test_no_line_fails_unbroken(parts: Parts) -> None:
    shown = {frozenset(item.modality for item in sample.mm_items) for sample in parts.evidence.samples}
    assert frozenset({"image", "video"}) in shown, "images and videos in one conversation"
    lines = [
        first_turns("token ids, first turns", parts.reference, parts.scripted),
        later_turns("token ids, later turns", parts.reference, parts.scripted),
        pixel_line(parts, parts.scripted),
        hash_line(parts, parts.evidence),
        placeholder_line(parts, parts.evidence.samples),
        position_line(parts),
        engine_position_line(parts, parts.evidence),
        *engine_lines(parts, parts.run.engine),
        transformers_line(parts),
    ]
    assert [line for line in lines if line.state is not State.OK] == []
    by_name = {line.name: line for line in lines}
    assert by_name["pixels"].metrics["videos"] >= 3
    assert by_name["placeholders"].metrics["video_tokens"] > by_name["placeholders"].metrics["image_tokens"] > 0
    assert by_name["image hashes"].metrics["videos"] > 0


# ── what the renderer makes of a video ──────────────────────────────────────────────────────────────────────


def remade(item: VideoItem, frames: np.ndarray, times: np.ndarray) -> VideoItem:
    """The item with other frames and times, whose hashes fit them."""
    hashes = tuple(map(image_hash, frames))
    digest = video_hash(hashes, times, item.rate)
    return dataclasses.replace(item, hash=digest, frames=frames, times=times, frame_hashes=hashes)


def swapped(item: VideoItem) -> VideoItem:
    order = [1, 0, *range(2, len(item.frames))]
    return remade(item, item.frames[order], item.times)


def moved(item: VideoItem) -> VideoItem:
    """The last frame is shown a quarter of a second later."""
    return remade(item, item.frames, item.times + 0.25 * (np.arange(len(item.times)) == len(item.times) - 1))


def shorter(item: VideoItem) -> VideoItem:
    return remade(item, item.frames[:-1], item.times[:-1])


def with_last_video(prompt: Prompt, change: Callable[[VideoItem], VideoItem]) -> Prompt:
    """The prompt with another last video, of which its placeholder knows."""
    at = max(i for i, item in enumerate(prompt.mm_items) if isinstance(item, VideoItem))
    items, places = list(prompt.mm_items), list(prompt.placeholders)
    item = items[at]
    assert isinstance(item, VideoItem)
    items[at] = change(item)
    places[at] = dataclasses.replace(places[at], hash=items[at].hash)
    return Prompt(prompt.token_ids, tuple(places), tuple(items))


@pytest.mark.parametrize("change", [swapped, moved, shorter])
def test_other_frames_or_times_than_the_tasks(parts: Parts, change: Callable[[VideoItem], VideoItem]) -> None:
    """In a turn whose video has times of its own, and in one whose frames are sampled."""
    for is_first in (True, False):
        turns = list(parts.evidence.rendered)
        at = next(i for i, turn in enumerate(turns) if turn.is_first is is_first)
        turns[at] = dataclasses.replace(turns[at], prompt=with_last_video(turns[at].prompt, change))
        broken = copy.copy(parts.evidence)
        broken.rendered = turns
        line = hash_line(parts, broken)
        assert_fails(line)
        assert "of a video" in line.finding


def test_frames_under_the_hash_of_others(parts: Parts) -> None:
    turns = list(parts.evidence.rendered)
    shown = with_last_video(turns[0].prompt, lambda item: dataclasses.replace(swapped(item), hash=item.hash))
    turns[0] = dataclasses.replace(turns[0], prompt=shown)
    broken = copy.copy(parts.evidence)
    broken.rendered = turns
    assert_fails(hash_line(parts, broken))


def with_first_prompt(parts: Parts, change: Callable[[VideoItem], VideoItem]) -> list[Rollout]:
    """The scripted rollouts, of which the last has another video in its first prompt."""
    rollout = parts.scripted[-1]
    turn = rollout.turns[0]
    turns = [dataclasses.replace(turn, prompt=with_last_video(turn.prompt, change)), *rollout.turns[1:]]
    return [*parts.scripted[:-1], dataclasses.replace(rollout, turns=turns)]


def test_a_time_that_is_not_in_the_prompt(parts: Parts) -> None:
    """Of a family that writes the times into the prompt."""
    line = first_turns("token ids, first turns", parts.reference, with_first_prompt(parts, moved))
    assert (line.state is State.FAILED) is has_times_in_text(parts)


def other_tensors(item: VideoItem) -> VideoItem:
    """Its tensors are those of two frames swapped; the frames themselves are right."""
    rows = item.mm_kwargs["pixel_values_videos"]
    half = len(rows) // 2
    tensors = {**item.mm_kwargs, "pixel_values_videos": np.concatenate([rows[half:], rows[:half]])}
    return dataclasses.replace(item, hash="swapped", mm_kwargs=tensors)


def one_level(item: VideoItem) -> VideoItem:
    rows = item.mm_kwargs["pixel_values_videos"].copy()
    rows.flat[rows.size // 2] += 1 / 255
    return dataclasses.replace(item, hash="shifted", mm_kwargs={**item.mm_kwargs, "pixel_values_videos": rows})


@pytest.mark.parametrize("change", [other_tensors, one_level, swapped, shorter])
def test_other_tensors_than_the_processors(parts: Parts, change: Callable[[VideoItem], VideoItem]) -> None:
    assert_fails(pixel_line(parts, with_first_prompt(parts, change)))


# ── placeholders and positions ──────────────────────────────────────────────────────────────────────────────


def test_a_video_marked_as_an_image(parts: Parts) -> None:
    samples = parts.evidence.samples
    types = samples[-1].mm_token_type_ids
    broken = dataclasses.replace(samples[-1], mm_token_type_ids=np.where(types == 2, 1, types))
    assert_fails(placeholder_line(parts, [*samples[:-1], broken]))


def test_a_frame_without_a_place(parts: Parts) -> None:
    """The renderer counts one token too few, in the video and in its placeholder alike."""
    samples = parts.evidence.samples
    at = next(i for i, place in enumerate(samples[-1].placeholders) if place.modality == "video")
    places, items = list(samples[-1].placeholders), list(samples[-1].mm_items)
    places[at] = dataclasses.replace(places[at], length=places[at].length - 1)
    items[at] = dataclasses.replace(items[at], num_tokens=items[at].num_tokens - 1)
    broken = dataclasses.replace(
        samples[-1],
        placeholders=tuple(places),
        mm_items=tuple(items),
        mm_token_type_ids=mm_token_type_ids(len(samples[-1].token_ids), tuple(places)),
    )
    assert_fails(placeholder_line(parts, [*samples[:-1], broken]))


def test_positions_off_by_one_behind_a_video(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts.run.policy.positions

    def off(length: int, places: Any, items: Any) -> np.ndarray:
        found = right(length, places, items).copy()
        end = max(place.offset + place.length for place in places if place.modality == "video")
        found[1:, end:] += 1
        return found

    monkeypatch.setattr(parts.run.policy, "positions", off)
    assert_fails(position_line(parts))
    assert_fails(transformers_line(parts))


def test_positions_that_ignore_the_seconds(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a family that spaces the frames by them."""
    right = parts.run.policy.positions
    if not any(SECONDS in item.mm_kwargs for sample in parts.evidence.samples for item in sample.mm_items):
        pytest.skip("this family does not space the frames by seconds")

    def timeless(item: MMItem) -> MMItem:
        return dataclasses.replace(item, mm_kwargs={n: v for n, v in item.mm_kwargs.items() if n != SECONDS})

    monkeypatch.setattr(
        parts.run.policy, "positions", lambda length, places, items: right(length, places, tuple(map(timeless, items)))
    )
    assert_fails(position_line(parts))


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_swapped_in_the_engine(parts: Parts) -> None:
    def tampered(prompt: Prompt) -> Prompt:
        items = [
            dataclasses.replace(item, mm_kwargs=other_tensors(item).mm_kwargs) if isinstance(item, VideoItem) else item
            for item in prompt.mm_items
        ]
        return dataclasses.replace(prompt, mm_items=tuple(items))

    engine, blind, trainer = engine_lines(parts, TamperingEngine(parts.run.engine, tampered))
    assert_fails(engine)
    assert_fails(blind)
    assert trainer.state is State.OK
