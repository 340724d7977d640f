"""`zoom`: the box that is cut, in each kind of coordinates, and the words for a box that cannot be cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmrl.config.tool import Coordinates, ZoomTool
from vlmrl.rendering.images import Pixels, decode
from vlmrl.tools.base import BadCallError
from vlmrl.tools.schema import check_arguments
from vlmrl.tools.zoom import Zoom

WIDE = np.zeros((40, 80, 3), np.uint8)
"""Four columns of 20 pixels: black, red, green, blue."""
WIDE[:, 20:40, 0] = WIDE[:, 40:60, 1] = WIDE[:, 60:, 2] = 255


def zoomed(box: Any, image: Any = 1, **settings: Any) -> Pixels:
    tool = Zoom(ZoomTool(**settings))
    return decode(tool.call({"image": image, "box": box}, [WIDE]).source)


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [
        (Coordinates.thousandths, [250, 0, 500, 1000]),
        (Coordinates.pixels, [20, 0, 40, 40]),
        (Coordinates.fractions, [0.25, 0, 0.5, 1.0]),
    ],
)
def test_the_red_column(coordinates: Coordinates, box: list[float]) -> None:
    cut = zoomed(box, coordinates=coordinates)
    assert cut.shape == (80, 40, 3)  # the longer side is that of the image
    assert cut.reshape(-1, 3).min(0).tolist() == cut.reshape(-1, 3).max(0).tolist() == [255, 0, 0]


def test_the_size_of_the_result() -> None:
    assert zoomed([0, 0, 1000, 1000], size=200).shape == (100, 200, 3)
    assert zoomed([500, 0, 750, 250], size=16).shape == (8, 16, 3)
    assert zoomed([0, 0, 1, 1]).shape == (80, 80, 3)  # a box is never less than a pixel


def test_the_last_pixel_belongs_to_the_image() -> None:
    corner = zoomed([999, 990, 1000, 1000])
    assert corner.reshape(-1, 3).max(0).tolist() == [0, 0, 255]


def test_the_image_is_not_changed() -> None:
    before = WIDE.copy()
    zoomed([0, 0, 500, 500])
    assert np.array_equal(before, WIDE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"box": [0, 0, 500, 500]}, "The argument image is missing: the tool takes image, box."),
        ({"image": 1, "box": [0, 0, 500, 500], "zoom": 2}, "zoom is no argument of this tool: it takes image, box."),
        ({"image": 2, "box": [0, 0, 500, 500]}, "image=2 is no number of an image: there are images 1 to 1."),
        ({"image": 0, "box": [0, 0, 500, 500]}, "image=0 is no number of an image: there are images 1 to 1."),
        ({"image": True, "box": [0, 0, 500, 500]}, "image=true is wrong: it must be a whole number."),
        ({"image": "1", "box": [0, 0, 500, 500]}, 'image="1" is wrong: it must be a whole number.'),
        (
            {"image": 1, "box": [0, 0, 500]},
            "box=[0, 0, 500] is wrong: it must be a list of 4 values, each a whole number.",
        ),
        ({"image": 1, "box": "all"}, 'box="all" is wrong: it must be a list of 4 values, each a whole number.'),
        (
            {"image": 1, "box": [500, 0, 500, 500]},
            "box=[500, 0, 500, 500] is no part of the image: write [left, top, right, bottom] with 0 <= left < right "
            "<= 1000 and 0 <= top < bottom <= 1000.",
        ),
        (
            {"image": 1, "box": [0, 0, 1001, 500]},
            "box=[0, 0, 1001, 500] is no part of the image: write [left, top, right, bottom] with 0 <= left < right "
            "<= 1000 and 0 <= top < bottom <= 1000.",
        ),
        (
            {"image": 1, "box": [0, 0, 1000, 25]},
            "box=[0, 0, 1000, 25] is 80 by 1 pixels: its longer side must be at most 20 times the shorter one.",
        ),
        ({"image": 1, "box": [-(10**400), 0, 1, 1]}, None),
    ],
)
def test_a_call_that_cannot_be_made_is_refused_in_words(arguments: dict[str, Any], words: str | None) -> None:
    with pytest.raises(BadCallError) as refused:
        Zoom(ZoomTool()).call(arguments, [WIDE])
    assert words is None or str(refused.value) == words


def test_without_an_image() -> None:
    with pytest.raises(BadCallError, match="no image has been shown"):
        Zoom(ZoomTool()).call({"image": 1, "box": [0, 0, 5, 5]}, [])


@pytest.mark.parametrize("coordinates", Coordinates)
def test_the_example_fits_the_schema(coordinates: Coordinates) -> None:
    tool = Zoom(ZoomTool(coordinates=coordinates))
    check_arguments(tool.spec.parameters, tool.example)
    tool.call(tool.example, [WIDE])
    assert coordinates is not Coordinates.pixels or "in pixels" in str(tool.spec.parameters)
