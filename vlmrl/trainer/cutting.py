"""Where a batch is cut into micro-batches, and which rank gets which (shares.py). Only numbers of tokens decide, so the
plan of a run cuts as the run does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIXED_COST_ROWS = 512
"""Cost of a micro-batch on top of its rows, in rows: kernels that are not full, and the summing of gradients."""

UNEVENNESS = 64
"""A full micro-batch costs an extra 1/64 of its rows, and a smaller one less than proportionally. So a few more rows in
total are preferred to one micro-batch that is nearly empty while the others are full."""


def cut(lengths: Sequence[int], shared: Sequence[int], token_budget: int) -> list[tuple[int, int]]:
    """Divide a row of sequences into micro-batches → (start, end) of each, in order.

    Sequence i has `lengths[i]` tokens; the first `shared[i]` of them are already computed if the sequence before it is
    in the same micro-batch. No micro-batch exceeds `token_budget` tokens, except one that holds a single sequence.
    The result minimizes Σ (tokens + FIXED_COST_ROWS + tokens² / (UNEVENNESS · budget)) exactly, by dynamic programming
    over where the last micro-batch starts.

    Two groups of three sequences share 20 tokens of 22. With a budget of 30, each group is one micro-batch:

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
        # Tokens of [start, end) for every start. They only fall as the start moves right, so a start that is too far
        # back for this end is too far back for every later end.
        tokens = ends[end] - ends[first:end] + known[first:end]
        fits = tokens <= token_budget
        fits[-1] = True
        skipped = int(fits.argmax())
        first, tokens = first + skipped, tokens[skipped:]
        costs = best[first:end] + tokens + FIXED_COST_ROWS + tokens.astype(float) ** 2 / (UNEVENNESS * token_budget)
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
    """Divide as `cut` does, so that `ranks` have about equal work: where possible the number of micro-batches is a
    multiple of `ranks`, and the largest one is as small as that number allows.

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
    """Assign micro-batches to ranks → per rank, and per pass, an index into `rows` or None for a filler.

    Micro-batches of about the same size are computed in the same pass, since the ranks wait for each other in every
    pass. The order of the ranks is reversed from pass to pass, so that a rank that had the largest micro-batch in one
    pass has the smallest in the next.

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
