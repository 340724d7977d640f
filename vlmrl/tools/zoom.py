"""`zoom`: cut a box out of an image that was shown, and show it enlarged.

    {"image": 1, "box": [500, 0, 1000, 500]}      the upper right quarter of the first image

The box is cut from the image as the task gave it, with all of its pixels, so a zoom shows what the resolution of the
first view does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as PILImage

from vlmrl.config.tool import Coordinates, ZoomTool
from vlmrl.rendering.images import Pixels
from vlmrl.tools.base import BadCallError, _quoted, image_at
from vlmrl.tools.schema import check_arguments
from vlmrl.types import Image, ToolSpec

DESCRIPTION = "Cut a box out of an image and show it enlarged. The result is a new image."

UNITS = {
    Coordinates.thousandths: ("integer", "in thousandths of the width and of the height, from 0 to 1000"),
    Coordinates.pixels: ("integer", "in pixels"),
    Coordinates.fractions: ("number", "in fractions of the width and of the height, from 0 to 1"),
}
"""Type and words of the numbers of a box."""

LONGEST_TO_SHORTEST = 20
"""The most times that a box may be longer than it is wide; image processors refuse thin images (Qwen-VL above 200)."""


@dataclass(frozen=True)
class Zoom:
    """The tool of a `ZoomTool`."""

    config: ZoomTool
    name: str = "zoom"

    @property
    def spec(self) -> ToolSpec:
        kind, words = UNITS[self.config.coordinates]
        return ToolSpec(
            self.name,
            self.config.description or DESCRIPTION,
            {
                "type": "object",
                "properties": {
                    "image": {"type": "integer", "description": "Number of the image; the first image shown is 1."},
                    "box": {
                        "type": "array",
                        "items": {"type": kind},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": f"[left, top, right, bottom] {words}.",
                    },
                },
                "required": ["image", "box"],
            },
        )

    @property
    def timeout_s(self) -> float:
        return self.config.timeout_s

    @property
    def example(self) -> Mapping[str, Any]:
        end = {Coordinates.thousandths: 500, Coordinates.pixels: 8, Coordinates.fractions: 0.5}
        return {"image": 1, "box": [0, 0, end[self.config.coordinates], end[self.config.coordinates]]}

    def call(self, arguments: Mapping[str, Any], images: Sequence[Pixels]) -> Image:
        check_arguments(self.spec.parameters, arguments)
        pixels = image_at(images, arguments["image"], "image")
        height, width = pixels.shape[:2]
        left, top, right, bottom = self._box(arguments["box"], width, height)
        cut = PILImage.fromarray(pixels[top:bottom, left:right])
        scale = (self.config.size or max(width, height)) / max(cut.size)
        size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
        return Image(cut.resize(size, PILImage.Resampling.BICUBIC))

    def _box(self, box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
        """The box in whole pixels: left, top, right, bottom, at least one pixel each way. Raises `BadCallError`."""
        x, y = {
            Coordinates.thousandths: (width / 1000, height / 1000),
            Coordinates.pixels: (1.0, 1.0),
            Coordinates.fractions: (float(width), float(height)),
        }[self.config.coordinates]
        left, top, right, bottom = box
        most = (width / x, height / y)
        if not (0 <= left < right <= most[0] and 0 <= top < bottom <= most[1]):
            raise BadCallError(
                f"box={_quoted(box)} is no part of the image: write [left, top, right, bottom] with 0 <= left < right "
                f"<= {most[0]:g} and 0 <= top < bottom <= {most[1]:g}."
            )
        first = (min(math.floor(left * x), width - 1), min(math.floor(top * y), height - 1))
        last = (max(math.ceil(right * x - 1e-9), first[0] + 1), max(math.ceil(bottom * y - 1e-9), first[1] + 1))
        sides = sorted((last[0] - first[0], last[1] - first[1]))
        if sides[1] > LONGEST_TO_SHORTEST * sides[0]:
            raise BadCallError(
                f"box={_quoted(box)} is {last[0] - first[0]} by {last[1] - first[1]} pixels: its longer side must be "
                f"at most {LONGEST_TO_SHORTEST} times the shorter one."
            )
        return first[0], first[1], min(last[0], width), min(last[1], height)
