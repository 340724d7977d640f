"""How many slots the KV cache of the embedded engine has on a GPU: as many as a batch takes, if memory allows.

    free memory = [ KV cache: slots × bytes of a slot ][ working memory: logits of the rows ][ rest ]

A batch that needs more slots than that is decoded in several parts, one after the other. The run and `dry_run` use
these functions, so that both say the same number; this file imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.errors import EngineError

PASS_ROWS = 24576
"""New tokens of a pass of prefill."""

LOGIT_COPIES = 2
"""Arrays of logits of all rows: one is left from the step before the capture, one belongs to the CUDA graph."""

WORKING_BYTES = 4 * 10**9
"""What a pass of prefill (prefill_chunks.py) and the attention of decode steps take besides, but at most a quarter of
the free memory, because small models on small GPUs take less. It is what a pool leaves, and more than a known model
needs: see `prefill_bytes`."""

STATE_COPIES = 2
"""States of layers that carry one: of the rows that are decoded, and of those that have ended."""

KEPT_SHARE = 0.05
"""Share of the free memory that the KV cache leaves: large blocks do not fit into every gap."""


def slot_bytes(layers: int, kv_heads: int, head_dim: int, bytes_each: int) -> int:
    """Bytes of one token's keys and values in all layers, for models whose layers are alike."""
    return 2 * layers * kv_heads * head_dim * bytes_each


def batch_slots(prompt_tokens: int, new_tokens: Sequence[int]) -> int:
    """Slots for distinct prompts of so many tokens together, and for requests that sample up to `new_tokens` each. The
    last token of an answer is never an input, and one slot is not read by anyone.

    >>> batch_slots(16 * 1043, [512] * 256)
    147505
    """
    return prompt_tokens + sum(tokens - 1 for tokens in new_tokens) + 1


def logits_bytes(rows: int, vocabulary: int) -> int:
    """Bytes of the logits while `rows` rows are decoded."""
    return LOGIT_COPIES * 4 * rows * vocabulary


def prefill_bytes(new_tokens: int, hidden: int, intermediate: int, bytes_each: int) -> int:
    """Bytes of a pass of prefill: the MLP of a layer and its residual stream. A 2B took 0.65 GiB for 16,384 tokens on
    an H200.

    >>> prefill_bytes(16_384, 2048, 6144, 2) / 2**30
    0.6875
    """
    return min(new_tokens, PASS_ROWS) * (2 * hidden + 3 * intermediate) * bytes_each


def states_bytes(rows: int, state_bytes: int) -> int:
    """Bytes of the states while `rows` rows are decoded, each of which has states of `state_bytes`."""
    return STATE_COPIES * rows * state_bytes


def working_bytes(rows: int, vocabulary: int, state_bytes: int = 0) -> int:
    """Bytes that a pool leaves for decoding `rows` rows."""
    return WORKING_BYTES + logits_bytes(rows, vocabulary) + states_bytes(rows, state_bytes)


def affordable_slots(free: int, slot_bytes: int, rows: int, vocabulary: int, state_bytes: int = 0) -> int:
    """Slots for which `free` bytes have room; 0 where the working memory alone does not fit.

    >>> affordable_slots(80 * 10**9, 114_688, 256, 151_936)
    625077
    """
    working = working_bytes(rows, vocabulary, state_bytes) - max(0, WORKING_BYTES - free // 4)
    return max(0, int((1 - KEPT_SHARE) * free) - working) // slot_bytes


def parts(prompts: Sequence[int], further: Sequence[int], new: Sequence[int], limit: int) -> list[int]:
    """Cut a batch into parts of at most `limit` slots → the number of requests of each part.

    Per request, in an order in which equal prompts stand together: the tokens of its prompt; those that the prompt of
    the request before it does not have; and the tokens that it samples at most.

    Raises `EngineError` where one request alone takes more.

    >>> parts([10, 10, 10, 12], [10, 0, 0, 5], [6, 6, 6, 6], 21)
    [2, 1, 1]
    """
    counts: list[int] = []
    taken = limit
    for prompt, rest, tokens in zip(prompts, further, new, strict=True):
        if counts and taken + rest + tokens - 1 <= limit:
            counts[-1] += 1
            taken += rest + tokens - 1
            continue
        counts.append(1)
        taken = batch_slots(prompt, [tokens])
        if taken > limit:
            raise EngineError(
                f"the GPU's free memory holds {limit:,} tokens of the KV cache, and one prompt of {prompt:,} tokens "
                f"with max_new_tokens={tokens} takes {taken:,}: lower orchestrator.max_new_tokens or the prompt, or "
                "leave more memory to the engine (trainer.optimizer=adamw_8bit, trainer.cpu_offload=true)"
            )
    return counts
