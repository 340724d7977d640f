"""Logprobs of tokens that were sampled from a truncated distribution (top_k, top_p, min_p).

The sampler keeps a set S of tokens, the support, and samples from μ(a | S) = μ(a) / μ(S). So what is learned is the
policy's distribution over the same set, with the logits z at the temperature of sampling:

    log π(a | S) = z_a − log Σ_{j ∈ S} exp z_j            H = −Σ_{j ∈ S} p_j log p_j,   p_j = π(j | S)

S is what the sampler recorded and has no gradient. A logprob over the whole vocabulary would be lower by log π(S), and
its ratio to the sampler's biased. The support belongs to the token and not to the row of the prefix tree: siblings that
were sampled by two policy versions may share a row and differ in their supports.

    union of the supports ─▶ V' rows of the head ─▶ logits of U rows × V' columns, in chunks ─▶ the K that are in a
                                                    support ─▶ logprobs [M], entropies [M]

Only the columns of V' are computed, forward and backward, which is at most the work of head.py. Gathering the head's
rows for each of the K entries would need K · H numbers instead of V' · H. Nothing here synchronizes with the GPU: all
sizes are known when a micro-batch is packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.models.features import to_device
from vlmrl.models.head import chunks, product
from vlmrl.models.logit_map import LogitMap
from vlmrl.types import IntArray, Supports


@dataclass(frozen=True, eq=False)
class PackedSupports:
    """The supports of a micro-batch of N loss tokens: M of them have one, of K entries together."""

    vocabulary: Tensor
    """int64 [V']; the tokens that are in a support, ascending."""
    column: Tensor
    """int64 [K]; the index in `vocabulary` of each entry."""
    owner: Tensor
    """int64 [K]; which of the M tokens each entry belongs to."""
    sampled: Tensor
    """int64 [M]; the entry that was sampled."""
    truncated: Tensor
    """int64 [M]; index of each token among the N loss tokens."""
    whole: Tensor | None
    """int64 [N − M]; the loss tokens that were sampled from the whole vocabulary. None where there are none."""

    @staticmethod
    def of(supports: Supports, targets: IntArray, device: torch.device) -> PackedSupports | None:
        """From the supports of N loss tokens, and the tokens that were sampled, int64 [N]; None where all supports are
        the whole vocabulary. Raises `ContractError` where a support lacks the sampled token."""
        places, sizes = supports.positions(targets), supports.sizes
        (truncated,), (whole,) = np.nonzero(sizes), np.nonzero(sizes == 0)
        if not len(truncated):
            return None
        vocabulary, column = np.unique(supports.token_ids.astype(np.int64), return_inverse=True)
        return PackedSupports(
            vocabulary=to_device(vocabulary, device),
            column=to_device(column, device),
            owner=to_device(np.repeat(np.arange(len(truncated)), sizes[truncated]), device),
            sampled=to_device(places[truncated], device),
            truncated=to_device(truncated, device),
            whole=to_device(whole, device) if len(whole) else None,
        )


def support_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    supports: PackedSupports,
    entry: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:
    """Natural-log probabilities of the M sampled tokens over their supports → float32 [M], and the entropies of these
    distributions in nats, float32 [M]; both with gradients to `hidden` and `weight`.

    hidden float [U, H]; weight float [V, H]; bias float [V] without gradient, or None; entry int64 [N], the row of
    `hidden` that predicts each loss token; the temperature is above 0, one number or float32 [U].
    """
    rows = entry[supports.truncated]  # [M]
    owner = supports.owner
    logits: Tensor = _PickedLogits.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, supports.vocabulary, rows[owner], supports.column
    )
    logits = logit_map(logits) / (temperature[rows][owner] if isinstance(temperature, Tensor) else temperature)
    empty = torch.zeros_like(rows, dtype=torch.float32)
    largest = empty.scatter_reduce(0, owner, logits.detach(), "amax", include_self=False)
    below = logits - largest[owner]
    exponentials = below.exp()
    total = empty.index_add(0, owner, exponentials)
    moment = empty.index_add(0, owner, exponentials * below)
    log_total = total.log()
    return below[supports.sampled] - log_total, log_total - moment / total


class _PickedLogits(torch.autograd.Function):
    """float32 [K]: the logits of (row of `hidden`, index in `vocabulary`) pairs, before the model's map."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocabulary: Tensor,
        rows: Tensor,
        column: Tensor,
    ) -> Tensor:
        picked = torch.zeros_like(rows, dtype=torch.float32)
        for columns in chunks(len(hidden), len(vocabulary)):
            tokens = vocabulary[columns]
            logits = product(hidden, weight[tokens].t())
            if bias is not None:
                logits += bias[tokens].float()
            inside, local = _inside(column, columns)
            picked = torch.where(inside, logits[rows, local], picked)
        ctx.save_for_backward(hidden, weight, vocabulary, rows, column)
        return picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, vocabulary, rows, column = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        for columns in chunks(len(hidden), len(vocabulary)):
            tokens = vocabulary[columns]
            inside, local = _inside(column, columns)
            gradient = torch.zeros(len(hidden), len(tokens), device=hidden.device)
            gradient.index_put_((rows, local), torch.where(inside, grad, 0.0), accumulate=True)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden += product(gradient, weight[tokens])
            if grad_weight is not None:
                grad_weight[tokens] = product(gradient.t(), hidden).to(weight.dtype)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _inside(column: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which entries are in a chunk of columns, bool [K], and their index in it, int64 [K], 0 for the others."""
    local = column - columns.start
    inside = (local >= 0) & (local < columns.stop - columns.start)
    return inside, torch.where(inside, local, 0)
