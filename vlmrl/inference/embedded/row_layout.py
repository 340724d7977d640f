"""How the rows of a batch are laid out in the tensors of a decode step, and what its steps have to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmrl.inference.embedded.decode_state import DecodeState, Room
from vlmrl.inference.embedded.kernels_ahead import OWN_SLOTS
from vlmrl.inference.embedded.prefill import DistinctPrompt
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.row_batch import RowBatch
from vlmrl.inference.embedded.sampled_row import SampledRow
from vlmrl.inference.embedded.sampling import Shape, shape_of
from vlmrl.inference.embedded.shared_prefixes import most_rows
from vlmrl.models.attention.decode import uses_kernels
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.models.policy import Policy

WHOLE = Shape(1.0, 0, 1.0, 0.0, False)
"""The whole vocabulary."""


def row_sizes(rows: int) -> int:
    """The size of a step for `rows` rows: a power of two, or one and a half of it. Each size is a CUDA graph. At least
    2, because layers would be compiled again for 1.

    >>> [row_sizes(n) for n in (1, 3, 7, 33, 80, 130, 256)]
    [2, 4, 8, 48, 96, 192, 256]
    """
    power = max(2, _power(rows))
    return power * 3 // 4 if power >= 32 and rows <= power * 3 // 4 else power


@dataclass(frozen=True)
class StepKind:
    """What decides about the work of a step and its addresses, besides its tensors."""

    rows: int
    shapes: tuple[Shape, ...]
    has_greedy: bool
    windows: tuple[int | None, ...]
    """Per rule of the model, its window; None where no row is as deep."""
    levels: int
    most_rows: int
    most_keys: int

    @property
    def reports_supports(self) -> bool:
        return any(shape.reports_support for shape in self.shapes)


def kind_of(batch: RowBatch, policy: Policy) -> StepKind:
    """The steps of a batch that is laid out."""
    shapes = [_truncation(row.request) for row in batch.rows]
    table = _table(batch)
    deepest = longest([row.request for row in batch.rows], batch.prompts, [row.prompt for row in batch.rows])
    return StepKind(
        rows=row_sizes(len(batch.rows)),
        shapes=tuple(dict.fromkeys(shapes)),
        has_greedy=any(row.request.sampling.temperature == 0 for row in batch.rows),
        windows=windows_at(policy, deepest),
        levels=batch.shared.levels,
        most_rows=most_rows(table),
        most_keys=1 if uses_kernels(policy.device) else _power(max(1, batch.shared.most_keys)),
    )


def room_for(batch: RowBatch, steps: int) -> Room:
    """The sizes that a batch takes, with `steps` between two readings."""
    rows, shared = batch.rows, batch.shared
    return Room(
        rows=row_sizes(len(rows)),
        own=OWN_SLOTS * (max(len(shared.private[row.prompt]) + len(row.slots) for row in rows) // OWN_SLOTS + 1),
        new=max(len(row.uniforms) for row in rows),
        stop_ids=max(1, *(len(row.request.sampling.stop_token_ids) for row in rows)),
        segments=max(1, len(_table(batch))),
        segment_slots=max(1, len(shared.slots)),
        steps=steps,
    )


def lay_out(state: DecodeState, batch: RowBatch, unread: int, states: Sequence[PrefixStates]) -> None:
    """Fill the tensors for the rows of a batch, all of which have sampled a token, or none of which have. `unread`: a
    slot that no row reads; `states`: of each row, empty for a model whose layers carry none."""
    rows, shared = batch.rows, batch.shared
    shapes = [_truncation(row.request) for row in rows]
    distinct = list(dict.fromkeys(shapes))
    own = [np.concatenate([shared.private[row.prompt], row.slots]) for row in rows]
    params = [row.request.sampling for row in rows]
    lengths = np.array([row.length for row in rows])
    private = np.array([len(shared.private[row.prompt]) for row in rows])
    prompts = [batch.prompts[row.prompt] for row in rows]
    state.unread_slot.fill_(unread)
    state.rows.own_slots.zero_()
    state.empty_rows(0, row_sizes(len(rows)))
    at = np.array([[each.next_text_position, each.next_position] for each in prompts])
    state.fill("position", at[:, [0, 1, 1, 1]] - 1 + lengths[:, None])
    state.fill("depth", np.array([len(each.keys) - 1 for each in prompts], np.int32) + lengths.astype(np.int32))
    state.fill("private", private)
    state.fill("alive", np.ones(len(rows), np.bool_))
    state.fill("limit", np.array([each.max_new_tokens for each in params]))
    state.fill("temperature", np.array([each.temperature or 1.0 for each in params], np.float32))
    state.fill("is_greedy", np.array([each.temperature == 0 for each in params]))
    state.fill("shape", np.array([distinct.index(shape) for shape in shapes]))
    state.fill("own_slots", _padded(own, 0).astype(np.int32))
    state.fill("stop_ids", _padded([np.array(each.stop_token_ids, np.int64) for each in params], -1))
    state.fill("uniforms", _padded([row.uniforms for row in rows], 0.0))
    if lengths.any():
        assert lengths.all(), "the newest token of a row is either in the cache or to be computed"
        state.fill("count", lengths)
        state.fill("token", np.array([row.newest for row in rows]))
        state.fill("own_length", (private + lengths).astype(np.int32))
        state.fill("slot", np.array([row.slots[row.length - 1] for row in rows]))
    if any(states):
        state.states.fill(states)
    state.segment_slots[: len(shared.slots)].copy_(torch.from_numpy(shared.slots))
    state.set_segments(_table(batch))
    _number(rows)


def move_to_front(state: DecodeState, batch: RowBatch, size: int) -> None:
    """Move the rows of a batch, which are still where they were, to the front of a step of `size` rows."""
    state.keep(np.array([row.at for row in batch.rows]))
    state.empty_rows(len(batch.rows), size)
    state.set_segments(_table(batch))
    _number(batch.rows)


def _number(rows: Sequence[SampledRow]) -> None:
    for index, row in enumerate(rows):
        row.at = index


def windows_at(policy: Policy, deepest: int) -> tuple[int | None, ...]:
    """Per rule of the model, its window; None where no row gets deeper than it."""
    windows = (rule.window for rule in policy.rules.distinct)
    return tuple(None if window is None or deepest <= window else window for window in windows)


def _table(batch: RowBatch) -> NDArray[np.int32]:
    return batch.shared.table(np.array([row.prompt for row in batch.rows]))


def longest(requests: Sequence[Request], prompts: Sequence[DistinctPrompt], request_prompt: Sequence[int]) -> int:
    """Tokens of the longest conversation that may come about."""
    pairs = zip(requests, request_prompt, strict=True)
    return max(len(prompts[prompt].keys) + request.sampling.max_new_tokens for request, prompt in pairs)


def _truncation(request: Request) -> Shape:
    """How the request truncates its distribution; one for all temperatures."""
    shape = shape_of(request.sampling)
    return replace(shape, temperature=1.0) if shape.truncates else WHOLE


def _padded(arrays: Sequence[NDArray[Any]], value: float) -> NDArray[Any]:
    """[n, longest] of `arrays`, filled up with `value`."""
    found = np.full((len(arrays), max(1, *map(len, arrays))), value, arrays[0].dtype)
    for row, array in zip(found, arrays, strict=True):
        row[: len(array)] = array
    return found


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
