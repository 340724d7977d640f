"""What a line says about cases that a sound run does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from support.rollout_builders import image, rollout
from vlmrl.record.rollouts import mm_kwargs_digests
from vlmrl.runs.replay.lines import Rendered, Scored, Verdict, logprobs, prompts, tensors
from vlmrl.runs.replay.recorded import RecordedImage, fits
from vlmrl.types import FloatArray, ImageItem, Prompt

PLAYED = rollout()


def scored(recorded: list[float], today: list[float], number: int = 0) -> Scored:
    def figures(values: list[float]) -> FloatArray:
        return np.array(values, np.float32)

    return Scored(PLAYED, number, PLAYED.turns[number].completion.token_ids, figures(recorded), figures(today))


def test_the_first_beyond_rounding_comes_before_the_first() -> None:
    turns = [scored([-1, -2, -3], [-1, -2.00001, -3]), scored([-1, -2, -3], [-1, -2, -3.5], number=1)]
    line = logprobs("logprobs", turns, rounding=1e-3, spelling={202: " red"})
    assert line.verdict is Verdict.DIFFERS
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 1, "completion_token": 2}
    assert "turn 1, completion token 2 (202 ' red'): -3 was recorded, -3.5 it is today, 0.5 apart" in line.says
    assert line.figures == {
        "tokens": 6,
        "differing": 2,
        "beyond_rounding": 1,
        "largest": 0.5,
        "mean": pytest.approx(0.5 / 6, rel=1e-3),
    }


def test_within_rounding() -> None:
    line = logprobs("logprobs", [scored([-1, -2, -3], [-1, -2.00001, -3])], rounding=1e-3, spelling={})
    assert line.verdict is Verdict.ROUNDING
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 0, "completion_token": 1}


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_what_is_not_finite_is_infinitely_far(broken: float) -> None:
    line = logprobs("logprobs", [scored([-1, -2, -3], [-1, broken, -3])], rounding=1.0, spelling={})
    assert line.verdict is Verdict.DIFFERS
    assert line.figures["largest"] == math.inf


def test_nothing_to_compare() -> None:
    assert logprobs("logprobs", [], rounding=1.0, spelling={}).verdict is Verdict.HIDDEN
    assert prompts("prompts", [], spelling={}).verdict is Verdict.HIDDEN


def test_a_prompt_that_ends_sooner_differs_behind_its_end() -> None:
    whole = PLAYED.turns[0].prompt
    shorter = Prompt(whole.token_ids[:-1], whole.placeholders, whole.images)
    line = prompts("prompts", [Rendered(PLAYED, 0, shorter)], spelling={})
    assert line.first == {"rollout_id": PLAYED.rollout_id, "turn": 0, "prompt_token": len(whole.token_ids) - 1}
    assert "nothing it is today" in line.says


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────


def processed(scale: float) -> ImageItem:
    """Shade 10, which the builders' rollout shows, by a processor that scales."""
    plain = image(10)
    pixels = np.full((4, 8), scale, np.float32)
    return ImageItem(plain.hash, plain.pixels, {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 2]])}, 2)


@pytest.mark.parametrize(
    ("digests", "verdict", "says"),
    [
        (mm_kwargs_digests(processed(1.0)), Verdict.SAME, "image_grid_thw, pixel_values of 1 images"),
        (mm_kwargs_digests(processed(2.0)), Verdict.DIFFERS, "the first is pixel_values of image"),
        ({}, Verdict.DIFFERS, "the first is image_grid_thw of image"),
        (None, Verdict.HIDDEN, "no digests"),
    ],
)
def test_a_processor_that_makes_other_tensors(digests: Mapping[str, str] | None, verdict: Verdict, says: str) -> None:
    item = processed(1.0)
    line = tensors("tensors", {item.hash: RecordedImage(item.hash, item, digests)}, [PLAYED])
    assert line.verdict is verdict
    assert says in line.says


def test_an_image_of_another_size_does_not_fit() -> None:
    assert fits(PLAYED)
    other = rollout()
    prompt = other.turns[0].prompt
    grown = ImageItem(prompt.images[0].hash, prompt.images[0].pixels, {}, 3)
    other.turns[0].prompt = Prompt(prompt.token_ids, prompt.placeholders, (grown, *prompt.images[1:]))
    assert not fits(other)
