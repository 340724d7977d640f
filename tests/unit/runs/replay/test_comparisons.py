"""Findings for cases that a run without faults does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from support.rollout_builders import image, rollout
from vlmrl.record.image_files import mm_kwargs_digests
from vlmrl.runs.replay.comparisons import RerenderedTurn, ScoredTurn, logprobs, prompts, tensors
from vlmrl.runs.replay.recorded import RecordedItem, fits
from vlmrl.runs.verdicts import State
from vlmrl.types import FloatArray, Image, ImageItem, Prompt

PLAYED = rollout()


def scored(recorded: list[float], today: list[float], number: int = 0) -> ScoredTurn:
    def array(values: list[float]) -> FloatArray:
        return np.array(values, np.float32)

    return ScoredTurn(PLAYED, number, PLAYED.turns[number].completion.token_ids, array(recorded), array(today))


def test_a_difference_beyond_rounding_is_named_before_an_earlier_smaller_one() -> None:
    turns = [scored([-1, -2, -3], [-1, -2.00001, -3]), scored([-1, -2, -3], [-1, -2, -3.5], number=1)]
    line = logprobs("logprobs", turns, rounding=1e-3, spelling={202: " red"})
    assert line.state is State.DIFFERS
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 1, "completion_token": 2}
    assert "turn 1, completion token 2 (202 ' red'): -3 recorded, -3.5 today, 0.5 apart" in line.finding
    assert line.metrics == {
        "tokens": 6,
        "differing": 2,
        "beyond_rounding": 1,
        "largest": 0.5,
        "mean": pytest.approx(0.5 / 6, rel=1e-3),
    }


def test_within_rounding() -> None:
    line = logprobs("logprobs", [scored([-1, -2, -3], [-1, -2.00001, -3])], rounding=1e-3, spelling={})
    assert line.state is State.ROUNDING
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 0, "completion_token": 1}


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_infinitely_far(broken: float) -> None:
    line = logprobs("logprobs", [scored([-1, -2, -3], [-1, broken, -3])], rounding=1.0, spelling={})
    assert line.state is State.DIFFERS
    assert line.metrics["largest"] == math.inf


def test_nothing_to_compare() -> None:
    assert logprobs("logprobs", [], rounding=1.0, spelling={}).state is State.NOT_VISIBLE
    assert prompts("prompts", [], spelling={}).state is State.NOT_VISIBLE


def test_a_shorter_prompt_differs_at_its_end() -> None:
    whole = PLAYED.turns[0].prompt
    shorter = Prompt(whole.token_ids[:-1], whole.placeholders, whole.mm_items)
    line = prompts("prompts", [RerenderedTurn(PLAYED, 0, shorter)], spelling={})
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 0, "prompt_token": len(whole.token_ids) - 1}
    assert "no token is rendered today" in line.finding


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────


def processed(scale: float) -> ImageItem:
    """The image that the builders' rollout shows, with tensors of an image processor that multiplies by `scale`."""
    plain = image(10)
    pixels = np.full((4, 8), scale, np.float32)
    return ImageItem(plain.hash, plain.pixels, {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 2]])}, 2)


@pytest.mark.parametrize(
    ("digests", "state", "finding"),
    [
        (mm_kwargs_digests(processed(1.0)), State.SAME, "image_grid_thw, pixel_values of 1 images"),
        (mm_kwargs_digests(processed(2.0)), State.DIFFERS, "the first is pixel_values of image"),
        ({}, State.DIFFERS, "the first is image_grid_thw of image"),
        (None, State.NOT_VISIBLE, "no digests"),
    ],
)
def test_a_processor_that_makes_other_tensors(digests: Mapping[str, str] | None, state: State, finding: str) -> None:
    item = processed(1.0)
    line = tensors("tensors", {item.hash: RecordedItem(item.hash, Image(item.pixels), item, digests)}, [PLAYED])
    assert line.state is state
    assert finding in line.finding


def test_an_image_of_another_size_does_not_fit() -> None:
    assert fits(PLAYED)
    other = rollout()
    prompt = other.turns[0].prompt
    grown = ImageItem(prompt.images[0].hash, prompt.images[0].pixels, {}, 3)
    other.turns[0].prompt = Prompt(prompt.token_ids, prompt.placeholders, (grown, *prompt.images[1:]))
    assert not fits(other)
