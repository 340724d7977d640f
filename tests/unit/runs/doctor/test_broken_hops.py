"""For every family with images: each line of the certificate fails when its hop is broken, and no line fails unbroken.

The parts of a run are built once per family. A hop is broken in what the doctor looks at: two turns of two images of
different sizes (vlmrl/runs/doctor/noise_images.py), played by the embedded engine.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
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
    weight_line,
)
from support.families import FAMILIES
from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.logprobs import FLOAT32, logprobs
from vlmrl.runs.doctor.pixels import images_in_engine
from vlmrl.runs.doctor.tokens import first_turns, later_turns
from vlmrl.runs.verdicts import State
from vlmrl.types import ImageItem, Placeholder, Prompt, mm_token_type_ids

REFUSED = {"idefics2"}
"""Its processor writes an image in another way depending on the text next to it."""
OTHER_PLACES = {"ovis2"}
"""It also replaces the tokens around an image, which `logprobs, transformers` finds in the unbroken model."""

WITH_IMAGES = [
    name
    for name, recipe in FAMILIES.items()
    if recipe.image_token is not None and not recipe.needs_torchvision and name not in REFUSED
]


@pytest.fixture(scope="module")
def parts_of(
    family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Parts]]:
    threads = torch.get_num_threads()

    @cache
    def parts(name: str) -> Parts:
        return collected(config_of(family_folder(name)), tmp_path_factory.mktemp(name))

    yield parts
    torch.set_num_threads(threads)


# ── unbroken ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_no_line_fails_unbroken(parts_of: Callable[[str], Parts], name: str) -> None:
    parts = parts_of(name)
    sizes = [{image.pixels.shape for image in sample.images} for sample in parts.evidence.samples]
    assert any(len(found) > 1 for found in sizes), "the doctor looks at images of several sizes"
    assert any(len(rollout.turns) == 2 for rollout in parts.evidence.rollouts()), "and at a second turn"
    lines = [
        first_turns("token ids, first turns", parts.reference, parts.scripted),
        later_turns("token ids, later turns", parts.reference, parts.scripted),
        pixel_line(parts, parts.scripted),
        hash_line(parts, parts.evidence),
        placeholder_line(parts, parts.evidence.samples),
        position_line(parts),
        engine_position_line(parts, parts.evidence),
        weight_line(parts, {name: tensor.clone() for name, tensor in parts.run.trainer.weights().items()}),
        *engine_lines(parts, parts.run.engine),
        transformers_line(parts),
    ]
    wrong = {line.name for line in lines if line.state is not State.OK}
    assert wrong == ({"logprobs, transformers"} if name in OTHER_PLACES else set()), lines


# ── a pixel, two images, a placeholder ──────────────────────────────────────────────────────────────────────


def with_images(prompt: Prompt, images: tuple[ImageItem, ...]) -> Prompt:
    return dataclasses.replace(prompt, mm_items=images)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_a_pixel_shifted_by_one_level(parts_of: Callable[[str], Parts], name: str) -> None:
    parts = parts_of(name)
    rollout = parts.scripted[-1]
    (image, *others), turn = rollout.turns[0].prompt.images, rollout.turns[0]
    moved = {key: array.copy() for key, array in image.mm_kwargs.items()}
    moved["pixel_values"].flat[moved["pixel_values"].size // 2] += 1 / 255
    shown = with_images(turn.prompt, (dataclasses.replace(image, hash="moved", mm_kwargs=moved), *others))
    broken = dataclasses.replace(rollout, turns=[dataclasses.replace(turn, prompt=shown), *rollout.turns[1:]])
    assert_fails(pixel_line(parts, [*parts.scripted[:-1], broken]))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_two_images_swapped_by_the_renderer(parts_of: Callable[[str], Parts], name: str) -> None:
    parts = parts_of(name)
    turns = list(parts.evidence.rendered)
    at = next(i for i, turn in enumerate(turns) if len(set(turn.hashes)) > 1)
    prompt = turns[at].prompt
    *before, first, second = prompt.images
    hashes = [*prompt.placeholders[:-2], *swapped_hashes(prompt.placeholders[-2:])]
    turns[at] = dataclasses.replace(turns[at], prompt=Prompt(prompt.token_ids, tuple(hashes), (*before, second, first)))
    broken = copy.copy(parts.evidence)
    broken.rendered = turns
    assert_fails(hash_line(parts, broken))


def swapped_hashes(places: tuple[Placeholder, ...]) -> list[Placeholder]:
    first, second = places
    return [dataclasses.replace(first, hash=second.hash), dataclasses.replace(second, hash=first.hash)]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_two_images_swapped_in_the_engine(parts_of: Callable[[str], Parts], name: str) -> None:
    """The engine sees the picture of another prompt of the batch behind the same tokens."""
    parts = parts_of(name)
    others = {id(prompt): parts.inverted[i ^ 1].images for i, prompt in enumerate(parts.inverted)}

    def swapped(prompt: Prompt) -> Prompt:
        taken = zip(prompt.images, others[id(prompt)], strict=True)
        return with_images(prompt, tuple(dataclasses.replace(i, mm_kwargs=other.mm_kwargs) for i, other in taken))

    engine, blind, trainer = engine_lines(parts, TamperingEngine(parts.run.engine, swapped))
    assert_fails(engine)
    assert_fails(blind)
    assert trainer.state is State.OK


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_a_placeholder_one_short(parts_of: Callable[[str], Parts], name: str) -> None:
    """The renderer counts one token too few for an image, in the image and in its placeholder alike."""
    parts = parts_of(name)
    samples = parts.evidence.samples
    sample = samples[-1]
    (place, *places), (image, *images) = sample.placeholders, sample.mm_items
    if image.num_tokens == 1:
        pytest.skip("its images are single tokens here")
    short = (dataclasses.replace(place, length=place.length - 1), *places)
    broken = dataclasses.replace(
        sample,
        placeholders=short,
        mm_items=(dataclasses.replace(image, num_tokens=image.num_tokens - 1), *images),
        mm_token_type_ids=mm_token_type_ids(len(sample.token_ids), short),
    )
    assert_fails(placeholder_line(parts, [*samples[:-1], broken]))


# ── positions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_positions_off_by_one(parts_of: Callable[[str], Parts], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the first image on, for engine and trainer alike."""
    parts = parts_of(name)
    right = parts.run.policy.positions

    def off(length: int, places: Any, images: Any) -> np.ndarray:
        found = right(length, places, images).copy()
        if places:
            found[:, places[0].offset + places[0].length :] += 1
        return found

    monkeypatch.setattr(parts.run.policy, "positions", off)
    assert_fails(position_line(parts))
    assert_fails(transformers_line(parts))
    monkeypatch.undo()
    broken = copy.copy(parts.evidence)
    assert broken.rows is not None
    broken.rows = broken.rows + np.array([0] + [1] * (broken.rows.shape[1] - 1))
    assert_fails(engine_position_line(parts, broken))


# ── weights, and an image in the engine ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_a_weight_that_is_not_sent(parts_of: Callable[[str], Parts], name: str) -> None:
    """Any of them: after a step, the engine still holds what it had before."""
    parts = parts_of(name)
    sent = parts.run.trainer.weights()
    for left_out in sent:
        line = weight_line(parts, sent | {left_out: sent[left_out] * 1.01 + 1e-3})
        assert_fails(line)
        assert (line.metrics["differing"], left_out in line.finding) == (1, True)
        absent = weight_line(parts, {name: tensor for name, tensor in sent.items() if name != left_out})
        assert_fails(absent)
        assert left_out in absent.finding


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_an_image_lost_in_the_engine(
    parts_of: Callable[[str], Parts], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image of each prompt: its placeholder gets no features."""
    parts = parts_of(name)
    encode = Policy.encode_items

    def lost(policy: Policy, images: Any) -> Any:
        features = encode(policy, images)
        if features is None:
            return None
        kept = torch.ones(len(features.levels[0]), 1)
        kept[: images[0].num_tokens] = 0
        return dataclasses.replace(features, levels=[level * kept for level in features.levels])

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "encode_items", lost)
        samples, swapped = parts.answered(parts.run.engine)
    found = parts.comparing.inverted(samples, swapped)
    assert_fails(logprobs("logprobs, version 0", found.shown, FLOAT32))
    assert_fails(images_in_engine("images, engine", found, FLOAT32))
