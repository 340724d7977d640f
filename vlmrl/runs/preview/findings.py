"""What the preview finds: each finding has a code, a sentence with value, consequence and remedy, and its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from vlmrl.runs.preview.seen import SeenProblem


class Code(StrEnum):
    """The kinds of findings; docs/your_data.md explains each."""

    NO_PROBLEMS = "no_problems"
    """No problem could be drawn from a split."""
    IMAGES_MISSING = "images_missing"
    """Rows are refused because their images are not found."""
    ROWS_REFUSED = "rows_refused"
    """Rows are refused for other reasons."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """Prompts leave no room for an answer."""
    ANSWER_TOO_LONG = "answer_too_long"
    """Reference answers are longer than `orchestrator.max_new_tokens`."""
    ANSWER_FORM = "answer_form"
    """The answers of the data have another form than `reward.extract` expects, and no prompt asks for that form."""
    REWARD_MAX = "reward_max"
    """A reward does not give the reference answer its maximum."""
    REWARD_EMPTY = "reward_empty"
    """A reward pays an empty answer as well as the right one."""
    REWARD_FAILS = "reward_fails"
    """A reward raises."""
    BOX_SPACE = "box_space"
    """Boxes count in another space than the reward says."""
    SAME_ANSWER = "same_answer"
    """All reference answers are equal."""
    NO_IMAGES = "no_images"
    """No prompt shows an image, although the rows have some."""
    DUPLICATES = "duplicates"
    """Problems are repeated within a split."""
    LEAK = "leak"
    """Problems of evaluation are also trained on."""


SHOWN_ROWS = 3
"""Rows that a warning names."""

FEW = 0.05
"""Share of problems up to which a reward may miss its maximum: some rows of every data set are wrong."""


@dataclass(frozen=True)
class Finding:
    """One finding."""

    code: Code
    text: str
    """Value, consequence and remedy."""
    where: tuple[str, ...] = ()
    """The first problems or rows that show it."""
    task: str = ""
    """The task in a mixture, or empty."""


def named(problems: Iterable[SeenProblem]) -> tuple[str, ...]:
    """The first problems, for a finding."""
    return tuple(problem.problem_id for problem, _ in zip(problems, range(SHOWN_ROWS), strict=False))
