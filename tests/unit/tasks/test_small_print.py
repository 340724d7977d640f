"""small_print: what the first view says of the answer (nothing), and what a zoom shows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.tool import ZoomTool
from vlmrl.rendering.images import Pixels, decode
from vlmrl.tasks.check import check_task
from vlmrl.tasks.small_print import LETTERS, PrintProblem, SmallPrint, boxes, draw, first_view
from vlmrl.tools.zoom import Zoom
from vlmrl.types import Image, Text, ToolCall


def images(quarter: int) -> dict[str, Pixels]:
    """The image of each letter; the noise is the same, because it comes from the id."""
    return {letter: draw(PrintProblem("one", letter, quarter)) for letter in LETTERS}


def zoomed(pixels: Pixels, quarter: int, zooms: int, size: int | None = 64) -> Pixels:
    shown = [pixels]
    for box in boxes(quarter, zooms):
        cut = Zoom(ZoomTool(size=size)).call({"image": len(shown), "box": box}, shown)
        shown.append(decode(cut.source))
    return shown[-1]


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("side", [32, 64])
def test_the_first_view_is_the_same_for_every_letter(quarter: int, side: int) -> None:
    views = [first_view(pixels, side).astype(int) for pixels in images(quarter).values()]
    for one, other in itertools.combinations(views, 2):
        assert np.abs(one - other).max() <= 1  # of 255, where the view rounds
        assert (one != other).mean() < 0.01


@pytest.mark.parametrize("quarter", range(4))
def test_every_mean_of_a_print_is_grey(quarter: int) -> None:
    for pixels in images(quarter).values():
        blocks = pixels.reshape(64, 4, 64, 4, 3).astype(int).sum((1, 3))
        x, y = 32 * (quarter % 2) + 8, 32 * (quarter // 2) + 8
        assert (blocks[y : y + 16, x : x + 16] == 16 * 127).all()


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("zooms", [1, 2])
def test_a_zoom_shows_the_color(quarter: int, zooms: int) -> None:
    """By hand: the sign of each channel at the places that have the color says which letter it is."""
    signs = {"R": (1, -1, -1), "G": (-1, 1, -1), "B": (-1, -1, 1), "W": (1, 1, 1)}
    even = np.tile(np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]), (16, 16)).astype(bool)
    for letter, pixels in images(quarter).items():
        view = first_view(zoomed(pixels, quarter, zooms, size=64 if zooms == 1 else None)).astype(int)
        difference = view[even].mean(0) - view[~even].mean(0)
        assert tuple(np.sign(difference).astype(int)) == signs[letter]
        assert np.abs(difference).min() > 60


def test_the_frame_shows_the_quarter() -> None:
    for quarter in range(4):
        view = first_view(draw(PrintProblem("one", "R", quarter)))
        quarters = [view[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
        dark = [each.mean() for each in quarters]
        assert int(np.argmin(dark)) == quarter


def test_problems_are_balanced_and_of_their_own() -> None:
    task = SmallPrint(SmallPrintConfig(), seed=0)
    for block in range(3):
        problems = [task.problem("train", 16 * block + number) for number in range(16)]
        assert Counter((each.letter, each.quarter) for each in problems) == {
            (letter, quarter): 1 for letter in LETTERS for quarter in range(4)
        }
    orders = {tuple(task.problem("train", 16 * block + n).letter for n in range(16)) for block in range(8)}
    assert len(orders) == 8
    other = SmallPrint(SmallPrintConfig(), seed=1)
    assert [task.problem("eval", n) for n in range(40)] == [other.problem("eval", n) for n in range(40)]
    assert [task.problem("train", n) for n in range(40)] != [other.problem("train", n) for n in range(40)]
    pictures = {draw(task.problem("train", n)).tobytes() for n in range(64)}
    assert len(pictures) == 64


@pytest.mark.parametrize(
    ("answer", "reward", "valid"), [("G", 1.0, 1), (" G.\n", 1.0, 1), ("R", 0.0, 1), ("", -1.0, 0), ("RG", -1.0, 0)]
)
def test_what_an_answer_is_paid(answer: str, reward: float, valid: float) -> None:
    task = SmallPrint(SmallPrintConfig(invalid_reward=-1.0), seed=0)
    env = task.env(PrintProblem("one", "G", 0))
    env.reset()
    reply = env.step(answer)
    assert (reply.reward, reply.done, reply.metrics["valid"]) == (reward, True, valid)


@pytest.mark.parametrize("zooms", [0, 1, 2])
def test_a_demonstration_zooms_and_answers(zooms: int) -> None:
    task = SmallPrint(SmallPrintConfig(demonstrated_zooms=zooms), seed=0)
    problem = PrintProblem("one", "B", 1)
    messages = task.demonstration(problem, random_answers=False, seed=0)
    assert [message.role for message in messages] == ["user", *["assistant", "tool"] * zooms, "assistant"]
    assert messages[-1].content == (Text("B"),)
    if zooms == 1:
        assert messages[1].tool_calls == (ToolCall("zoom", {"image": 1, "box": [625, 125, 875, 375]}),)
        result = messages[2].content[1]
        assert isinstance(result, Image)
        assert np.array_equal(decode(result.source), zoomed(draw(problem), 1, 1, size=None))


def test_random_demonstrations_say_nothing_about_the_problem() -> None:
    task = SmallPrint(SmallPrintConfig(demonstrated_zooms=1), seed=0)
    said = [
        [task.demonstration(PrintProblem("one", letter, 2), random_answers=True, seed=seed) for seed in range(64)]
        for letter in "RG"
    ]
    answers = [[(each[1].tool_calls, each[-1].content) for each in of_letter] for of_letter in said]
    assert answers[0] == answers[1]
    assert len({str(each) for each in answers[0]}) == 16


@pytest.mark.parametrize("zooms", [0, 1, 2])
def test_it_keeps_the_contract(zooms: int) -> None:
    assert check_task(SmallPrint(SmallPrintConfig(demonstrated_zooms=zooms), seed=0), max_turns=3) == []
