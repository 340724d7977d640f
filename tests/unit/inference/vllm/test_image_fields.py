"""Which images go as tensors, and what counts as the renderer's bytes; without vLLM. test_families.py has servers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.image_fields import QWEN, TILED
from vlmrl.inference.vllm.image_fields import ImageField, ImageFields, TensorDigest, check_same
from vlmrl.inference.vllm.in_server.items import ItemMaker
from vlmrl.inference.vllm.settings import other_scale, unfaithful
from vlmrl.types import ImageItem

PIXELS = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 4)).astype(np.float32)


def item(**mm_kwargs: np.ndarray) -> ImageItem:
    return ImageItem("ab", np.zeros((4, 4, 3), np.uint8), mm_kwargs, 1)


def digests(**arrays: np.ndarray) -> dict[str, TensorDigest]:
    return {name: TensorDigest.of(array, is_float=array.dtype.kind == "f") for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("fields", "mm_kwargs", "expected"),
    [
        (QWEN, {"pixel_values": PIXELS[0, 0, 0], "image_grid_thw": np.ones((1, 3), np.int64)}, True),
        (QWEN, {"pixel_values": PIXELS[0, 0, 0]}, False),  # the item has more
        (QWEN, {"pixel_values": PIXELS[0, 0], "image_grid_thw": np.ones((1, 3), np.int64)}, False),  # a dimension more
        (TILED, {"pixel_values": PIXELS, "pixel_attention_mask": PIXELS[:, :, 0] > 0}, False),
        # Integers that vLLM's model does not take may be left over, floats may not.
        (
            ImageFields((ImageField("x", "batched", False, 2),), False),
            {"x": PIXELS[0, :1, 0], "n": np.ones(1, int)},
            True,
        ),
        (ImageFields((ImageField("x", "batched", False, 2),), False), {"x": PIXELS[0, :1, 0], "y": PIXELS}, False),
        (ImageFields((ImageField("x", "batched", False, 2),), True), {"x": PIXELS[0, :1, 0]}, False),  # gaps
        (ImageFields((ImageField("x", "other", False, 2),), False), {"x": PIXELS[0, :1, 0]}, False),
    ],
)
def test_images_go_as_tensors_only_where_vllms_item_consists_of_them(
    fields: ImageFields, mm_kwargs: dict[str, Any], expected: bool
) -> None:
    assert fields.are_tensors_of(item(**mm_kwargs)) == expected


def test_the_same_tensors_without_batch_dimension_renamed_and_counted_are_the_renderers() -> None:
    mask, places = np.ones((1, 2, 4, 4), bool), np.arange(8).reshape(1, 4, 2)
    sent = digests(pixel_values=PIXELS, pixel_attention_mask=mask, image_position_ids=places)
    made = digests(pixel_values=PIXELS[0], pixel_attention_mask=mask[0], pixel_position_ids=places[0])
    check_same(made | digests(num_patches=np.array(2)), sent)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"pixel_values": PIXELS + np.float32(1 / 255)}, "other values"),
        ({"pixel_values": PIXELS[0, :1]}, "other dimensions"),
        ({"images": PIXELS[:, ::-1]}, "equals no tensor"),
        ({"pixel_values": PIXELS, "pixel_position_ids": np.arange(4)}, "equals no tensor"),
        ({"places": np.array(4)}, "no tensor that equals pixel_values"),
    ],
)
def test_other_tensors_are_refused(made: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_same(digests(**made), digests(pixel_values=PIXELS, image_position_ids=np.arange(4)[::-1]))


def test_a_request_that_places_an_images_tokens_elsewhere_is_refused() -> None:
    maker = ItemMaker()
    maker._layouts.put("ab", (5, ((2, 1),)), 1)
    maker.check_layouts([["ab", 7, 5, [[2, 1]]], ["unknown", 20, 3, []]])
    for place in ([5, [[1, 1]]], [5, []], [4, [[2, 1]]]):
        with pytest.raises(ValueError, match="vLLM's processor writes 5 tokens"):
            maker.check_layouts([["ab", 7, *place]])


FAITHFUL = {
    "architecture": "Qwen3VLForConditionalGeneration",
    "device": "cpu",
    "is_bidirectional": False,
    "has_deepstack": True,
    "has_recurrent_layers": False,
    "dtype": "float32",
    "image_input_id": 0,
}


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, []),
        ({"is_bidirectional": True}, ["causal"]),
        ({"is_bidirectional": True, "device": "cuda"}, []),
        ({"architecture": "TransformersMultiModalForCausalLM"}, ["deepstack"]),
        ({"architecture": "TransformersMultiModalForCausalLM", "has_deepstack": False}, []),
        ({"has_recurrent_layers": True}, ["bfloat16"]),
        ({"has_recurrent_layers": True, "dtype": "bfloat16"}, []),
        ({"image_input_id": 5}, ["pad_token_id=5"]),
    ],
)
def test_servers_that_would_be_silently_wrong_are_refused(changed: dict[str, Any], reasons: list[str]) -> None:
    found = list(unfaithful(FAITHFUL | changed))
    assert len(found) == len(reasons)
    assert all(reason in message for reason, message in zip(reasons, found, strict=True))


@pytest.mark.parametrize(("scale", "refused"), [(None, False), (0.25, False), (1.0, True)])
def test_a_server_with_a_temperature_of_its_own_is_refused(scale: float | None, refused: bool) -> None:
    found = list(other_scale({"logit_scale": 0.25, "dtype": "bfloat16"}, scale))
    assert len(found) == refused
    assert all("hf_overrides={head_dtype:float32,text_config:{logit_scale:1.0}}" in message for message in found)
