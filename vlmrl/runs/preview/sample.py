"""Draw and render problems as a run would, and keep what the preview needs of each.

    indices ─▶ task.problem ─▶ env.reset ─▶ renderer ─▶ SeenProblem
                 │ NotInSplit: passed over        │
                 └ BadRow, UserFault ─────────────┴─▶ Refused

Only the first problems keep their pixels, so memory does not grow with the sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from vlmrl.errors import UserFault
from vlmrl.orchestrator.fences import rendering_fence
from vlmrl.orchestrator.scoring import seen_images
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.preview.grading import Graded, Grader
from vlmrl.runs.preview.seen import Refused, SeenProblem
from vlmrl.tasks.base import BadRow, FromRow, NoProblem, Problem, Split, Task
from vlmrl.tasks.border import get_num_rows, get_problem, get_reference
from vlmrl.tasks.demonstrations import get_demonstration
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.types import Message, Text, check_placeholders

LOOKED_AT_PER_PROBLEM = 20
"""Indices that a sample looks at for each problem that it wants, where most rows belong to the other split."""


NAMED = 3
"""Problems that are named where many repeat others."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the indices looked at so far and their number; None where it is not known."""


@dataclass
class Counts:
    """Numbers of every problem that was rendered. A million problems take some 200 MB."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of each prompt."""
    image_tokens: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of the images and videos of each prompt."""
    widths: array[int] = field(default_factory=lambda: array("I"))
    """Pixels of each image as the row has it."""
    heights: array[int] = field(default_factory=lambda: array("I"))
    frames: array[int] = field(default_factory=lambda: array("I"))
    """Frames of each video."""
    by_text: Counter[str] = field(default_factory=Counter)
    """Digest of the texts → problems that have them."""
    by_pixels: Counter[str] = field(default_factory=Counter)
    by_both: Counter[str] = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)
    """The first problems that repeat an earlier one by text and pixels."""

    def add(self, seen: SeenProblem) -> None:
        """Count a problem."""
        self.tokens.append(seen.tokens)
        self.image_tokens.append(seen.image_tokens)
        self.widths.extend(image.width for image in seen.images)
        self.heights.extend(image.height for image in seen.images)
        self.frames.extend(seen.frames)
        self.by_text[seen.text_key] += 1
        if seen.pixel_key:
            self.by_pixels[seen.pixel_key] += 1
        self.by_both[seen.key] += 1
        if self.by_both[seen.key] > 1 and len(self.repeated) < NAMED:
            self.repeated.append(seen.problem_id)


@dataclass
class Sample:
    """What was drawn of one split."""

    split: Split
    num_rows: int | None
    """Rows of the split's files; None where the problems are endless."""
    looked_at: int = 0
    counts: Counts = field(default_factory=Counts)
    problems: list[SeenProblem] = field(default_factory=list)
    """The first problems; all but the shown ones without pixels and cells."""
    graded: dict[str, Graded] = field(default_factory=dict)
    """Problem id → what the rewards say of the reference, of `problems`."""
    answer_tokens: dict[str, int] = field(default_factory=dict)
    """Problem id → tokens of the right answer as the data writes it, with the end of the turn."""
    refused: list[Refused] = field(default_factory=list)
    in_other_split: int = 0
    is_whole: bool = False
    """Whether every row was looked at."""


@dataclass(frozen=True)
class Looker:
    """Draws, renders and grades problems."""

    task: Task
    renderer: Renderer
    grader: Grader
    count_tokens: Callable[[str], int]
    detailed: int
    """Problems of a split that are graded and kept."""

    async def look(self, split: Split, count: int | None, shown: int, progress: Progress) -> Sample:
        """Draw `count` problems of a split; all rows with None, or where there are fewer. The first `shown` keep their
        pixels. `progress` is called with the indices looked at and their number."""
        sample = Sample(split, get_num_rows(self.task, split))
        rows = sample.num_rows
        most = rows if count is None else min(rows or count * LOOKED_AT_PER_PROBLEM, count * LOOKED_AT_PER_PROBLEM)
        for index in range(most or 0):
            if count is not None and len(sample.problems) + len(sample.refused) >= count:
                break
            sample.looked_at += 1
            await self._look_at(sample, index, shown)
            progress(sample.looked_at, rows if count is None else None)
        sample.is_whole = rows is not None and sample.looked_at >= rows
        return sample

    async def _look_at(self, sample: Sample, index: int, shown: int) -> None:
        keep = len(sample.problems) < shown
        try:
            problem, problem_id = get_problem(self.task, sample.split, index)
            seen = await see(self.task, self.renderer, problem, problem_id, sample.split, index, keep=keep)
        except BadRow as bad:
            source = bad.source or f"{sample.split} problem"
            sample.refused.append(Refused(sample.split, index, source, bad.row, bad.reason))
            return
        except NoProblem:
            sample.in_other_split += 1
            return
        except UserFault as fault:
            sample.refused.append(Refused(sample.split, index, f"{sample.split} problem", None, fault.text))
            return
        sample.counts.add(seen)
        if len(sample.problems) < self.detailed:
            if (grade := await self.grader.grade(seen)) is not None:
                sample.graded[problem_id] = grade
                sample.answer_tokens[problem_id] = self.count_tokens(grade.candidates[0].text)
            sample.problems.append(seen if keep else dataclasses.replace(seen, columns={}, problem=Dropped(problem_id)))


@dataclass(frozen=True)
class Dropped:
    """Stands for a problem of which only the numbers are kept."""

    id: str


async def see(
    task: Task, renderer: Renderer, problem: Problem, problem_id: str, split: Split, index: int, *, keep: bool
) -> SeenProblem:
    """Render a problem; `keep` its pixels. Raises `UserFault`."""
    with OpenEnv(task, problem) as env:
        messages = finished(env.reset())
    with rendering_fence():
        prompt = await renderer.first_turn(messages)
        check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.mm_items)
    reference = get_reference(problem)
    return SeenProblem(
        split=split,
        index=index,
        problem_id=problem_id,
        task=problem.task if isinstance(problem, MixedProblem) else "",
        row=problem.row if isinstance(problem, FromRow) else None,
        messages=messages if keep else _without_pixels(messages),
        is_reference=reference is not None,
        reference=None if reference is None else reference[0],
        columns={} if reference is None else reference[1],
        demonstration=_demonstration(task, problem),
        tokens=len(prompt.token_ids),
        image_tokens=sum(placeholder.num_features for placeholder in prompt.placeholders),
        images=seen_images(prompt),
        text_key=_digest(part.text for message in messages for part in message.content if isinstance(part, Text)),
        frames=tuple(len(video.frames) for video in prompt.videos),
        pixel_key=_digest(item.hash for item in prompt.mm_items) if prompt.mm_items else "",
        problem=problem,
        prompt=prompt if keep else None,
    )


def _demonstration(task: Task, problem: Problem) -> tuple[str, ...] | None:
    """The assistant's texts in a correct demonstration; None where the task or the row has none."""
    try:
        messages, given = get_demonstration(task, problem, random_answers=False, seed=0)
    except (UserFault, NoProblem):
        return None
    return tuple(
        "".join(part.text for part in message.content if isinstance(part, Text))
        for message in messages[given:]
        if message.role == "assistant"
    )


def _without_pixels(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(
        Message(message.role, tuple(part for part in message.content if isinstance(part, Text))) for message in messages
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
