"""Images for servers without the run's own endpoint, in the `content_parts` of vLLM's own endpoint.

    the renderer's prompt   … <fake><row_1_col_1> IMG IMG IMG IMG <fake> …
    what is sent            … <image> …                   one placeholder per image, and its picture once per hash
    the answer              prompt_token_ids              must be the renderer's prompt again; otherwise it is refused

The server makes tensors and tokens from the picture with its own processor. Its workers show once per image that these
are the renderer's (`in_server/items.py`). Used for model families whose images vLLM's `features` cannot express. It is
slower than the run's own endpoint, because the engine waits while a worker compares an image.

vLLM reports neither a prompt with more placeholders than images nor one whose images are expanded already: it answers
with status 200, from another prompt. Only `prompt_token_ids` shows it. No I/O, no import of vLLM.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmrl.inference.vllm.image_fields import Gaps
from vlmrl.types import ImageItem, IntArray, Placeholder

PNG_LEVEL = 1
"""zlib's fastest level: a picture goes over the wire once, so its size matters little."""


@dataclass(frozen=True)
class Written:
    """The tokens that vLLM's processor writes for one image: `before`, the image tokens with their gaps, `after`."""

    placeholder: tuple[int, ...]
    """The tokens that it replaces."""
    before: tuple[int, ...]
    after: tuple[int, ...]
    length: int
    """Number of tokens from the first image token to the last, as `vlmrl.types.Placeholder.length`."""
    gaps: Gaps

    @staticmethod
    def of(reported: Mapping[str, Any]) -> Written:
        """From the answer of `vlmrl_compare_images`."""
        placeholder, before, after = (tuple(reported[name]) for name in ("placeholder", "before", "after"))
        return Written(placeholder, before, after, reported["length"], tuple((at, n) for at, n in reported["gaps"]))


def unexpanded(token_ids: IntArray, placeholders: Collection[Placeholder], written: Mapping[str, Written]) -> list[int]:
    """The prompt with a placeholder in place of what is written for each image. `written` is by the image's hash.
    Raises `ValueError` where the prompt has other tokens for an image.

    >>> place = Placeholder(2, 5, "ab", gaps=((2, 1),))
    >>> image = Written((7,), (50,), (51,), 5, ((2, 1),))
    >>> unexpanded(np.array([1, 50, 9, 9, 8, 9, 9, 51, 2]), [place], {"ab": image})
    [1, 7, 2]
    >>> unexpanded(np.array([1, 60, 9, 9, 8, 9, 9, 51, 2]), [place], {"ab": image})
    Traceback (most recent call last):
    ...
    ValueError: image ab has the tokens [60] before and [51] after its image tokens; vLLM writes [50] and [51]
    """
    ids: list[int] = []
    done = 0
    for place in placeholders:
        image = written[place.hash]
        if (place.length, place.gaps) != (image.length, image.gaps):
            raise ValueError(
                f"image {place.hash} has {place.length} tokens with the gaps {place.gaps}; vLLM writes {image.length} "
                f"with the gaps {image.gaps}"
            )
        start, end = place.offset - len(image.before), end_of(place, image)
        before = token_ids[max(start, done) : place.offset].tolist()
        after = token_ids[place.offset + place.length : end].tolist()
        if (tuple(before), tuple(after)) != (image.before, image.after):
            raise ValueError(
                f"image {place.hash} has the tokens {before} before and {after} after its image tokens; vLLM writes "
                f"{list(image.before)} and {list(image.after)}"
            )
        ids += [*token_ids[done:start].tolist(), *image.placeholder]
        done = end
    return [*ids, *token_ids[done:].tolist()]


def end_of(place: Placeholder, written: Written) -> int:
    """Index of the first token behind all that is written for an image."""
    return place.offset + place.length + len(written.after)


def difference(token_ids: IntArray, expanded: IntArray | None) -> str | None:
    """How the prompt that a server has `expanded` differs from the renderer's; None where both are the same.

    >>> difference(np.array([1, 2, 3]), np.array([1, 5, 3]))
    'token 1 of 3 is 5 there and 2 here'
    >>> difference(np.array([1, 2, 3]), np.array([1, 2])), difference(np.array([1]), np.array([1]))
    ('it has 2 tokens there and 3 here', None)
    """
    if expanded is None:
        return "its answer has no prompt_token_ids, so nothing shows what it is"
    if len(token_ids) != len(expanded):
        return f"it has {len(expanded)} tokens there and {len(token_ids)} here"
    differing = np.flatnonzero(token_ids != expanded)
    if not len(differing):
        return None
    first = differing[0]
    return f"token {first} of {len(token_ids)} is {expanded[first]} there and {token_ids[first]} here"


def picture_url(image: ImageItem) -> bytes:
    """The picture as a data URL of a PNG file, which loses nothing."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.pixels).save(file, "PNG", compress_level=PNG_LEVEL)
    return b"data:image/png;base64," + base64.b64encode(file.getvalue())
