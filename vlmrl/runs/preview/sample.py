"""Draw and render problems as a run would, and keep what the preview needs of each.

    indices ─▶ task.problem ─▶ env.reset ─▶ renderer ─▶ SeenProblem
                 │ NotInSplit: passed over        │
                 └ BadRow, UserFault ─────────────┴─▶ Refused

Only the first problems keep their pixels, so memory does not grow with the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmrl.errors import UserFault
from vlmrl.orchestrator.rollout import rendering_fence
from vlmrl.orchestrator.scoring import seen_images
from vlmrl.rendering.renderer import Renderer
from vlmrl.rewards.base import SeenImage
from vlmrl.tasks.base import BadRow, FromRow, NoProblem, Problem, Split, Task
from vlmrl.tasks.border import get_demonstration, get_num_rows, get_problem, get_reference, open_env
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.types import Image, Message, Prompt, Text, check_placeholders

LOOKED_AT_PER_PROBLEM = 20
"""Indices that a sample looks at for each problem that it wants, where most rows belong to the other split."""


@dataclass(frozen=True, eq=False)
class SeenProblem:
    """A problem that was drawn and rendered."""

    split: Split
    index: int
    problem_id: str
    task: str
    """Its task in a mixture, or empty."""
    row: int | None
    """The row in its file, where it has one."""
    messages: tuple[Message, ...]
    """The prompt. Its images are kept only where `prompt` is."""
    is_reference: bool
    """Whether the problem says what the right answer is."""
    reference: Any
    columns: Mapping[str, Any]
    demonstration: tuple[str, ...] | None
    """What the assistant says in a demonstration, turn by turn; None where there is none."""
    tokens: int
    image_tokens: int
    images: tuple[SeenImage, ...]
    text_key: str
    """Digest of the prompt's texts."""
    pixel_key: str
    """Digest of its pixels; empty without images."""
    problem: Problem
    prompt: Prompt | None
    """Tokens and pixels; only of the problems that are shown."""


@dataclass(frozen=True)
class Refused:
    """A row that a run would leave out."""

    split: Split
    index: int
    source: str
    row: int | None
    reason: str


@dataclass
class Sample:
    """What was drawn of one split."""

    split: Split
    num_rows: int | None
    """Rows of the split's files; None where the problems are endless."""
    looked_at: int = 0
    problems: list[SeenProblem] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    in_other_split: int = 0
    is_whole: bool = False
    """Whether every row was looked at."""


async def look(
    task: Task,
    renderer: Renderer,
    split: Split,
    count: int | None,
    shown: int,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Sample:
    """Draw `count` problems of a split; all rows with None, or where there are fewer. The first `shown` keep their
    pixels. `progress` is called with the indices looked at and their number."""
    sample = Sample(split, get_num_rows(task, split))
    rows = sample.num_rows
    if count is None:
        assert rows is not None, "the config is refused where a task without rows is to be seen as a whole"
    most = rows if count is None else min(rows or count * LOOKED_AT_PER_PROBLEM, count * LOOKED_AT_PER_PROBLEM)
    for index in range(most or 0):
        if count is not None and len(sample.problems) + len(sample.refused) >= count:
            break
        sample.looked_at += 1
        try:
            problem, problem_id = get_problem(task, split, index)
            keep = len(sample.problems) < shown
            seen = await see(task, renderer, problem, problem_id, split, index, keep=keep)
        except BadRow as bad:
            sample.refused.append(Refused(split, index, bad.source or f"{split} problem", bad.row, bad.reason))
        except NoProblem:
            sample.in_other_split += 1
        except UserFault as fault:
            sample.refused.append(Refused(split, index, f"{split} problem", None, fault.text))
        else:
            sample.problems.append(seen)
        progress(sample.looked_at, rows if count is None else None)
    sample.is_whole = rows is not None and sample.looked_at >= rows
    return sample


async def see(
    task: Task, renderer: Renderer, problem: Problem, problem_id: str, split: Split, index: int, *, keep: bool
) -> SeenProblem:
    """Render a problem; `keep` its pixels. Raises `UserFault`."""
    _, messages = open_env(task, problem)
    with rendering_fence():
        prompt = await renderer.first_turn(messages)
        check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.images)
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
        image_tokens=sum(placeholder.length for placeholder in prompt.placeholders),
        images=seen_images(prompt),
        text_key=_digest(part.text for message in messages for part in message.content if isinstance(part, Text)),
        pixel_key=_digest(image.hash for image in prompt.images) if prompt.images else "",
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
        Message(message.role, tuple(part for part in message.content if not isinstance(part, Image)))
        for message in messages
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
