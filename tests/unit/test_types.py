"""Rules between records: when a prompt extends an earlier turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.prompt_builders import EMPTY, END, IMAGE, IMAGES, extended
from vlmrl.types import Placeholder, Prompt, extends

PREVIOUS = extended(EMPTY, [5], [IMAGES[0]])
COMPLETION = np.array([7, IMAGE], np.int64)
NEXT = extended(PREVIOUS, [7, IMAGE, END], [IMAGES[0]])


@pytest.mark.parametrize(
    ("what", "prompt", "expected"),
    [
        ("a bridge", NEXT, True),
        ("the completion alone", extended(PREVIOUS, [7, IMAGE], []), True),
        ("half of the completion", extended(PREVIOUS, [7], []), False),
        ("another completion", extended(PREVIOUS, [8, IMAGE, END], []), False),
        ("another prompt", extended(EMPTY, [6], [IMAGES[0]]), False),
        ("a lost image", replace(NEXT, placeholders=NEXT.placeholders[1:], images=NEXT.images[1:]), False),
        (
            "a sampled image token taken for an image",
            replace(NEXT, placeholders=(PREVIOUS.placeholders[0], Placeholder(4, 1, "hash-1"))),
            False,
        ),
    ],
)
def test_extends(what: str, prompt: Prompt, expected: bool) -> None:
    assert extends(prompt, PREVIOUS, COMPLETION) is expected, what
