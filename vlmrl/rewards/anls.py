"""`reward=anls`: average normalized Levenshtein similarity, the measure of DocVQA (arXiv 1907.00490, equation 1).

    NL = edit distance / length of the longer text        s = 1 - NL where NL < τ, else 0

Texts are compared in lower case, and any run of white space counts as one space, as in the evaluation script of the
DocVQA challenge. At NL = τ exactly, the paper gives 0 and the script 1 - τ; this is the paper's.
"""

from __future__ import annotations

import numpy as np

from vlmrl.config.reward import AnlsTerm
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.references import references_of


def score_anls(term: AnlsTerm, attempt: Attempt) -> float | None:
    """The similarity to the best reference; None, so the term abstains, without a reference."""
    references = references_of(attempt)
    if not references:
        return None
    answer = attempt.answer
    return 0.0 if answer is None else max(similarity(answer, each, term.threshold) for each in references)


def similarity(answer: str, reference: str, threshold: float) -> float:
    """Equation 1 for one reference.

    >>> round(similarity("Univ. of California", "University of California", 0.5), 3), similarity("cat", "dog", 0.5)
    (0.75, 0.0)
    """
    found, wanted = (" ".join(text.lower().split()) for text in (answer, reference))
    longer, shorter = max(len(found), len(wanted)), min(len(found), len(wanted))
    if longer == 0:
        return 1.0
    if longer - shorter >= threshold * longer:  # the distance is at least the difference in length
        return 0.0
    distance = edit_distance(found, wanted)
    return 1 - distance / longer if distance < threshold * longer else 0.0


def edit_distance(first: str, second: str) -> int:
    """The Levenshtein distance: insertions, deletions and substitutions of one character. O(len²) in time, one row in
    memory: texts of 2,000 characters take about 20 ms.

    >>> edit_distance("kitten", "sitting")
    3
    """
    codes = np.frombuffer(second.encode("utf-32-le", "surrogatepass"), np.uint32)
    steps = np.arange(len(codes) + 1)
    row = steps
    for count, character in enumerate(first, 1):
        # Deletions and substitutions first; insertions are a running minimum along the row.
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))
        row = np.minimum.accumulate(np.concatenate(([count], best)) - steps) + steps
    return int(row[-1])
