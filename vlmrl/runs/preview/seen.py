"""What the preview keeps of a problem, and of a row that a run would leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmrl.rewards.base import SeenImage
from vlmrl.tasks.base import Problem, Split
from vlmrl.types import Message, Prompt


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
    """The prompt. Its images and videos are kept only where `prompt` is."""
    is_reference: bool
    """Whether the problem says what the right answer is."""
    reference: Any
    columns: Mapping[str, Any]
    demonstration: tuple[str, ...] | None
    """What the assistant says in a demonstration, turn by turn; None where there is none."""
    tokens: int
    image_tokens: int
    """Tokens of images and videos."""
    images: tuple[SeenImage, ...]
    frames: tuple[int, ...]
    """Frames of each video."""
    text_key: str
    """Digest of the prompt's texts."""
    pixel_key: str
    """Digest of its pixels; empty without images and videos."""
    problem: Problem
    prompt: Prompt | None
    """Tokens and pixels; only of the problems that are shown."""

    @property
    def kinds_shown(self) -> str:
        """`images`, `videos`, or both."""
        kinds = [kind for kind, shown in (("images", self.images), ("videos", self.frames)) if shown]
        return " and ".join(kinds) or "images"

    @property
    def key(self) -> str:
        """Equal for rows of equal texts and pixels. Problems without a row go by their id: their first prompts may be
        equal."""
        return self.problem_id if self.row is None else self.text_key + self.pixel_key


@dataclass(frozen=True)
class Refused:
    """A row that a run would leave out."""

    split: Split
    index: int
    source: str
    row: int | None
    reason: str
