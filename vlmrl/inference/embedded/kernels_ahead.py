"""Compiles the kernels of the first decode steps beside the prefill before them, which waits for compilers anyway.

Triton compiles a kernel for the sizes of its tiles and for numbers that are multiples of 16. So what a step will launch
is worked out from the prompts, and launched once on rows that have nothing to read. A wrong guess costs the time that
compiling takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from vlmrl.inference.embedded.prefill import DistinctPrompt, cut_segments
from vlmrl.inference.embedded.shared_prefixes import SharedPrefixes, most_rows
from vlmrl.models.attention.decode import SEGMENT_FIELDS, DecodeRows, DecodeTables, attend_decode
from vlmrl.models.attention.prefix_tree import build_tree
from vlmrl.models.policy import Policy

OWN_SLOTS = 16
"""Columns of the tables of own slots are a multiple of this, so that one code serves all lengths."""


@dataclass(frozen=True)
class StepShape:
    """What the kernels of a step are compiled for, besides the model."""

    rows: int
    levels: int
    """Levels of shared segments."""
    most_rows: int
    """See `DecodeTables`."""
    windows: tuple[int | None, ...]
    """See `DecodeRows`."""


def step_shape(
    prompts: Sequence[DistinctPrompt], request_prompt: Sequence[int], rows: int, windows: tuple[int | None, ...]
) -> StepShape:
    """The shape of the first step after the prefill of `prompts`. Sets their `segment`, as a prefill does."""
    tree = build_tree([prompt.keys for prompt in prompts])
    nowhere = np.full(tree.num_rows, -1)
    segments = cut_segments(tree, prompts, np.arange(tree.num_rows), nowhere, np.empty(0, np.int64))
    order = np.sort(request_prompt)
    shared = SharedPrefixes(prompts, segments, order.tolist())
    return StepShape(rows, shared.levels, most_rows(shared.table(order)), windows)


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer, all of one size."""

    query: int
    key: int
    size: int
    softcap: float | None
    """See `tree_attention_forward`."""


def heads_of(policy: Policy) -> Heads | None:
    """The heads of every layer; None where layers differ, or where the model's config does not say."""
    text = policy.config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # transformers refuses to say one number for all layers
        return None
    modules = list(policy.model.base_model.get_decoder().modules())
    sizes = {module.head_dim for module in modules if hasattr(module, "head_dim")}
    query = getattr(text, "num_attention_heads", None)
    key = getattr(text, "num_key_value_heads", None) or query
    if len(sizes) != 1 or any(hasattr(module, "v_head_dim") for module in modules):
        return None
    if not (isinstance(query, int) and isinstance(key, int) and query % key == 0):
        return None
    return Heads(query, key, sizes.pop(), getattr(text, "attn_logit_softcapping", None))


class KernelsAhead:
    """Compiles once, for a first batch."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._done: Future[None] | None = None

    def begin(self, shape: Callable[[], StepShape]) -> None:
        """Start compiling for steps of a shape; only the first call does something."""
        if self._done is None:
            executor = ThreadPoolExecutor(1, thread_name_prefix="kernels-ahead")
            self._done = executor.submit(launch_once, self._policy, shape())
            executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until they are compiled; raises what went wrong."""
        if self._done is not None:
            self._done.result()


def launch_once(policy: Policy, shape: StepShape) -> None:
    """Attention of a step whose rows have one key each, and whose only segment has no rows."""
    heads = heads_of(policy)
    if heads is None:
        return
    rows, device = shape.rows, policy.device

    def zeros(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            tables = DecodeTables(
                own_slots=zeros(rows, OWN_SLOTS),
                own_length=zeros(rows) + 1,
                depth=zeros(rows),
                segment_slots=zeros(1),
                segments=zeros(1, SEGMENT_FIELDS),
                levels=shape.levels,
                most_rows=shape.most_rows,
                most_keys=1,
            )
            query = zeros(heads.query, rows, heads.size, dtype=policy.dtype)
            key, value, pool = (zeros(heads.key, n, heads.size, dtype=policy.dtype) for n in (rows, rows, OWN_SLOTS))
            slots = zeros(rows, dtype=torch.int64)
            for window in dict.fromkeys(shape.windows):
                plan = DecodeRows(tables, window)
                attend_decode(query, (key, value), (pool, pool.clone()), slots, plan, 1.0, heads.softcap)
        except torch.OutOfMemoryError:
            return  # the step compiles them itself
