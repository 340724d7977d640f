"""Rules between records: when a prompt extends an earlier turn. And what an error text shows of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.prompt_builders import EMPTY, END, IMAGE, IMAGES, extended
from vlmrl.types import (
    Completion,
    ContractError,
    Image,
    ImageItem,
    Message,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    TokenMetrics,
    TrainingSample,
    Turn,
    check_placeholders,
    extends,
)

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
        ("a lost image", replace(NEXT, placeholders=NEXT.placeholders[1:], mm_items=NEXT.images[1:]), False),
        (
            "a sampled image token taken for an image",
            replace(NEXT, placeholders=(PREVIOUS.placeholders[0], Placeholder(4, 1, "hash-1"))),
            False,
        ),
    ],
)
def test_extends(what: str, prompt: Prompt, expected: bool) -> None:
    assert extends(prompt, PREVIOUS, COMPLETION) is expected, what


PLACE = Placeholder(1, 5, "hash-4", gaps=((2, 1),))


@pytest.mark.parametrize(
    ("place", "refusal"),
    [
        (PLACE, None),
        (replace(PLACE, gaps=()), "has 5 image tokens, but image hash-4 has 4 features"),
        (replace(PLACE, length=6), "has 5 image tokens"),
        (replace(PLACE, gaps=((0, 1),)), "has a gap at 0"),
        (replace(PLACE, gaps=((4, 1),)), "has a gap at 4"),
        (replace(PLACE, length=6, gaps=((1, 1), (2, 1))), "has a gap at 2"),
        (replace(PLACE, length=6, gaps=((3, 1), (1, 1))), "has a gap at 1"),
        (replace(PLACE, offset=3), "leaves"),
    ],
)
def test_gaps_lie_between_image_tokens(place: Placeholder, refusal: str | None) -> None:
    if refusal is None:
        check_placeholders(7, (place,), (IMAGES[1],))
        return
    with pytest.raises(ContractError, match=refusal):
        check_placeholders(7, (place,), (IMAGES[1],))


def test_records_are_short_in_an_error_text() -> None:
    """`asyncio.create_task` quotes what it was given, for example a list of samples."""
    numbers, chances = np.arange(5000), np.zeros(5000, np.float32)
    image = ImageItem("a" * 32, np.zeros((300, 300, 3), np.uint8), {"pixel_values": np.zeros((400, 1176))}, 100)
    prompt = Prompt(numbers, (), (image,) * 9)
    completion = Completion(numbers, chances, numbers, "stop")
    turn = Turn(prompt, completion, "x" * 5000, [Message.of("user", "x" * 5000)], 0, 1.0)
    rollout = Rollout("train/000001/00/00", "1", 0, [turn] * 9, 1.0, {}, StopReason.TERMINATED)
    sample = TrainingSample(rollout.rollout_id, numbers, numbers, numbers > 5, chances, chances, numbers, (), ())
    records = (image, prompt, completion, turn, rollout, sample, TokenMetrics(chances, chances), Image(b"x" * 10**6))
    assert [type(record).__name__ for record in records if len(repr(record)) > 120] == []
    assert repr(sample) == "TrainingSample('train/000001/00/00', 5000 tokens)"
