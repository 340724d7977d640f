"""Families with videos: the prompt is that of transformers' own processor, and the policy computes its own forward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from support.families.clips import MESSAGES, WITH_VIDEOS, ByTransformers, video_renderer, vlm_of
from support.packages import needs_videos
from vlmrl.models.attention.plan import plan_tree
from vlmrl.models.attention.prefix_tree import Segment, image_ends
from vlmrl.models.families import family_of
from vlmrl.models.policy import Policy
from vlmrl.types import IntArray, MMItem, Prompt, VideoItem, mm_token_type_ids

GEOMETRY = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

LOST = 1e-2
"""What a wrong frame or position makes of a logprob, at least."""


@dataclass
class Case:
    """A family's model, the renderer's prompt of `MESSAGES`, and transformers' own inputs and logprobs for it."""

    model: Any
    policy: Policy
    prompt: Prompt
    inputs: Any
    logprobs: Tensor

    @property
    def positions(self) -> IntArray:
        return self.policy.positions(len(self.prompt.token_ids), self.prompt.placeholders, self.prompt.mm_items)


@pytest.fixture(scope="module", params=WITH_VIDEOS)
def case(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Case:
    needs_videos()
    folder, vlm = family_folder(request.param), vlm_of(request.param)
    prompt = asyncio.run(video_renderer(folder, vlm).first_turn(MESSAGES))
    inputs = ByTransformers.of(folder).inputs(MESSAGES)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(**inputs).logits[0].float().log_softmax(-1)
    return Case(model, Policy(model, family_of(vlm).position_function(model.config), []), prompt, inputs, wanted)


def logprobs(case: Case, items: tuple[MMItem, ...], positions: IntArray) -> Tensor:
    """float32 [tokens, vocabulary] of the whole prompt as one sequence."""
    prompt = case.prompt
    length = len(prompt.token_ids)
    types, order = mm_token_type_ids(length, prompt.placeholders), np.arange(length)
    features = case.policy.encode_items(items)
    assert features is not None
    rows = [np.arange(features.first[item.hash], features.first[item.hash] + item.num_tokens) for item in items]
    hidden = case.policy.hidden_states(
        torch.from_numpy(prompt.token_ids.copy()),
        torch.from_numpy(positions),
        torch.from_numpy(types),
        plan_tree([Segment(-1, order, order, image_ends(types))], torch.device("cpu"), case.policy.rules),
        features,
        torch.from_numpy(np.concatenate(rows)),
    )
    return case.policy.log_probs(hidden, 1.0).detach()


def test_the_prompt_is_transformers(case: Case) -> None:
    prompt, inputs = case.prompt, case.inputs
    assert [item.modality for item in prompt.mm_items] == ["video", "image", "video"]
    np.testing.assert_array_equal(prompt.token_ids, inputs["input_ids"][0].numpy())
    types = mm_token_type_ids(len(prompt.token_ids), prompt.placeholders)
    np.testing.assert_array_equal(types, inputs["mm_token_type_ids"][0].numpy())
    for name in ("pixel_values_videos", "pixel_values", "video_grid_thw", "image_grid_thw"):
        ours = np.concatenate([item.mm_kwargs[name] for item in prompt.mm_items if name in item.mm_kwargs])
        np.testing.assert_array_equal(ours, inputs[name].numpy(), err_msg=name)
    given = {name: inputs[name] for name in GEOMETRY if name in inputs}
    wanted, _ = case.model.base_model.get_rope_index(
        input_ids=inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **given
    )
    np.testing.assert_array_equal(case.positions[1:], wanted[:, 0].numpy())


def test_logprobs_are_those_of_transformers(case: Case) -> None:
    apart = (logprobs(case, case.prompt.mm_items, case.positions) - case.logprobs).abs()
    assert float(apart.max()) < 1e-4
    assert float(apart.mean()) < 2e-6


def test_a_wrong_frame_or_position_shows(case: Case) -> None:
    """Two frames in the other order, one value of a frame, and frames one position late."""
    first, *others = case.prompt.mm_items
    pixels = first.mm_kwargs["pixel_values_videos"]
    per_frame = len(pixels) // int(first.mm_kwargs["video_grid_thw"][0, 0])
    swapped = np.concatenate([pixels[per_frame : 2 * per_frame], pixels[:per_frame], pixels[2 * per_frame :]])
    late = case.positions.copy()
    place = case.prompt.placeholders[0]
    late[1, place.offset : place.offset + place.length] += 1
    assert wrong(case, (with_pixels(first, swapped), *others), case.positions) > LOST
    changed = pixels.copy()
    changed[0, :64] += 1.0
    assert wrong(case, (with_pixels(first, changed), *others), case.positions) > 1e-4
    assert wrong(case, case.prompt.mm_items, late) > 1e-4


def wrong(case: Case, items: tuple[MMItem, ...], positions: IntArray) -> float:
    return float((logprobs(case, items, positions) - case.logprobs).abs().max())


def with_pixels(item: MMItem, pixels: np.ndarray) -> MMItem:
    assert isinstance(item, VideoItem)
    return replace(item, mm_kwargs={**item.mm_kwargs, "pixel_values_videos": pixels})
