"""Small images in the terminal, and the text next to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.style import Style

from support.rollout_builders import group, image, rollout
from vlmrl.monitor.glimpse import MAX_COLUMNS, MAX_IMAGES, ROWS, SHOWN, Glimpse, pick, said, thumbnail
from vlmrl.types import DropReason, Group, ImageItem, Rollout


def picture(pixels: NDArray[np.uint8]) -> ImageItem:
    return ImageItem(f"picture {pixels.shape}", pixels, {}, 1)


def shown(rollout: Rollout, *, squares: bool) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(Glimpse(squares=squares).draw([rollout]))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_thumbnail_has_the_colours_of_the_image() -> None:
    """Red above, blue below: the middle one of three lines has both colours."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:30, :, 0], pixels[30:, :, 2] = 255, 255
    text = thumbnail(pixels)
    lines = text.split("\n")
    assert [line.plain for line in lines] == ["▀" * 2 * ROWS] * ROWS
    colours = [line.spans[0].style for line in lines]
    red, blue = "#ff0000", "#0000ff"
    assert colours == [Style.parse(f"{a} on {b}") for a, b in ((red, red), (red, blue), (blue, blue))]


@pytest.mark.parametrize(
    ("height", "width", "columns"), [(64, 64, 6), (64, 128, 12), (10, 1000, MAX_COLUMNS), (1000, 10, 1), (1, 1, 6)]
)
def test_it_keeps_its_proportions(height: int, width: int, columns: int) -> None:
    lines = thumbnail(np.zeros((height, width, 3), np.uint8)).plain.split("\n")
    assert [len(line) for line in lines] == [columns] * ROWS


def test_images_beside_words() -> None:
    assert shown(rollout(), squares=True) == [
        "▀▀▀▀▀▀ ▀▀▀▀▀▀ ▀▀▀▀▀▀  reward 0.75  red-green  terminated",
        "▀▀▀▀▀▀ ▀▀▀▀▀▀ ▀▀▀▀▀▀  › AB",
        "▀▀▀▀▀▀ ▀▀▀▀▀▀ ▀▀▀▀▀▀  › AB",
    ]
    assert shown(rollout(), squares=False)[0] == "[image 8 × 8]  reward 0.75  red-green  terminated"


def test_of_many_images_the_last_are_shown() -> None:
    played = rollout()
    prompt = played.turns[-1].prompt
    played.turns[-1].prompt = replace(prompt, mm_items=(image(1),) * (MAX_IMAGES + 3))
    assert shown(played, squares=True)[0].startswith("+3 ▀▀▀▀▀▀ ")


def test_a_rollout_without_turns_and_one_that_was_dropped() -> None:
    nothing = replace(rollout(dropped=DropReason.EMPTY), turns=[])
    assert shown(nothing, squares=True) == ["  reward 0.75  red-green  dropped: empty"]


def test_what_a_policy_says_cannot_move_the_cursor() -> None:
    played = rollout()
    played.turns[-1].text = "\x1b[2J\rgone\n"
    assert said(played).plain.endswith("\n› ·[2J·gone⏎")


def test_the_rollouts_are_of_different_groups() -> None:
    groups = [Group(f"problem {number}", [rollout(index) for index in range(4)]) for number in range(9)]
    picked = pick(groups)
    assert len(picked) == SHOWN
    owners = [next(number for number, each in enumerate(groups) if one in each.rollouts) for one in picked]
    assert owners == [0, 3, 6]
    assert len(pick([group(2)])) == 2
    assert pick([]) == []
