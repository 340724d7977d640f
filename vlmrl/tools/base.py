"""What a tool is, and what it may return."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from vlmrl.errors import UserFault, safe_repr, safe_text
from vlmrl.rendering.images import Pixels, decode
from vlmrl.types import Image, Part, Text, ToolSpec


class BadCallError(Exception):
    """The arguments of a call are wrong. Its text is the reply to the policy, a sentence."""


class ToolFault(UserFault):
    """The tool's code raised, or returned something that cannot be shown."""


class Tool(Protocol):
    """A tool of a run."""

    @property
    def spec(self) -> ToolSpec:
        """What the prompt says about it."""
        ...

    @property
    def timeout_s(self) -> float:
        """Seconds that a call may take."""
        ...

    @property
    def example(self) -> Mapping[str, Any]:
        """Arguments of a call that the doctor makes."""
        ...

    def call(self, arguments: Mapping[str, Any], images: Sequence[Pixels]) -> Any:
        """The result of a call, or an awaitable of it; `parts_of` says what it may be. `images` are all images shown so
        far, uint8 [H, W, 3], the first one first, without the frames of videos; they must not be changed. Raises
        `BadCallError` for arguments that do not fit, and may raise anything else for a failure of its own. May block.
        """
        ...


def image_at(images: Sequence[Pixels], number: Any, parameter: str) -> Pixels:
    """The image of a number that a policy wrote; the first one is 1. Raises `BadCallError`."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(images):
        shown = f"there are images 1 to {len(images)}" if images else "no image has been shown"
        raise BadCallError(f"{parameter}={_quoted(number)} is no number of an image: {shown}.")
    return images[number - 1]


def parts_of(returned: Any, name: str) -> tuple[Part, ...]:
    """What a tool returned, as the parts of a message. Images are decoded here, so that a broken one is the tool's
    fault. Raises `ToolFault`, and `ImageError` of an image.

    >>> parts_of(["two", 2.5, None, {"a": 1}], "count")
    (Text(text='two'), Text(text='2.5'), Text(text='done'), Text(text='{"a": 1}'))
    """
    if isinstance(returned, list | tuple):
        return tuple(part for each in returned for part in parts_of(each, name))
    if returned is None:
        return (Text("done"),)
    if isinstance(returned, str | Text):
        return (Text(safe_text(returned.text if isinstance(returned, Text) else returned)),)
    if isinstance(returned, Image | PILImage.Image | np.ndarray):
        return (Image(decode(returned.source if isinstance(returned, Image) else returned)),)
    if isinstance(returned, bool | np.bool_ | numbers.Number):
        return (Text(safe_text(returned)),)
    if isinstance(returned, dict):
        try:
            return (Text(safe_text(json.dumps(returned, ensure_ascii=False))),)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFault(f"{name}() returned a dictionary that is not JSON ({safe_text(error)})") from None
    raise ToolFault(
        f"{name}() returned a {type(returned).__name__}: return a text, a number, an image, or a list of these"
    )


def _quoted(value: Any) -> str:
    """A value of a call as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = safe_repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
