"""Prompts that cannot be played are found when their row is drawn: too long, or with an image that is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.fit import PromptCheck
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.rendering.images import ImageError
from vlmrl.tasks.base import BadRow, Problem, Reply, Task
from vlmrl.types import Image, ImageItem, Message, Placeholder, Prompt, Text, VideoItem

LIMIT = 10
FEATURES = 4
"""Tokens of an image."""


@dataclass(frozen=True)
class Row:
    """A problem that knows its row; its prompt has one token per character and `FEATURES` per picture."""

    id: str
    source: str
    row: int
    text: str
    pictures: int = 0


@dataclass(frozen=True)
class Bare:
    """A problem that code made."""

    id: str
    text: str
    pictures: int = 0


class Env:
    def __init__(self, problem: Any) -> None:
        if problem.text == "raises":
            raise LookupError("a bug in the task")
        self.problem = problem

    def reset(self) -> tuple[Message, ...]:
        image: Any = np.zeros((1, 1, 3), np.uint8)
        return (Message("user", (Text(self.problem.text), *[Image(image)] * self.problem.pictures)),)

    def step(self, completion: str) -> Reply:
        raise AssertionError("nothing is played here")


class Rows(Task):
    """Row n has a prompt of n tokens."""

    def __init__(self, config: Any = None, *, seed: int = 0) -> None: ...

    def num_rows(self, split: str) -> int:
        return 20

    def problem(self, split: str, index: int) -> Problem:
        return Row(f"rows:{index % 20}", "rows.jsonl", index % 20, "x" * (index % 20))

    def env(self, problem: Any) -> Env:
        return Env(problem)

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError


class Scripted:
    """A renderer that counts what it renders."""

    def __init__(self, fault: Exception | None = None, lost: int = 0) -> None:
        self.fault = fault
        self.lost = lost
        self.rendered: list[str] = []

    async def first_turn(self, messages: Sequence[Message]) -> Prompt:
        if self.fault is not None:
            raise self.fault
        parts = [part for message in messages for part in message.content]
        text = "".join(part.text for part in parts if isinstance(part, Text))
        self.rendered.append(text)
        count = sum(isinstance(part, Image) for part in parts)
        places = tuple(Placeholder(len(text) + FEATURES * number, FEATURES, "0") for number in range(count))
        item = ImageItem("0", np.zeros((1, 1, 3), np.uint8), {}, FEATURES - self.lost)
        return Prompt(np.zeros(len(text) + FEATURES * count, np.int64), places, (item,) * count)


def make(renderer: Scripted, has_rows: bool = True) -> PromptCheck:
    made: Any = renderer
    return PromptCheck(ThreadEnvs(Rows()), made, LIMIT, f"trainer.seq_len={LIMIT}", has_rows)


def found(check: PromptCheck, problem: Any) -> BadRow | None:
    try:
        asyncio.run(check(problem))
    except BadRow as bad:
        return bad
    return None


def row(text: str, pictures: int = 0) -> Row:
    return Row("rows:7", "rows.jsonl", 7, text, pictures)


@pytest.mark.parametrize(("length", "fits"), [(1, True), (LIMIT - 1, True), (LIMIT, False), (LIMIT + 1, False)])
def test_a_prompt_leaves_room_for_one_token(length: int, fits: bool) -> None:
    bad = found(make(Scripted()), row("x" * length))
    assert (bad is None) == fits
    if bad is not None:
        assert (bad.source, bad.row) == ("rows.jsonl", 7)
        assert bad.reason == (
            f"its prompt has {length} tokens, which leaves no room for an answer in trainer.seq_len=10: raise it, or "
            "shorten the prompt"
        )


@pytest.mark.parametrize(
    ("text", "pictures", "remedy"),
    [
        ("xx", 2, "its prompt has 10 tokens (8 of them of images), .*show smaller images (model.vlm.max_pixels)"),
        ("x" * 8, 1, "its prompt has 12 tokens (4 of them of images), .*shorten the prompt"),
    ],
)
def test_the_remedy_names_what_is_long(text: str, pictures: int, remedy: str) -> None:
    bad = found(make(Scripted()), row(text, pictures))
    assert bad is not None
    begin, end = remedy.split(".*")
    assert bad.reason.startswith(begin)
    assert bad.reason.endswith(end)


def test_videos_with_too_many_frames_are_a_bad_row() -> None:
    class Watched(Scripted):
        async def first_turn(self, messages: Sequence[Message]) -> Prompt:
            frames, times = np.zeros((6, 1, 1, 3), np.uint8), np.arange(6, dtype=np.float64)
            item = VideoItem("0", frames, times, 1.0, ("",) * 6, {}, 1)
            return Prompt(np.zeros(2, np.int64), (Placeholder(0, 1, "0", modality="video"),), (item,))

    assert found(replace(make(Watched()), max_frames=6), row("x")) is None
    bad = found(replace(make(Watched()), max_frames=5), row("x"))
    assert bad is not None
    assert bad.reason == (
        "its videos have 6 frames, more than model.vlm.video.max_episode_frames=5: raise it, or lower "
        "model.vlm.video.fps"
    )


def test_an_image_that_cannot_be_processed_is_a_bad_row() -> None:
    bad = found(make(Scripted(ImageError("the image is broken"))), row("x", 1))
    assert bad is not None
    assert (bad.source, bad.row) == ("rows.jsonl", 7)
    assert "the image is broken" in bad.reason


def test_placeholders_without_their_features_are_a_bad_row() -> None:
    bad = found(make(Scripted(lost=1)), row("x", 1))
    assert bad is not None
    assert bad.row == 7


def test_a_fault_of_the_tasks_code_is_left_to_the_rollouts() -> None:
    renderer = Scripted()
    assert found(make(renderer), row("raises")) is None
    assert renderer.rendered == []


def test_problems_that_code_made_are_not_rendered() -> None:
    renderer = Scripted()
    assert found(make(renderer, has_rows=False), Bare("made", "x" * 99)) is None
    assert renderer.rendered == []


def test_a_problem_of_a_task_with_rows_is_named_by_its_id() -> None:
    bad = found(make(Scripted()), Bare("train/3", "x" * 99))
    assert bad is not None
    assert (bad.source, bad.row) == ("train/3", None)


def test_a_problem_that_knows_its_row_is_checked_in_any_task() -> None:
    assert found(make(Scripted(), has_rows=False), row("x" * 99)) is not None


def test_long_prompts_are_passed_over_when_they_are_drawn_and_rendered_once_each() -> None:
    """Rows 0 to 9 fit. No row behind the last one that is drawn is rendered."""
    renderer = Scripted()
    stream = ProblemStream(Rows(), "train", check=make(renderer))

    async def main() -> list[list[int]]:
        return [[drawn.index for drawn in await stream.draw(step, 4)] for step in (1, 2, 3)]

    assert asyncio.run(main()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 20, 21]]
    assert [len(text) for text in renderer.rendered] == [*range(20), 0, 1]
    assert stream.metrics(3)["data/bad_rows"] == 10.0
