"""Attention over a prefix tree: every query attends to its own ancestors, and to nothing else but what its rule adds.

A `TreePlan` (plan.py) lists the blocks of queries and keys. Each block yields an output and a log-sum-exp. They merge
exactly, as in flash attention (arXiv 2205.14135, eq. 3). The backward pass recomputes the probabilities block by block
from the merged log-sum-exp, so no quadratic array is kept. The work is proportional to the distinct tokens. The
gradient of a shared key is the sum over the branches that attended to it.

A soft cap c (Gemma 2) turns a score s into c · tanh(s / c) before the mask.

On a GPU in half precision, the trainer's rows go through one kernel instead, and so does a prefill of the embedded
engine where flash attention has what the model needs (fused.py). The decode steps of that engine on a GPU have tables
of fixed sizes instead of blocks (decode.py).

Left out: dropout, attention sinks, biases. `tree_attention_forward` refuses them by name.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmrl.errors import ModelError
from vlmrl.models.attention.decode import DecodeRows, attend_decode
from vlmrl.models.attention.fused import Paths, attend_fused, attend_paths
from vlmrl.models.attention.plan import Blocks, LayerPlan, LocalBlock, SharedBlock, TreePlan

ATTENTION_NAME = "vlmrl_tree"


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge one block's normalized output into the running output, in place."""
    merged = torch.logaddexp(lse, block_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1)).add_(block_out.mul_((block_lse - merged).exp_().unsqueeze(-1)))
    lse.copy_(merged)


class _TreeAttention(torch.autograd.Function):
    """q [H, T, D], k [KV, S, D], v [KV, S, E] → [H, T, E]; heads of one key head stand next to each other
    (H = KV × G)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float, softcap: float | None
    ) -> Tensor:
        kv_heads, _, dim = v.shape
        heads, length, _ = q.shape
        group = heads // kv_heads
        dtype = q.dtype
        # Compute in float32 also for half-precision inputs: rounded scores would cause most of the mismatch between
        # sampler and trainer. From here on q has the dtype of the computation.
        q = q.to(torch.promote_types(dtype, torch.float32)) * scale
        out = q.new_empty(heads, length, dim)
        lse = q.new_empty(heads, length)
        for local in blocks.local:
            B, n = local.rows.shape
            scores, block_lse, total = _exponentiate(_local_scores(q, k, local, kv_heads, group, softcap)[0])
            values = v.index_select(1, local.slots.reshape(-1)).to(q.dtype).view(kv_heads * B, -1, dim)
            block_out = torch.bmm(scores.view(kv_heads * B, group * n, -1), values)
            block_out.div_(total.view(kv_heads * B, group * n, 1))
            block_out = block_out.view(kv_heads, B, group, n, dim).transpose(1, 2).reshape(heads, B * n, dim)
            flat_lse = block_lse.view(kv_heads, B, group, n).transpose(1, 2).reshape(heads, B * n)
            if local.valid is not None:
                block_out, flat_lse = block_out[:, local.valid], flat_lse[:, local.valid]
            out[:, local.valid_rows] = block_out
            lse[:, local.valid_rows] = flat_lse
        for shared in blocks.shared:
            scores, block_lse, total = _exponentiate(_shared_scores(q, k, shared, kv_heads, softcap)[0])
            if shared.mask is not None:
                total.clamp_(min=1.0)  # 0 for a row that sees none of the keys, and at least 1 for any other
            block_out = torch.bmm(scores, v[:, shared.slots].to(q.dtype)).div_(total.unsqueeze(-1))
            rows = shared.end - shared.start
            _merge(
                out[:, shared.start : shared.end],
                lse[:, shared.start : shared.end],
                block_out.view(heads, rows, dim),
                block_lse.view(heads, rows),
            )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale, ctx.softcap = blocks, scale, softcap
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        blocks, softcap = ctx.blocks, ctx.softcap
        kv_heads, _, dim = k.shape
        heads = q.shape[0]
        group = heads // kv_heads
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=q.dtype) for x in (q, k, v))
        dtype, grad_out = grad_out.dtype, grad_out.to(q.dtype).contiguous()
        delta = (grad_out * out).sum(-1)
        """[H, T]; the term of the score gradient that comes from the softmax's normalization."""
        for local in blocks.local:
            B, n = local.rows.shape
            flat_rows, flat_slots = local.rows.reshape(-1), local.slots.reshape(-1)

            def rowwise(x: Tensor, B: int = B, n: int = n, flat_rows: Tensor = flat_rows) -> Tensor:
                """[H, T, …] → [KV × B, G × n, …], one row per local query."""
                tail = x.shape[2:]
                x = x.index_select(1, flat_rows).view(kv_heads, group, B, n, *tail)
                return x.transpose(1, 2).reshape(kv_heads * B, group * n, *tail)

            probs, slope = _local_scores(q, k, local, kv_heads, group, softcap)
            probs = probs.view(kv_heads * B, group * n, -1)
            probs.sub_(rowwise(lse).unsqueeze(-1)).exp_()
            if local.valid is not None:
                live = torch.zeros(B * n, dtype=probs.dtype, device=probs.device)
                live[local.valid] = 1.0
                probs.view(kv_heads, B, group, n, -1).mul_(live.view(B, 1, n, 1))
            row_grad = rowwise(grad_out)
            keys = k.index_select(1, flat_slots).to(q.dtype).view(kv_heads * B, -1, dim)
            values = v.index_select(1, flat_slots).to(q.dtype).view(kv_heads * B, -1, v.shape[-1])
            grad_values = torch.bmm(probs.transpose(1, 2), row_grad)
            grad_scores = torch.bmm(row_grad, values.transpose(1, 2))
            grad_scores.sub_(rowwise(delta).unsqueeze(-1)).mul_(probs)
            if slope is not None:
                grad_scores.mul_(slope.view_as(grad_scores))
            grad_rows = torch.bmm(grad_scores, keys).view(kv_heads, B, group, n, dim).transpose(1, 2)
            grad_q.index_add_(1, flat_rows, grad_rows.reshape(heads, B * n, dim))
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), rowwise(q))
            grad_k.index_add_(1, flat_slots, grad_keys.view(kv_heads, -1, dim))
            grad_v.index_add_(1, flat_slots, grad_values.view(kv_heads, -1, v.shape[-1]))
        for shared in blocks.shared:
            rows = slice(shared.start, shared.end)

            def fold(x: Tensor, rows: slice = rows) -> Tensor:
                """[H, T, …] → [KV, G × rows, …]."""
                return x[:, rows].reshape(kv_heads, -1, *x.shape[2:])

            probs, slope = _shared_scores(q, k, shared, kv_heads, softcap)
            probs.sub_(fold(lse).unsqueeze(-1)).exp_()
            row_grad = fold(grad_out)
            grad_v.index_add_(1, shared.slots, torch.bmm(probs.transpose(1, 2), row_grad))
            grad_scores = torch.bmm(row_grad, v[:, shared.slots].to(q.dtype).transpose(1, 2))
            grad_scores.sub_(fold(delta).unsqueeze(-1)).mul_(probs)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_q[:, rows] += torch.bmm(grad_scores, k[:, shared.slots].to(q.dtype)).view(heads, -1, dim)
            grad_k.index_add_(1, shared.slots, torch.bmm(grad_scores.transpose(1, 2), fold(q)))
        return grad_q.mul_(ctx.scale).to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float, softcap: float | None) -> Tensor:
    """A compiled layer calls this as it is: it would be compiled again for each number of blocks."""
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _TreeAttention.apply(q, k, v, blocks, scale, softcap)  # type: ignore[no-untyped-call]
    return out


def _exponentiate(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[…, m] → exp(scores − their maximum), in place; log-sum-exp […]; sum of the exponentials […]. A row of −inf has
    exponentials of 0, the sum 0 and the log-sum-exp −inf.

    The caller divides its output by the sum, which is cheaper than dividing the scores: the output is narrower.
    """
    largest = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min)
    scores.sub_(largest.unsqueeze(-1)).exp_()
    total = scores.sum(-1)
    return scores, largest + total.log(), total


def _local_scores(
    q: Tensor, k: Tensor, block: LocalBlock, kv_heads: int, group: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[KV, B, G × n, m]; −inf where the query does not attend to the key; the slope of the soft cap, of as many
    elements, or None. `q` is scaled already."""
    B, n = block.rows.shape
    dim = q.shape[-1]
    queries = q.index_select(1, block.rows.reshape(-1)).view(kv_heads, group, B, n, dim).transpose(1, 2)
    keys = k.index_select(1, block.slots.reshape(-1)).to(q.dtype).view(kv_heads * B, -1, dim)
    scores = torch.bmm(queries.reshape(kv_heads * B, group * n, dim), keys.transpose(1, 2))
    slope = None if softcap is None else _cap(scores, softcap)
    scores.view(kv_heads, B, group, n, -1).masked_fill_(~block.mask[:, None], float("-inf"))
    return scores.view(kv_heads, B, group * n, -1), slope


def _shared_scores(
    q: Tensor, k: Tensor, block: SharedBlock, kv_heads: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[KV, G × rows, m], and the slope of the soft cap or None. `q` is scaled already."""
    queries = q[:, block.start : block.end].reshape(kv_heads, -1, q.shape[-1])
    scores = torch.bmm(queries, k[:, block.slots].to(q.dtype).transpose(1, 2))
    slope = None if softcap is None else _cap(scores, softcap)
    if block.mask is not None:
        scores.view(kv_heads, -1, *block.mask.shape).masked_fill_(~block.mask, float("-inf"))
    return scores, slope


def _cap(scores: Tensor, softcap: float) -> Tensor:
    """Replace each score s by c · tanh(s / c), in place → the derivative, 1 − tanh²(s / c)."""
    scores.div_(softcap).tanh_()
    slope = 1 - scores * scores
    scores.mul_(softcap)
    return slope


def tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tree_plan: TreePlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key [1, KV, T, D], value [1, KV, T, E] → [1, T, H, E].

    The rotary embedding has used the `position_ids` already. Raises `ModelError` for an argument that would change the
    result in a way that is not computed here.
    """
    if tree_plan is None or attention_mask is not None:
        what = "without the plan of the pass" if tree_plan is None else "with a mask of its own making"
        raise ModelError(
            f"{type(module).__name__} calls attention {what}, so the policy cannot tell which tokens attend to which: "
            "choose a model whose layers hand their arguments on and leave the mask to transformers"
        )
    assert dropout == 0.0, "attention dropout is not supported"
    _refuse_unknown(module, is_causal, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tree_plan.pool is not None and torch.compiler.is_compiling():
        return _attend_pool(query, key, value, scale, sliding_window, softcap), None
    plan = _plan_of_layer(module, tree_plan, sliding_window)
    return _attend_planned(query, key, value, tree_plan, plan, scale, softcap), None


_passes = threading.local()


@contextmanager
def passing(plan: TreePlan) -> Iterator[None]:
    """Compute a pass of `plan`, so that `_attend_pool` finds it."""
    before = getattr(_passes, "plan", None)
    _passes.plan = plan
    try:
        yield
    finally:
        _passes.plan = before


@torch.library.custom_op("vlmrl::attend_pool", mutates_args=())
def _attend_pool(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """query [1, H, T, D], key [1, KV, T, D], value [1, KV, T, E] → [1, T, H, E]; without gradient.

    A compiled layer of the embedded engine calls this operation, into which the compiler does not look: the layer is
    one graph then, and the same for all layers, although each has a pool of its own. An operation takes tensors and
    numbers only, so the plan waits in `passing`. Nothing else in a layer reads the pool that it writes to.
    """
    plan: TreePlan = _passes.plan
    return _attend_planned(query, key, value, plan, plan.by_window[window], scale, softcap)


@_attend_pool.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    _, heads, rows, _ = query.shape
    return query.new_empty(1, rows, heads, value.shape[-1])


def _attend_planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_plan: TreePlan,
    plan: LayerPlan,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention by `plan`, which is the layer's part of `tree_plan`; shapes as in `tree_attention_forward`."""
    if isinstance(plan, DecodeRows):
        assert tree_plan.row_slots is not None
        new, pool = (key[0], value[0]), tree_plan.next_pool()
        return attend_decode(query[0], new, pool, tree_plan.row_slots, plan, scale, softcap)[None]
    if isinstance(plan, Paths):
        assert softcap is None, "flash attention has no soft caps"
        return attend_paths(query[0], *tree_plan.write(key[0], value[0]), plan, scale)[None]
    if not isinstance(plan, Blocks):
        return attend_fused(query, key, value, plan, scale, softcap)
    q, k, v = query[0].contiguous(), key[0].contiguous(), value[0].contiguous()
    if tree_plan.pool is not None:
        k, v = tree_plan.write(k, v)
    out: Tensor = _attend(q, k, v, plan, scale, softcap)
    return out.transpose(0, 1).contiguous().unsqueeze(0)  # some families take a view of it


def _plan_of_layer(module: Any, plan: TreePlan, window: int | None) -> LayerPlan:
    """The plan for a layer whose attention was called with `window`.

    A compiled layer must not read its number: it would be compiled again for each layer. So the window is compared with
    the layer's rule only where nothing is compiled.
    """
    if window not in plan.by_window or (
        not torch.compiler.is_compiling()
        and len(plan.by_window) > 1
        and (rule := plan.rules.of_layer(module.layer_idx)) is not None
        and rule.window != window
    ):
        raise ModelError(
            f"{type(module).__name__} calls attention with sliding_window={window}, but the model's own mask has other "
            "windows there, so it is unclear which of the two counts: choose a model whose layers agree with its masks"
        )
    return plan.by_window[window]


def _refuse_unknown(module: Any, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Raise `ModelError` for arguments with a value that the kernels would ignore."""
    changing = {name: value for name, value in others.items() if value is not None and value is not False}
    if is_causal is False or getattr(module, "is_causal", True) is False:
        changing["is_causal"] = False
    if changing:
        name = "s_aux (attention sinks)" if "s_aux" in changing else ", ".join(sorted(changing))
        raise ModelError(
            f"{type(module).__name__} calls attention with {name}, which the policy does not compute, so its logprobs "
            "would not be the model's: choose a model with softmax attention over windows or all earlier tokens"
        )
