"""`reward=exact`: 1 if the answer is the reference, else 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from vlmrl.config.reward import ExactTerm
from vlmrl.errors import safe_repr
from vlmrl.rewards.base import Attempt, RewardError


def exact(term: ExactTerm) -> Callable[[Attempt], float | None]:
    """The function of an `ExactTerm`. It abstains where the row has no reference, and raises `RewardError` where the
    reference is neither a text nor a number, nor a list of such."""

    def score(attempt: Attempt) -> float | None:
        if attempt.reference is None:
            return None
        right = {normalized(text, term) for text in texts_of(attempt.reference)}
        return float(attempt.answer is not None and normalized(attempt.answer, term) in right)

    return score


def texts_of(reference: Any) -> list[str]:
    """The texts that a reference accepts: of a list, each of its entries.

    A column of whole numbers with a gap is read as floats, so 7.0 accepts `7` as well.

    >>> texts_of(["Paris", 7.0]), texts_of(True)
    (['Paris', '7.0', '7'], ['True', 'true'])
    """
    if isinstance(reference, list | tuple | set | frozenset):
        return [text for entry in reference if entry is not None for text in texts_of(entry)]
    if isinstance(reference, bool):
        return [str(reference), str(reference).lower()]
    if isinstance(reference, float) and reference.is_integer():
        return [str(reference), str(int(reference))]
    if isinstance(reference, str | int | float):
        return [str(reference)]
    raise RewardError(
        f"the reference is {safe_repr(reference)}, a {type(reference).__name__} and no text, so no answer can equal "
        "it: name the column with the answer itself (task.columns.answer), or use a reward function of your own"
    )


def normalized(text: str, term: ExactTerm) -> str:
    """A text as it is compared. Unicode's compositions (NFC) and runs of white space never count.

    >>> normalized(" New  York. ", ExactTerm(ignore_case=True, ignore_punctuation=True))
    'new york'
    """
    text = unicodedata.normalize("NFC", text)
    if term.ignore_case:
        text = text.casefold()
    if term.ignore_punctuation:
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    return ("" if term.ignore_spaces else " ").join(text.split())
