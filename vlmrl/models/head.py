"""Logprobs of given tokens from hidden states, without holding a full row of logits per loss row.

    hidden [U, H] ─┬─▶ logits of columns [0, w)   ─▶ running maximum, Σ exp, Σ exp · logit ─┐
                   ├─▶           columns [w, 2w)  ─▶   …                                    ├─▶ logprobs [N]
                   └─▶                  …                                                   ┘   entropies [U]

The vocabulary is processed in chunks of columns, so that at most U × w logits exist at a time, for any vocabulary. The
backward pass computes the same logits again (4 products of U × H × V instead of 3). Softmax and logits are float32 for
any dtype of the weights: the product of two bfloat16 numbers is exact in float32, so a tensor core's product with
float32 sums equals the product of the weights cast to float32, at the speed of bfloat16.

The gradient of the entropy needs no product more: with the logits z of a row and H = −Σ_j p_j log p_j,

    ∂ log p_k / ∂z_j = [j = k] − p_j          ∂H / ∂z_j = −p_j (log p_j + H)

so the backward pass adds it to the gradient of the logits that it has anyway, where a loss uses the entropy.

Distillation compares the distributions of two models at the k most likely tokens of one of them (top_tokens.py). Both
come from the same chunks: `most_likely` finds the tokens, and `token_logprobs` has the logprobs of given ones, with
gradient. With S the given tokens of a row and q = Σ_{j ∉ S} p_j its tail,

    ∂ log q / ∂z_j = [j ∉ S] p_j / q − p_j
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlmrl.models import compiling, top_tokens
from vlmrl.models.compiling import compiled_on_gpu
from vlmrl.models.logit_map import IDENTITY, LogitMap

MAX_LOGITS = 1 << 26
"""Logits that exist at a time: 256 MiB in float32, and a few times that for what is computed from them."""

Columns: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Running sums over the columns processed so far, float32 [U] each: maximum, Σ exp(logit − maximum),
Σ exp(…) · (logit − maximum); and float32 [N]: the logits of the targets among these columns."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """Natural-log probabilities of `targets` under the distributions of `hidden` → float32 [N], and the entropies of
    the distributions in nats, float32 [U]; both with gradients to `hidden` and `weight`.

    hidden float [U, H]; weight float [V, H]; bias float [V] without gradient, or None; banned bool [V], True where the
    probability is 0; entry int64 [N], the row of `hidden` that predicts each target; targets int64 [N]; the temperature
    is above 0, one number or float32 [U]; `logit_map` changes the logits before that.

    >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> rows, targets = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    >>> logprobs, entropies = token_logprobs(hidden, weight, None, torch.zeros(3, dtype=torch.bool), rows, targets, 1.0)
    >>> torch.log_softmax(hidden @ weight.T, -1)[rows, targets], logprobs
    (tensor([-0.5514, -1.5514, -0.2395]), tensor([-0.5514, -1.5514, -0.2395]))
    """
    out: tuple[Tensor, Tensor, None] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, banned, entry, targets, temperature, logit_map, None
    )
    return out[:2]


def token_and_top_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
    top_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_logprobs`, and float32 [U, k + 1], with gradient: the logprobs of the tokens `top_ids` of each row, and
    in the last column that of all other tokens together. `top_ids` int64 [U, k]; those of a row are distinct, and none
    is banned."""
    out: tuple[Tensor, Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, banned, entry, targets, temperature, logit_map, top_ids
    )
    return out


@torch.no_grad()
def most_likely(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
    k: int,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Logprobs float32 [N] as those of `token_logprobs`, at less cost: without gradient and entropies. With k > 0 also
    the k most likely tokens of each row, int64 [U, k], the most likely first, and float32 [U, k + 1], their logprobs
    and that of all other tokens together. At least k tokens must not be banned.

    >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> none, one, targets = torch.zeros(3, dtype=torch.bool), torch.tensor([0]), torch.tensor([1])
    >>> logprobs, (ids, top) = most_likely(hidden, weight, None, none, one, targets, 1.0, IDENTITY, 1)
    >>> ids, top.exp()
    (tensor([[1],
            [2]]), tensor([[0.5761, 0.4239],
            [0.7870, 0.2130]]))
    """
    divisor = _divisor(temperature, hidden)
    largest, total, _, at_target = _no_columns(hidden, targets)
    found = largest, total, at_target
    likely = top_tokens.nothing_yet(len(hidden), hidden.device)
    for columns in chunks(len(hidden), len(weight)):
        logits = _logits(hidden, weight, bias, columns)
        final = _final_logits(logits, banned[columns].clone(), divisor, logit_map)
        found = _add_final(final, entry, targets - columns.start, *found)
        if k:
            likely = top_tokens.keep_most_likely(final, columns.start, k, *likely)
    largest, total, at_target = found
    logsumexp = largest + total.log()
    ids, values, rest = likely
    top = (ids, top_tokens.as_logprobs(values, rest, logsumexp)) if k else None
    return at_target - logsumexp[entry], top


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        banned: Tensor,
        entry: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
        logit_map: LogitMap,
        top_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        divisor = _divisor(temperature, hidden)
        found = _no_columns(hidden, targets)
        given: tuple[Tensor, Tensor] | None = None
        if top_ids is not None:
            nothing = torch.full((len(hidden),), float("-inf"), device=hidden.device)
            given = torch.zeros_like(top_ids, dtype=torch.float32), nothing
        for columns in chunks(len(hidden), len(weight)):
            logits = _logits(hidden, weight, bias, columns)
            found = _add_columns(
                logits, banned[columns].clone(), entry, targets - columns.start, divisor, logit_map, *found
            )
            if top_ids is not None and given is not None:
                given = _add_given_columns(
                    logits, banned[columns].clone(), top_ids - columns.start, divisor, logit_map, *given
                )
        largest, total, moment, at_target = found
        log_total = total.log()
        logsumexp = largest + log_total
        entropies = log_total - moment / total
        top = None if given is None else top_tokens.as_logprobs(*given, logsumexp)
        tail = None if top is None else top[:, -1].clone()  # of its own, because an output must not be saved in part
        ctx.save_for_backward(hidden, weight, bias, banned, entry, targets, logsumexp, entropies, top_ids, tail)
        ctx.temperature, ctx.logit_map = temperature, logit_map
        ctx.set_materialize_grads(False)  # None, and no work, where the loss uses one output alone
        return at_target - logsumexp[entry], entropies, top

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None, top_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, banned, entry, targets, logsumexp, entropies, top_ids, tail = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(targets, dtype=torch.float32)
        row_grad = torch.zeros_like(logsumexp).index_add_(0, entry, grad)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        divisor = _divisor(ctx.temperature, hidden)
        of_rows = of_targets = ctx.temperature
        if isinstance(of_rows, Tensor):
            of_targets = of_rows[entry]
        row_grad, grad = row_grad / of_rows, grad / of_targets
        of_entropy = None if entropy_grad is None else (entropies, entropy_grad / of_rows)
        if top_grad is not None:
            top_grad = top_grad / divisor
            top_grad[:, -1].masked_fill_(tail <= top_tokens.SMALLEST_TAIL, 0.0)  # there the tail is a constant
            row_grad = row_grad + top_grad.sum(-1)
        for columns in chunks(len(hidden), len(weight)):
            logits = _logits(hidden, weight, bias, columns)
            gradient = _logit_gradient(
                logits,
                banned[columns].clone(),
                entry,
                targets - columns.start,
                divisor,
                ctx.logit_map,
                logsumexp,
                row_grad,
                grad,
                of_entropy,
                None if top_grad is None else (top_ids - columns.start, tail, top_grad),
                dtype,
            )
            if grad_hidden is not None:
                grad_hidden += product(gradient, weight[columns])
            if grad_weight is not None:
                grad_weight[columns] = product(gradient.t(), hidden)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Chunks of the vocabulary's columns, sized so that `rows` × columns is at most `MAX_LOGITS`; at least 128 wide."""
    width = max(128, MAX_LOGITS // max(1, rows) // 128 * 128)
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m] with sums in float32 → float32 [n, m]."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def float_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [U, V], before the model's map, the mask of banned tokens and the division by the temperature. A GPU
    makes no copy of the weight in float32."""
    logits = product(hidden, weight.t())
    return logits if bias is None else logits + bias.float()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """The logits of some columns, float32 [U, columns]."""
    return float_logits(hidden, weight[columns], None if bias is None else bias[columns])


def _no_columns(hidden: Tensor, targets: Tensor) -> Columns:
    """`Columns` before the first chunk."""
    largest = torch.full((len(hidden),), torch.finfo(torch.float32).min, device=hidden.device)
    # The sums are two tensors: one that is passed twice would be compiled as such, and then again for two.
    return largest, torch.zeros_like(largest), torch.zeros_like(largest), torch.zeros_like(targets, dtype=torch.float32)


def _divisor(temperature: float | Tensor, hidden: Tensor) -> float | Tensor:
    """The temperature as one number or float32 [U, 1]; where functions are compiled always the latter and never a view,
    so that micro-batches with and without temperatures of their own run the same code."""
    if compiling.compiles_on(hidden.device):
        of_rows = torch.empty(len(hidden), 1, device=hidden.device)
        return of_rows.copy_(temperature[:, None]) if isinstance(temperature, Tensor) else of_rows.fill_(temperature)
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def final_logits(logits: Tensor, banned: Tensor, temperature: float | Tensor, logit_map: LogitMap) -> Tensor:
    """The logits that probabilities are computed from."""
    return (logit_map(logits) / temperature).masked_fill(banned, float("-inf"))


_final_logits = compiled_on_gpu(final_logits)


@compiled_on_gpu
def _add_final(
    logits: Tensor, entry: Tensor, targets: Tensor, largest: Tensor, total: Tensor, at_target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_add_columns`, of final logits and without what only the entropies need."""
    new = torch.maximum(largest, logits.amax(-1))
    total = (largest - new).exp() * total + (logits - new[:, None]).exp().sum(-1)
    inside = (targets >= 0) & (targets < logits.shape[1])
    picked = logits[entry, targets.clamp(0, logits.shape[1] - 1)]
    return new, total, torch.where(inside, picked, at_target)


@compiled_on_gpu
def _add_given_columns(
    logits: Tensor,
    banned: Tensor,
    columns: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
    values: Tensor,
    rest: Tensor,
) -> tuple[Tensor, Tensor]:
    """`top_tokens.add_given` on logits that are not final yet."""
    return top_tokens.add_given(final_logits(logits, banned, temperature, logit_map), columns, values, rest)


@compiled_on_gpu
def _add_columns(
    logits: Tensor,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
    largest: Tensor,
    total: Tensor,
    moment: Tensor,
    at_target: Tensor,
) -> Columns:
    """Add the columns of `logits` to the running sums. `targets` count from the first of these columns and may lie
    outside them; the temperature is one number or float32 [U, 1]."""
    logits = final_logits(logits, banned, temperature, logit_map)
    new = torch.maximum(largest, logits.amax(-1))
    below = logits - new[:, None]
    exponentials = below.exp()
    shrunk, lower = (largest - new).exp(), largest - new
    moment = shrunk * (moment + lower * total) + torch.where(banned, 0.0, exponentials * below).sum(-1)
    total = shrunk * total + exponentials.sum(-1)
    inside = (targets >= 0) & (targets < logits.shape[1])
    picked = logits[entry, targets.clamp(0, logits.shape[1] - 1)]
    return new, total, moment, torch.where(inside, picked, at_target)


@compiled_on_gpu
def _logit_gradient(
    logits: Tensor,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    logit_map: LogitMap,
    logsumexp: Tensor,
    row_grad: Tensor,
    grad: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
    of_top: tuple[Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `logits`, `dtype` [U, columns]: Σ grad of the row's targets in that column − p · Σ grad of all
    targets of the row. `row_grad` is the second sum, with the gradients of `of_top`. `of_entropy`: entropies [U] and
    their gradients [U], which add −p (log p + entropy) · gradient. `of_top`: columns [U, k] of given tokens, logprobs
    [U] of the tail and gradients [U, k + 1]. All gradients are already divided by the temperature, which is one number
    or float32 [U, 1]."""
    mapped = logit_map(logits)
    # In place, because each tensor here is as large as a chunk of logits.
    logprobs = (mapped / temperature).masked_fill_(banned, float("-inf")).sub_(logsumexp[:, None])
    gradient = logprobs.exp()
    in_tail = None
    if of_top is not None:
        top_columns, tail, top_grad = of_top
        in_tail = top_tokens.without(logprobs, top_columns).sub_(tail[:, None]).exp_().mul_(top_grad[:, -1:])
    slope = -row_grad[:, None]
    if of_entropy is not None:
        entropies, entropy_grad = of_entropy
        logprobs.masked_fill_(banned, 0.0)  # their probability is 0, and 0 · −inf would be NaN
        slope = logprobs.add_(entropies[:, None]).mul_(-entropy_grad[:, None]).add_(slope)
    gradient.mul_(slope)
    if of_top is not None and in_tail is not None:
        top_tokens.add_to_columns(gradient.add_(in_tail), top_columns, top_grad[:, :-1])
    inside = (targets >= 0) & (targets < logits.shape[1])
    columns = targets.clamp(0, logits.shape[1] - 1)
    gradient.index_put_((entry, columns), torch.where(inside, grad, 0.0), accumulate=True)
    return logit_map.multiply_by_slope(gradient, mapped).to(dtype)
