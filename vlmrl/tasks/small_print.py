"""small_print: an answer that is unreadable at the resolution of the first view, and readable after a zoom.

    the image, 256 pixels     four grey quarters, one of them in a dark frame; in its middle, a print of 64 pixels
    the print                 single pixels: half of them a color, half its complement (`PATTERN`)
    the first view, 64 pixels the frame can be seen; four pixels of the print become one, and their mean is grey
    zoom into the print       64 pixels of the print fill the view: the color can be read

What the policy may see of an image is a setting of the model: with `model.vlm.max_pixels=4096` its view has 64 pixels,
and the tool cuts from all 256. A color and its complement add up to twice the grey, so every 4 × 4 pixels of a print
have the mean of the grey around them, whatever the color: the average says nothing either. The pattern is even, so that
a view which weighs pixels by their distance (bicubic) gets the same grey. A little noise, which says nothing, makes
each problem an image of its own.

Left out on purpose: letters as prints. A color needs the least of a vision tower, so what is measured is whether a
policy learns to look closer.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.tool import ZoomTool
from vlmrl.rendering.images import Pixels
from vlmrl.tasks.base import Reply, Split, Task
from vlmrl.tools.zoom import Zoom
from vlmrl.types import Image, Message, Text, ToolCall

PRINTS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "R": ("red", (254, 0, 0)),
    "G": ("green", (0, 254, 0)),
    "B": ("blue", (0, 0, 254)),
    "W": ("white", (254, 254, 254)),
}
"""Letter → name and RGB of every other cell of a print; the cells between have the complement."""

LETTERS = "".join(PRINTS)

_CHOICES = ", ".join(f"{name} {letter}" for letter, (name, _) in PRINTS.items())
QUESTION = f"Which color is printed in the frame? {_CHOICES}."

SIDE = 256
"""Pixels of an image's sides."""
PRINT = 64
"""Pixels of a print's sides."""
PATTERN = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], np.bool_)
"""Which of 4 × 4 pixels have the color; the others have the complement. Both have the same mean place and the same mean
squared distance from the middle. The first view must scale by a multiple of 4 pixels, or the pattern shows."""
FRAME = 16
"""Pixels of the frame's width: four in the first view."""
GREY = 127
"""Mean of a color and its complement, in each channel: a whole number, so that no view rounds it up or down."""
NOISE = 6
"""The most that noise changes a channel."""

QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Column and row of each quarter: upper left, upper right, lower left, lower right."""


@dataclass(frozen=True)
class PrintProblem:
    """A print and its place."""

    id: str
    letter: str
    quarter: int
    """Index in `QUARTERS`."""


@functools.lru_cache(maxsize=256)
def draw(problem: PrintProblem) -> Pixels:
    """The image of a problem, uint8 [256, 256, 3], read-only: the envs of a group share it."""
    random = np.random.default_rng(np.frombuffer(hashlib.sha256(problem.id.encode()).digest(), np.uint32))
    pixels = np.full((SIDE, SIDE, 3), GREY)
    half = SIDE // 2
    x, y = (half * place for place in QUARTERS[problem.quarter])
    pixels[y : y + half, x : x + half] = 40
    pixels[y + FRAME : y + half - FRAME, x + FRAME : x + half - FRAME] = GREY
    color = np.array(PRINTS[problem.letter][1])
    is_color = np.tile(PATTERN, (PRINT // 4, PRINT // 4))[..., None]
    start = (half - PRINT) // 2
    pixels[y + start : y + start + PRINT, x + start : x + start + PRINT] = np.where(is_color, color, 2 * GREY - color)
    # One number for 4 x 4 pixels, and none on a print, so that the noise says nothing.
    noise = random.integers(-NOISE, NOISE + 1, (SIDE // 4, SIDE // 4, 1)).repeat(4, 0).repeat(4, 1)
    made: Pixels = np.clip(pixels + np.where(pixels % (2 * GREY) == 0, 0, noise), 0, 255).astype(np.uint8)
    made.setflags(write=False)
    return made


def boxes(quarter: int, zooms: int) -> tuple[list[int], ...]:
    """The boxes of the calls that lead to a print, in thousandths of the image that each is cut from.

    >>> boxes(1, 1), boxes(1, 2)
    (([625, 125, 875, 375],), ([500, 0, 1000, 500], [250, 250, 750, 750]))
    """
    column, row = QUARTERS[quarter]
    x, y = 500 * column, 500 * row
    if zooms == 1:
        return ([x + 125, y + 125, x + 375, y + 375],)
    return ([x, y, x + 500, y + 500], [250, 250, 750, 750]) if zooms == 2 else ()


def parse_answer(text: str) -> str:
    """The letter of an answer; "" where the answer is anything else.

    >>> parse_answer(" R. "), parse_answer("<think>G</think>B"), parse_answer("RG")
    ('R', 'B', '')
    """
    found = re.fullmatch(rf"(?:<think>.*</think>)?\s*([{LETTERS}])\W*", text.strip(), re.DOTALL)
    return "" if found is None else found[1]


class PrintEnv:
    """One question and one answer."""

    def __init__(self, problem: PrintProblem, invalid_reward: float) -> None:
        self._problem = problem
        self._invalid_reward = invalid_reward

    def reset(self) -> tuple[Message, ...]:
        return (Message.of("user", Image(draw(self._problem)), QUESTION),)

    def step(self, completion: str) -> Reply:
        answer = parse_answer(completion)
        correct = float(answer == self._problem.letter)
        reward = correct if answer else self._invalid_reward
        metrics = {"correct": correct, "valid": float(answer != "")}
        return Reply(turn_reward=reward, done=True, reward=reward, metrics=metrics)


class SmallPrint(Task):
    """Read small prints. Problems are endless; each block of them has every letter in every place once.

    >>> task = SmallPrint(SmallPrintConfig(places=1), seed=0)
    >>> sorted(task.problem("eval", index).letter for index in range(4))
    ['B', 'G', 'R', 'W']
    """

    def __init__(self, config: SmallPrintConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed

    def problem(self, split: Split, index: int) -> PrintProblem:
        size = len(LETTERS) * self._config.places
        block, member = divmod(index, size)
        seed = self._seed if split == "train" else "eval"  # every seed is evaluated on the same problems
        order = np.frombuffer(hashlib.shake_256(f"{seed} {split} {block}".encode()).digest(8 * size), np.uint64)
        quarter, letter = divmod(int(order.argsort(kind="stable")[member]), len(LETTERS))
        return PrintProblem(f"{split} {index} of {seed}: {LETTERS[letter]} in {quarter}", LETTERS[letter], quarter)

    def env(self, problem: PrintProblem) -> PrintEnv:
        return PrintEnv(problem, self._config.invalid_reward)

    def demonstration(self, problem: PrintProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """The calls of zoom that lead to the print, and its letter. Random answers call zoom on a random quarter and
        say a random letter."""
        letter, quarter = problem.letter, problem.quarter
        if random_answers:
            drawn = int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:8], "big")
            letter, quarter = LETTERS[drawn % len(LETTERS)], drawn // len(LETTERS) % self._config.places
        messages = list(PrintEnv(problem, 0.0).reset())
        shown = [draw(problem)]
        for box in boxes(quarter, self._config.demonstrated_zooms):
            call = ToolCall("zoom", {"image": len(shown), "box": box})
            cut = Zoom(ZoomTool()).call(call.arguments, shown)
            shown.append(np.asarray(cut.source.convert("RGB")))
            messages += [
                Message("assistant", (), (call,)),
                Message("tool", (Text(f"Image {len(shown)}: "), cut), name="zoom"),
            ]
        return (*messages, Message.of("assistant", letter))

    def texts(self) -> tuple[str, ...]:
        """The question, each letter alone, and the boxes of the calls."""
        zooms = self._config.demonstrated_zooms
        calls = [f'{{"image": 1, "box": {box}}}' for quarter in range(4) for box in boxes(quarter, zooms)]
        return (QUESTION, *LETTERS, *calls)


def first_view(pixels: Pixels, side: int = 64) -> Pixels:
    """An image as a view of so many pixels shows it, scaled as image processors do (bicubic)."""
    return np.asarray(PILImage.fromarray(pixels).resize((side, side), PILImage.Resampling.BICUBIC))
