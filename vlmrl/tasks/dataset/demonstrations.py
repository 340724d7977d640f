"""Random answers: answers of the right form that say nothing about the problem, for a warm-up.

    answers of some rows ──▶ form ──▶ draw(seed)
    "A", with options        letters A to D
    "cat", "dog", "cat"      one of the answers that occur, where few occur
    "12", "7", "31"          a number from 7 to 31, with as many decimals
    "<answer> 12 </answer>"  the same inside <answer> … </answer>

A form is found on rows that are spread over the data set, and is the same for every problem: a random answer depends on
its seed alone. Answers without such a form (free text, boxes) have no random ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmrl.tasks.dataset.columns import LETTERS

MOST_DISTINCT = 64
"""More distinct answers than this are no closed set."""

LONGEST_OPTION = 64
"""Characters of the longest answer of a closed set."""

_NUMBER = re.compile(r"([^\d+\-.]*?)([+-]?\d+(?:\.(\d+))?)([^\d]*)")
_WRAPPED = re.compile(r"(.*<answer>\s*)(.*?)(\s*</answer>\s*)", re.DOTALL)
_IN_BOX = re.compile(r"(\s*\$*\\boxed\{)([^{}]*)(\}\$*\s*)")


@dataclass(frozen=True)
class OneOf:
    """A closed set of answers."""

    answers: tuple[str, ...]

    def draw(self, randomly: random.Random) -> str:
        return randomly.choice(self.answers)


@dataclass(frozen=True)
class NumberBetween:
    """A number from `low` to `high`, in units of the last decimal, between texts such as a unit."""

    low: int
    high: int
    decimals: int
    before: str = ""
    after: str = ""

    def draw(self, randomly: random.Random) -> str:
        number = randomly.randint(self.low, self.high)
        shown = f"{number / 10**self.decimals:.{self.decimals}f}" if self.decimals else str(number)
        return self.before + shown + self.after


@dataclass(frozen=True)
class Wrapped:
    """Another form between two texts that every answer has."""

    before: str
    form: OneOf | NumberBetween
    after: str

    def draw(self, randomly: random.Random) -> str:
        return self.before + self.form.draw(randomly) + self.after


def random_answer(form: OneOf | NumberBetween | Wrapped, seed: int) -> str:
    """The random answer of a seed.

    >>> [random_answer(OneOf(("A", "B")), seed) for seed in range(6)]
    ['B', 'A', 'A', 'A', 'A', 'B']
    """
    return form.draw(random.Random(seed))


def form_of(answers: Sequence[str], options: Sequence[int] = ()) -> OneOf | NumberBetween | Wrapped | None:
    """The form of answers; None where they have none. `options`: how many options the rows have, if they have any.

    >>> form_of(["B", "C"], options=[4, 4]), form_of(["yes", "no", "no", "yes"])
    (OneOf(answers=('A', 'B', 'C', 'D')), OneOf(answers=('no', 'yes')))
    >>> form_of(["3 cm", "12 cm"]), form_of(["a long story", "another story"])
    (NumberBetween(low=3, high=12, decimals=0, before='', after=' cm'), None)
    """
    if not answers:
        return None
    for pattern in (_WRAPPED, _IN_BOX):
        found = [pattern.fullmatch(answer) for answer in answers]
        if all(found):
            parts = [(each[1], each[2], each[3]) for each in found if each]
            inner = _plain_form([part[1] for part in parts], options)
            before, after = _common([part[0] for part in parts]), _common([part[2] for part in parts])
            return None if inner is None or before is None or after is None else Wrapped(before, inner, after)
    return _plain_form(answers, options)


def _common(texts: Sequence[str]) -> str | None:
    """The text that all have, apart from white space and reasoning before it; None where they differ."""
    kept = {re.sub(r"\s*<think>.*</think>\s*", "", text, flags=re.DOTALL) for text in texts}
    return min(kept) if len({text.strip() for text in kept}) == 1 else None


def _plain_form(answers: Sequence[str], options: Sequence[int]) -> OneOf | NumberBetween | None:
    if options and all(len(answer) == 1 and answer in LETTERS for answer in answers):
        return OneOf(tuple(LETTERS[: max(options)]))
    distinct = sorted(set(answers))
    numbers = _numbers(answers)
    is_closed = len(distinct) <= MOST_DISTINCT and max(map(len, distinct)) <= LONGEST_OPTION
    if is_closed and 1 < len(distinct) <= len(answers) / 2 and (numbers is None or _is_dense(numbers, len(distinct))):
        return OneOf(tuple(distinct))
    return numbers


def _is_dense(numbers: NumberBetween, distinct: int) -> bool:
    """Whether most numbers of the range occur: then they are labels, such as digits."""
    return distinct > 0.5 * (numbers.high - numbers.low + 1)


def _numbers(answers: Sequence[str]) -> NumberBetween | None:
    """The range of answers that are all numbers between the same texts; None where they are not, or all equal."""
    found = [_NUMBER.fullmatch(answer) for answer in answers]
    if not all(found) or len({(each[1], each[4]) for each in found if each}) != 1:
        return None
    decimals = max(len(each[3] or "") for each in found if each)
    if decimals > 6 or any(len(each[2]) > 15 for each in found if each):
        return None
    values = [round(float(each[2]) * 10**decimals) for each in found if each]
    first = found[0]
    assert first is not None
    if min(values) == max(values):
        return None
    return NumberBetween(min(values), max(values), decimals, first[1], first[4])
