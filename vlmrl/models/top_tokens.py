"""The k most likely tokens of each row, and the logprobs of given tokens, from chunks of a row's logits.

    row of V logits ─▶ the k largest, and log Σ exp of the V − k others ─▶ k + 1 outcomes whose probabilities sum to 1

The last outcome, the *tail*, stands for all other tokens. Its logprob comes from its own sum: 1 − Σ p of the first k
would be rounding noise where they have nearly all the probability.

Chunks arrive with columns that count from their own first token. All logits here are final: after the model's map, the
mask of banned tokens (−inf) and the division by the temperature.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

SMALLEST_TAIL = -87.0
"""Natural log of the least probability of a tail, about 1e-38. A tail without tokens has it in place of −inf, so that
no divergence meets 0 · ∞."""

Likely: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of the columns processed so far: int64 [U, k] token ids, the most likely first, float32 [U, k] their logits, and
float32 [U] log Σ exp of the other logits. There are fewer than k where there are fewer columns."""


def nothing_yet(rows: int, device: torch.device) -> Likely:
    """`Likely` before the first column."""
    empty = torch.empty(rows, 0, device=device)
    return empty.long(), empty, torch.full((rows,), float("-inf"), device=device)


def keep_most_likely(logits: Tensor, first: int, k: int, ids: Tensor, values: Tensor, rest: Tensor) -> Likely:
    """Add a chunk, float32 [U, columns], whose first column is token `first`. It changes `logits`.

    >>> kept = keep_most_likely(torch.tensor([[0.0, 3.0, 2.0]]), 0, 2, *nothing_yet(1, torch.device("cpu")))
    >>> ids, values, rest = keep_most_likely(torch.tensor([[1.0, 5.0]]), 3, 2, *kept)
    >>> ids, values, rest.exp()  # e⁰ + e¹ + e²
    (tensor([[4, 1]]), tensor([[5., 3.]]), tensor([11.1073]))
    """
    largest, columns = logits.topk(min(k, logits.shape[1]), dim=-1)
    others = logits.scatter_(1, columns, float("-inf")).logsumexp(-1)
    candidates = torch.cat([values, largest], dim=1)
    kept, order = candidates.topk(min(k, candidates.shape[1]), dim=-1)
    ids = torch.cat([ids, columns + first], dim=1).gather(1, order)
    displaced = candidates.scatter_(1, order, float("-inf")).logsumexp(-1)
    return ids, kept, torch.stack([rest, others, displaced]).logsumexp(0)


def add_given(logits: Tensor, columns: Tensor, values: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Add a chunk, float32 [U, columns], where the tokens are given: `columns` int64 [U, k] count from the first column
    of the chunk and may lie outside it. `values` and `rest` are as in `Likely`."""
    inside, places = _inside(columns, logits.shape[1])
    values = torch.where(inside, logits.gather(1, places), values)
    return values, torch.logaddexp(rest, without(logits, columns).logsumexp(-1))


def without(logits: Tensor, columns: Tensor) -> Tensor:
    """The logits, with −inf at the tokens that `columns` gives."""
    inside, places = _inside(columns, logits.shape[1])
    # Added, not written: a token outside the chunk must leave the column in its place as it is.
    return logits.scatter_add(1, places, torch.where(inside, float("-inf"), 0.0))


def add_to_columns(gradient: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Add `values` [U, k] to the columns of `gradient` [U, columns], in place, where they lie inside the chunk."""
    inside, places = _inside(columns, gradient.shape[1])
    return gradient.scatter_add_(1, places, torch.where(inside, values, 0.0))


def as_logprobs(values: Tensor, rest: Tensor, logsumexp: Tensor) -> Tensor:
    """float32 [U, k + 1]: the logprobs of the k tokens and of the tail."""
    tail = (rest - logsumexp).clamp_min(SMALLEST_TAIL)
    return torch.cat([values - logsumexp[:, None], tail[:, None]], dim=1)


def _inside(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """bool [U, k], whether a token is in the chunk, and int64 [U, k], its column, or one of the chunk's where it is
    not."""
    return (columns >= 0) & (columns < width), columns.clamp(0, width - 1)
