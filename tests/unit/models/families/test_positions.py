"""Positions equal transformers' own get_rope_index, and a prefix keeps its positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from vlmrl.models.families.base import POSITION_NAMES
from vlmrl.models.families.positions import POSITIONS, position_function
from vlmrl.types import ImageItem, IntArray, Placeholder, mm_token_type_ids

MERGE = 2

# A layout: per image, the text tokens before it and its rows × columns of merged tokens; then the text at the end.
layouts = st.tuples(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 7)), max_size=4), st.integers(0, 9)
).filter(lambda layout: bool(layout[0]) or layout[1] > 0)


def build(images: list[tuple[int, int, int]], tail: int) -> tuple[int, list[Placeholder], list[ImageItem]]:
    placeholders, items, length = [], [], 0
    for i, (text, rows, columns) in enumerate(images):
        grid = np.array([[1, rows * MERGE, columns * MERGE]])
        items.append(ImageItem(str(i), np.zeros((1, 1, 3), np.uint8), {"image_grid_thw": grid}, rows * columns))
        placeholders.append(Placeholder(length + text, rows * columns, str(i)))
        length += text + rows * columns
    return length + tail, placeholders, items


def reference(length: int, placeholders: list[Placeholder], items: list[ImageItem]) -> IntArray:
    """int64 [3, length] by transformers, which reads only one number of the model's config."""
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)))
    model.get_vision_position_ids = Qwen3VLModel.get_vision_position_ids.__get__(model)
    grids = [torch.from_numpy(item.mm_kwargs["image_grid_thw"]) for item in items]
    get_rope_index: Any = Qwen3VLModel.get_rope_index
    positions, _ = get_rope_index(
        model,
        torch.zeros(1, length, dtype=torch.int64),
        torch.from_numpy(mm_token_type_ids(length, tuple(placeholders)))[None],
        torch.cat(grids) if grids else None,
    )
    return np.asarray(positions[:, 0].numpy(), np.int64)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_mrope_is_transformers_rope_index(layout: tuple[list[tuple[int, int, int]], int]) -> None:
    length, placeholders, items = build(*layout)
    positions = position_function("mrope", MERGE)(length, placeholders, items)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions[0], np.arange(length))
    np.testing.assert_array_equal(positions[1:], reference(length, placeholders, items))


@pytest.mark.parametrize("name", POSITIONS)
@settings(max_examples=30, deadline=None)
@given(layout=layouts, data=st.data())
def test_a_prefix_keeps_its_positions(
    name: str, layout: tuple[list[tuple[int, int, int]], int], data: st.DataObject
) -> None:
    length, placeholders, items = build(*layout)
    kept = data.draw(st.integers(0, len(items)))
    begin = placeholders[kept - 1].offset + placeholders[kept - 1].length if kept else 0
    end = placeholders[kept].offset if kept < len(items) else length
    prefix = data.draw(st.integers(begin, end))
    function = position_function(name, MERGE)
    whole = function(length, placeholders, items)
    np.testing.assert_array_equal(function(prefix, placeholders[:kept], items[:kept]), whole[:, :prefix])


def test_sequential_counts() -> None:
    length, placeholders, items = build([(2, 3, 4)], 5)
    positions = position_function("sequential", MERGE)(length, placeholders, items)
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(length), (4, length)))


def test_the_names_that_preflight_accepts_are_those_of_the_functions() -> None:
    assert tuple(POSITIONS) == POSITION_NAMES
