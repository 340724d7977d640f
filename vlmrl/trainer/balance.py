"""How sorted sequences are cut into micro-batches, and who computes which.

A run of neighbours costs its first sequence and, of each further one, what follows the prefix that it shares with the
one before it. Cutting a run in two computes that prefix twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIXED_COST = 512
"""What a micro-batch costs beside its rows, in rows: kernels that are not filled, gradients that are added up."""

UNEVENNESS = 64
"""Micro-batches of unequal size cost a 64th of their rows at most: rather a few more rows than one that is all but
empty while the others are full."""


def cut(lengths: Sequence[int], shared: Sequence[int], token_budget: int) -> list[tuple[int, int]]:
    """Divide a row of sequences into micro-batches → (start, end) of each, in order.

    Sequence i has `lengths[i]` tokens, the first `shared[i]` of them computed already if the sequence before it is in
    the same micro-batch. None exceeds `token_budget` tokens but a sequence that does so alone. Least in
    Σ (tokens + FIXED_COST + tokens² / (UNEVENNESS · budget)); exact, by dynamic programming over where the last one
    starts.

    Two groups of three that share 20 tokens of 22, under a budget of 30: the second is not begun in the first.

    >>> cut([22] * 6, [0, 20, 20, 1, 20, 20], 30)
    [(0, 3), (3, 6)]
    """
    count = len(lengths)
    full, known = np.array(lengths, np.int64), np.array(shared, np.int64)
    ends = np.concatenate([[0], np.cumsum(full - known)])
    best = np.concatenate([[0.0], np.full(count, np.inf)])
    begins = np.zeros(count + 1, np.int64)
    first = 0
    for end in range(1, count + 1):
        # Tokens of [start, end) for every start; fewer as the start moves right, so that starts too far back stay so.
        tokens = ends[end] - ends[first:end] + known[first:end]
        fits = tokens <= token_budget
        fits[-1] = True
        skipped = int(fits.argmax())
        first, tokens = first + skipped, tokens[skipped:]
        costs = best[first:end] + tokens + FIXED_COST + tokens.astype(float) ** 2 / (UNEVENNESS * token_budget)
        begins[end] = first + int(costs.argmin())
        best[end] = costs.min()
    bounds = []
    end = count
    while end > 0:
        bounds.append((int(begins[end]), end))
        end = int(begins[end])
    return bounds[::-1]


def cut_for_ranks(
    lengths: Sequence[int], shared: Sequence[int], token_budget: int, ranks: int
) -> list[tuple[int, int]]:
    """The same, so that `ranks` have about as much to do: a multiple of their number where that can be, the largest
    micro-batch as small as so many allow.

    >>> cut_for_ranks([5, 5, 5, 9], [0, 0, 0, 0], 100, ranks=2)
    [(0, 2), (2, 4)]
    """
    bounds = cut(lengths, shared, token_budget)
    if ranks == 1:
        return bounds
    wanted = -(-len(bounds) // ranks) * ranks
    low, high = 1, token_budget
    while low < high:
        middle = (low + high) // 2
        if len(cut(lengths, shared, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return cut(lengths, shared, high)


def deal(rows: Sequence[int], ranks: int) -> list[list[int | None]]:
    """Which micro-batch each rank computes in each of its passes: per rank, an index into `rows` or None per pass.

    Runs of about the same size are computed at the same time, since the ranks wait for each other in every pass; and
    what one rank had more of in one pass it has less of in the next.

    >>> deal([4, 9, 5, 8, 3], ranks=2)
    [[1, 0, 4], [3, 2, None]]
    """
    order = list(range(len(rows)))
    if ranks > 1:
        order.sort(key=lambda index: -rows[index])
    places: list[int | None] = [*order, *[None] * (-len(order) % ranks)]
    passes = [places[first : first + ranks] for first in range(0, len(places), ranks)]
    return [
        [each[rank if number % 2 == 0 else -1 - rank] for number, each in enumerate(passes)] for rank in range(ranks)
    ]
