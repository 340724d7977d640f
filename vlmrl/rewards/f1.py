"""`reward=f1`: the F1 score of the words that answer and reference share, as in SQuAD (arXiv 1606.05250, section 6.1).

Texts are compared in lower case, without punctuation and without the articles a, an and the, as SQuAD's evaluation
script does.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from vlmrl.config.reward import F1Term
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.references import references_of

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def score_f1(term: F1Term, attempt: Attempt) -> float | None:
    """The F1 score against the best reference; None, so the term abstains, without a reference."""
    references = references_of(attempt)
    if not references:
        return None
    return 0.0 if attempt.answer is None else max(f1(attempt.answer, reference) for reference in references)


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall over the words of two texts, counted with repetition.

    >>> f1("The black cat", "a cat, sleeping")
    0.5
    """
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
