"""Whether two columns say the same, so that it does not matter which one is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmrl.tasks.dataset.columns import Unusable, as_list, plain, unwrapped
from vlmrl.tasks.dataset.videos import cells_of


def same_text(a: Any, b: Any) -> bool:
    return flat_text(a) == flat_text(b)


def flat_text(value: Any) -> str:
    return " ".join(str(plain(value)).split()).casefold()


def same_question(a: Any, b: Any) -> bool:
    """Whether two columns ask the same: equal texts, apart from markers of images and videos."""
    return re.sub(r"<(?:image|video)(?:[ _-]?\d+)?>", "", flat_text(a)).strip() == (
        re.sub(r"<(?:image|video)(?:[ _-]?\d+)?>", "", flat_text(b)).strip()
    )


def same_videos(a: Any, b: Any) -> bool:
    """Whether two columns name the same video files.

    >>> same_videos("a.mp4", ["a.mp4"]), same_videos("a.mp4", "b.mp4")
    (True, False)
    """
    try:
        ones, others = ([flat_text(cell.source) for cell in cells_of(value)] for value in (a, b))
    except Unusable:
        return True  # the row is refused when it is drawn
    return ones == others


def same_answer(a: Any, b: Any) -> bool:
    """Whether two columns accept the same: equal after unwrapping, or one is in the list of the other.

    >>> same_answer("3", "<answer> 3 </answer>"), same_answer(["cat", "a cat"], "cat"), same_answer("3", "4")
    (True, True, False)
    """
    ones, others = ({flat_text(unwrapped(str(plain(item)))) for item in _accepted(value)} for value in (a, b))
    return bool(ones & others)


def _accepted(value: Any) -> list[Any]:
    return [item.get("answer", item) if isinstance(item, Mapping) else item for item in as_list(value)]
