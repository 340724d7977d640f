r"""Boxes and points, as models and datasets write them.

    '[{"bbox_2d": [10, 20, 30, 40]}]'   "<box>(10,20),(30,40)</box>"   "10 20 30 40"   {"x1": 10, …}   ─▶   numbers

A text is read by its innermost brackets, so JSON that is cut off or has single quotes is read as well:

- `[a, b, c, d]` is a box. `[a, b]` and `(a, b)` are points; where boxes are wanted, two with at most a few words
  between them are the corners of a box. Brackets with another count of numbers hold neither.
- `{"x1": …, "y1": …, "x2": …, "y2": …}`, also with the names xmin, left, x and width, is a box.
- A text without brackets of numbers: four numbers are a box, in the whole text or on a line of their own. Two numbers
  are a point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmrl.config.reward import BoxFormat, BoxSpace
from vlmrl.rewards.base import SeenImage

Numbers: TypeAlias = tuple[float, ...]
"""Four numbers of a box, or two of a point."""

LONGEST_TEXT = 50_000
"""Characters of an answer that are read, from its end."""

CORNERS = [
    *(("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max")),
    ("left", "top", "right", "bottom"),
]
SIZES = [("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height")]
CONTAINERS = (
    *("bbox_2d", "bbox", "box", "boxes", "bboxes", "box_2d"),
    *("point_2d", "point", "points", "coordinate", "coordinates", "objects"),
)
"""Keys under which dictionaries hold boxes or points."""

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|(?i:nan|inf(?:inity)?)\b)"
_ITEM = rf"[\"']?({_NUMBER})(?:px)?[\"']?"
_SEPARATOR = r"(?:\s*,\s*|\s+)"
_GROUP = re.compile(rf"[\[(]\s*({_ITEM}(?:{_SEPARATOR}{_ITEM})*)\s*,?\s*[\])]")
_BARE = re.compile(rf"(?<![\w.])(?:[a-zA-Z]\w{{0,4}}\s*[=:]\s*)?({_NUMBER})(?![\w]|\.\d)")
_FIELD = re.compile(rf"[\"']([a-z_]+[12]?)[\"']\s*:\s*{_ITEM}(?=\s*(?:[,}}\s]|$))")
_BRACES = re.compile(r"\{[^{}]*:[^{}]*")
_BETWEEN = re.compile(r"[^\d\[\](){}<>]{0,20}")
_TAGGED = re.compile(
    rf"(?:<box>|<\|box_start\|>)\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*,?\s*"
    rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
)
_CHARACTERS = str.maketrans("−，（）［］；;", "-,()[],,")


@dataclass(frozen=True)
class Shape:
    """One box or point as it was written."""

    numbers: Numbers
    format: BoxFormat | None = None
    """What four numbers are where the writer named them; None: what the config says."""


def shapes_in_text(text: str, *, points: bool) -> list[Shape]:
    """The boxes of a text, and its points as well where `points` are wanted.

    >>> [shape.numbers for shape in shapes_in_text("<box>(1,2),(3,4)</box> and [5, 6, 7, 8]", points=False)]
    [(1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)]
    """
    text = _TAGGED.sub(r"[\1, \2, \3, \4]", text[-LONGEST_TEXT:].translate(_CHARACTERS))
    named = [shape for braces in _BRACES.findall(text) if (shape := _named(dict(_FIELD.findall(braces)), points))]
    grouped = list(_grouped(text, points=points))
    return named or grouped or _bare(text, points=points)


def shapes_in_value(value: Any, *, points: bool) -> list[Shape] | None:
    """The boxes or points of a reference: numbers, lists of them, dictionaries, or a text. None where it holds none; an
    empty list says that there is no object.

    >>> shapes_in_value([{"bbox": [1, 2, 3, 4]}], points=False)
    [Shape(numbers=(1.0, 2.0, 3.0, 4.0), format=None)]
    """
    match value:
        case str():
            return shapes_in_text(value, points=points) or None
        case Mapping():
            if (shape := _named(value, points)) is not None:
                return [shape]
            inner = next((value[name] for name in CONTAINERS if name in value), None)
            return None if inner is None else shapes_in_value(inner, points=points)
        case Sequence():
            return _in_sequence(value, points=points)
        case _:
            return shapes_in_value(value.tolist(), points=points) if hasattr(value, "tolist") else None


def _in_sequence(value: Sequence[Any], *, points: bool) -> list[Shape] | None:
    if (numbers := _numbers(value)) is not None:
        return [Shape(numbers)] if len(numbers) in _counts(points) else None
    corners = [_numbers(each) for each in value]
    if not points and len(corners) == 2 and all(each is not None and len(each) == 2 for each in corners):
        return [Shape((*(corners[0] or ()), *(corners[1] or ())))]
    shapes: list[Shape] = []
    for each in value:
        inner = shapes_in_value(each, points=points)
        if not inner:
            return None
        shapes += inner
    return shapes


def _numbers(value: Any) -> Numbers | None:
    """The numbers of a sequence; None where it is empty or holds something else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        return None
    numbers = [_number(each) for each in value]
    return None if None in numbers else tuple(each for each in numbers if each is not None)


def _number(value: Any) -> float | None:
    """A number as it is or in digits; `_NUMBER` keeps out what only `float` reads, such as `1_0`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip()) is None:
        return None
    return float(value)


def _named(fields: Mapping[str, Any], points: bool) -> Shape | None:
    """The box of `{"x1": …}`, or, where points are wanted, the point of `{"x": …, "y": …}`."""
    for names, box_format in [
        *((each, BoxFormat.xyxy) for each in CORNERS),
        *((each, BoxFormat.xywh) for each in SIZES),
    ]:
        if all(name in fields for name in names):
            numbers = _numbers([fields[name] for name in names])
            return None if numbers is None else Shape(numbers, box_format)
    if points and "x" in fields and "y" in fields:
        numbers = _numbers([fields["x"], fields["y"]])
        return None if numbers is None else Shape(numbers)
    return None


def _grouped(text: str, *, points: bool) -> Iterator[Shape]:
    """The shapes in innermost brackets. Where boxes are wanted, a pair next to a pair is a box."""
    waiting: tuple[Numbers, int] | None = None  # a first corner, and where it ends
    for group in _GROUP.finditer(text):
        numbers = tuple(float(each) for each in re.findall(_NUMBER, group[1]))
        if len(numbers) == 2 and not points:
            if waiting is not None and _BETWEEN.fullmatch(text, waiting[1], group.start()):
                yield Shape(waiting[0] + numbers)
                waiting = None
            else:
                waiting = (numbers, group.end())
            continue
        waiting = None
        if len(numbers) in _counts(points):
            yield Shape(numbers)


def _bare(text: str, *, points: bool) -> list[Shape]:
    """The shapes of a text without brackets of numbers."""
    if _GROUP.search(text):
        return []
    for parts in ([text], text.splitlines()):
        rows = [tuple(float(each) for each in _BARE.findall(part)) for part in parts]
        if shapes := [Shape(row) for row in rows if len(row) in _counts(points)]:
            return shapes
    return []


def _counts(points: bool) -> tuple[int, ...]:
    return (2, 4) if points else (4,)


# ── from numbers to places on the original image ────────────────────────────────────────────────────────────


def corners(shape: Shape, box_format: BoxFormat) -> Numbers:
    """A box as left, top, right, bottom; a point as it is.

    >>> corners(Shape((10, 20, 5, 6)), BoxFormat.xywh)
    (10, 20, 15, 26)
    """
    if len(shape.numbers) == 2:
        return shape.numbers
    a, b, c, d = shape.numbers
    match shape.format or box_format:
        case BoxFormat.xyxy:
            return shape.numbers
        case BoxFormat.xywh:
            return a, b, a + c, b + d
        case BoxFormat.cxcywh:
            return a - c / 2, b - d / 2, a + c / 2, b + d / 2


def on_original(numbers: Numbers, space: BoxSpace, image: SeenImage) -> Numbers:
    """Corners or a point in pixels of the original image.

    >>> on_original((500, 500), BoxSpace.thousand, SeenImage(640, 480, 448, 448))
    (320.0, 240.0)
    """
    width, height = _size(space, image)
    scales = (image.width / width, image.height / height)
    return tuple(number * scales[index % 2] for index, number in enumerate(numbers))


def _size(space: BoxSpace, image: SeenImage) -> tuple[float, float]:
    """The coordinates of the image's bottom right corner."""
    match space:
        case BoxSpace.absolute:
            return image.width, image.height
        case BoxSpace.processed:
            return image.processed_width, image.processed_height
        case BoxSpace.relative:
            return 1.0, 1.0
        case BoxSpace.thousand:
            return 1000.0, 1000.0


def is_box(box: Numbers) -> bool:
    """Whether four corners are a box: finite, with a positive width and height."""
    return all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]


def plausible_spaces(boxes: Sequence[Numbers], image: SeenImage) -> set[BoxSpace]:
    """The spaces in which all boxes (left, top, right, bottom) or points lie on the image, with one percent of
    tolerance. Pixels are implausible where no coordinate is above 1. An image without boxes says nothing: all spaces.

    Several spaces are plausible for one small box; over the rows of a dataset, the intersection tells.

    >>> image = SeenImage(1000, 500, 500, 250)
    >>> sorted(space.value for space in plausible_spaces([(0.1, 0.2, 0.3, 0.4)], image))
    ['relative']
    >>> sorted(space.value for space in plausible_spaces([(600, 100, 900, 480)], image))
    ['absolute', 'thousand']
    """
    numbers = [number for box in boxes for number in box]
    return {space for space in BoxSpace if not numbers or _fits(numbers, boxes, space, image)}


def _fits(numbers: Sequence[float], boxes: Sequence[Numbers], space: BoxSpace, image: SeenImage) -> bool:
    if (max(numbers) <= 1) != (space is BoxSpace.relative):
        return False
    size = _size(space, image)
    return all(
        -0.01 * size[index % 2] <= number <= 1.01 * size[index % 2] for box in boxes for index, number in enumerate(box)
    )
