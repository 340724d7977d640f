"""Decoding on a GPU: one row per request, a step of fixed sizes, and a look at the results every 8 steps.

    state (decode_state.py) ─▶ embed ▶ layers ▶ norm ▶ head ▶ sample ─▶ state      one CUDA graph (step_graphs.py)
        every READ_EVERY steps: tokens and logprobs to the host, which reads them while the next steps run; finished
        rows leave, and if the others fit into a smaller size, they move to the front

Siblings read the keys and values of their prompt once (shared_prefixes.py, models/attention/decode.py). Each sampled
token is drawn by the same uniform number as in decoding.py, which stays the reference: with float32 on a CPU the tokens
are the same. There, requests that have sampled the same tokens share a row; here each has its own.

Layers that carry a state (models/attention/recurrent.py) have it per row in tensors, too
(models/attention/row_states.py): siblings start from copies of the state after their prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.completions import finish
from vlmrl.inference.embedded.decode_state import DecodeState, Results, Room
from vlmrl.inference.embedded.device_sampling import Draw, Final, draw_tokens
from vlmrl.inference.embedded.kernels_ahead import OWN_SLOTS, KernelsAhead, StepShape, step_shape
from vlmrl.inference.embedded.prefill import DistinctPrompt, Prefilled
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.sampled_row import SampledRow
from vlmrl.inference.embedded.sampling import Shape, not_finite, shape_of
from vlmrl.inference.embedded.shared_prefixes import SharedPrefixes, most_rows
from vlmrl.inference.embedded.step_graphs import CompiledLayers, StepGraphs
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.attention.decode import DecodeRows, uses_kernels
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.models.attention.plan import KVPool, TreePlan
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.types import Completion, IntArray

READ_EVERY = 8
"""Steps between two readings. A row that ends is computed for less than twice as many steps more: the next ones have
begun when its end is read, so that the device never waits for the host."""

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
class _Kind:
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


@dataclass(frozen=True, eq=False)
class _Fetched:
    """The results of some steps, on their way to the host."""

    rows: Sequence[SampledRow]
    """Those that the steps computed."""
    at: IntArray
    """int64 [n]; where each of them was."""
    steps: int
    results: Results
    supports: Sequence[Sequence[NDArray[np.int32] | None]]
    """Per step, the support of each row; empty where none is reported."""


class RowDecoder:
    """Decodes the batches of one policy."""

    def __init__(self, model: CachedPolicy, text_of: TextOf | None = None) -> None:
        """`text_of` is needed for stop strings only."""
        self._model, self._text_of = model, text_of
        self._graphs = StepGraphs(model.device)
        self._state: DecodeState | None = None
        self._version = -1
        """Policy version whose weights the graphs read."""
        self._pool: ReferenceType[KVPool] | None = None
        """The KV pool whose addresses the graphs hold; weak, because its memory is given back."""
        self._layers: CompiledLayers | None = None
        self._ahead: KernelsAhead | None = None
        if uses_kernels(model.device):  # Triton is needed for both
            self._layers = CompiledLayers(model.policy.model.base_model.get_decoder())
            self._ahead = KernelsAhead(model.policy)
        self._supports: list[list[NDArray[np.int32] | None]] = []
        """Per step since the last reading, the support of each row; empty lists where none is reported."""

    def release(self) -> None:
        """Give the memory of the steps to the trainer."""
        self._graphs.clear()
        self._state, self._pool = None, None

    def compile_ahead(
        self, requests: Sequence[Request], prompts: Sequence[DistinctPrompt], request_prompt: Sequence[int]
    ) -> None:
        """Call it before the prefill of a batch: compile beside it what its steps will need, if nothing has yet."""

        def shape() -> StepShape:
            windows = self._windows(_deepest(requests, prompts, request_prompt))
            return step_shape(prompts, request_prompt, row_sizes(len(requests)), windows)

        if self._ahead is not None:
            self._ahead.begin(shape)

    def decode(
        self,
        version: int,
        requests: Sequence[Request],
        prompts: Sequence[DistinctPrompt],
        request_prompt: Sequence[int],
        prefilled: Prefilled,
    ) -> tuple[list[Completion], int]:
        """See `decoding.decode`; inside `running`. The rows that it counts are those of tokens that belong to a
        completion."""
        if self._ahead is not None:
            self._ahead.wait()
        cache = self._model.kv_cache
        order = np.argsort(request_prompt, kind="stable").tolist()
        rows = [
            SampledRow(
                requests[number],
                number,
                request_prompt[number],
                cache.take(requests[number].sampling.max_new_tokens - 1),
                self._text_of,
            )
            for number in order
        ]
        unread = cache.take(1)
        shared = SharedPrefixes(prompts, prefilled.segments, [row.prompt for row in rows])
        self._sample_all(rows, prompts, shared, prefilled, int(unread[0]))
        cache.give_back(np.concatenate([unread, *(row.unused_slots for row in rows)]))
        found: list[Completion | None] = [None] * len(requests)
        for row in rows:
            prompt = prompts[row.prompt]
            found[row.number] = finish(row.request, version, prompt, prefilled.slots[row.prompt], row.sampled())
        return [each for each in found if each is not None], sum(row.length - 1 for row in rows)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Layers as prefill and steps run them: on a GPU compiled once for both, which rounds as the trainer's compiled
        layers do, else as they are. Triton's kernels run on the current device, which may be another one in a new
        thread."""
        device = self._model.device
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            uncompiled_in_inference() if self._layers is None else self._layers.running(),
        ):
            yield

    def _sample_all(
        self,
        rows: list[SampledRow],
        prompts: Sequence[DistinctPrompt],
        shared: SharedPrefixes,
        prefilled: Prefilled,
        unread: int,
    ) -> None:
        """Sample until all rows are finished."""
        kind = self._prepare(rows, prompts, shared, prefilled.states, unread)
        first = prefilled.hidden[torch.tensor([row.prompt for row in rows], device=prefilled.hidden.device)]
        padding = first.new_zeros(kind.rows - len(rows), first.shape[1])
        self._sample(torch.cat([first, padding]), kind)
        fetched = self._fetch(rows, 1)
        while rows:
            left = max(row.request.sampling.max_new_tokens - row.length for row in rows) - fetched.steps
            steps = min(READ_EVERY, left)
            for _ in range(steps):
                self._step(kind)
            ahead = self._fetch(rows, steps)
            self._read(fetched)
            rows, fetched = [row for row in rows if not row.is_finished], ahead
            if rows and row_sizes(len(rows)) < kind.rows:
                kind = replace(kind, rows=row_sizes(len(rows)))
                self._move(rows, shared, kind.rows)

    def _prepare(
        self,
        rows: Sequence[SampledRow],
        prompts: Sequence[DistinctPrompt],
        shared: SharedPrefixes,
        states: Sequence[PrefixStates],
        unread: int,
    ) -> _Kind:
        """Fill the tensors for the batch, before its first token is sampled."""
        shapes = [_truncation(row.request) for row in rows]
        distinct = tuple(dict.fromkeys(shapes))
        own = [np.concatenate([shared.private[row.prompt], row.slots]) for row in rows]
        table = shared.table(np.array([row.prompt for row in rows]))
        size = row_sizes(len(rows))
        state = self._roomy_state(
            Room(
                rows=size,
                own=OWN_SLOTS * (max(map(len, own)) // OWN_SLOTS + 1),
                new=max(len(row.uniforms) for row in rows),
                stop_ids=max(1, *(len(row.request.sampling.stop_token_ids) for row in rows)),
                segments=max(1, len(table)),
                segment_slots=max(1, len(shared.slots)),
                steps=READ_EVERY,
            )
        )
        params = [row.request.sampling for row in rows]
        state.unread_slot.fill_(unread)
        state.rows.own_slots.zero_()
        state.empty_rows(0, size)
        at = np.array([[prompts[row.prompt].next_text_position, prompts[row.prompt].next_position] for row in rows])
        state.fill("position", at[:, [0, 1, 1, 1]] - 1)
        state.fill("depth", np.array([len(prompts[row.prompt].keys) - 1 for row in rows], np.int32))
        state.fill("private", np.array([len(shared.private[row.prompt]) for row in rows]))
        state.fill("alive", np.ones(len(rows), np.bool_))
        state.fill("limit", np.array([each.max_new_tokens for each in params]))
        state.fill("temperature", np.array([each.temperature or 1.0 for each in params], np.float32))
        state.fill("is_greedy", np.array([each.temperature == 0 for each in params]))
        state.fill("shape", np.array([distinct.index(shape) for shape in shapes]))
        state.fill("own_slots", _padded(own, 0).astype(np.int32))
        state.fill("stop_ids", _padded([np.array(each.stop_token_ids, np.int64) for each in params], -1))
        state.fill("uniforms", _padded([row.uniforms for row in rows], 0.0))
        if self._model.policy.is_recurrent:
            state.states.fill([states[row.prompt] for row in rows])
        state.segment_slots[: len(shared.slots)].copy_(torch.from_numpy(shared.slots))
        state.set_segments(table)
        deepest = _deepest([row.request for row in rows], prompts, [row.prompt for row in rows])
        for index, row in enumerate(rows):
            row.at = index
        return _Kind(
            rows=size,
            shapes=distinct,
            has_greedy=any(each.temperature == 0 for each in params),
            windows=self._windows(deepest),
            levels=shared.levels,
            most_rows=most_rows(table),
            most_keys=1 if uses_kernels(self._model.device) else _power(max(1, shared.most_keys)),
        )

    def _windows(self, deepest: int) -> tuple[int | None, ...]:
        """Per rule of the model, its window; None where no row gets deeper than it."""
        windows = (rule.window for rule in self._model.policy.rules.distinct)
        return tuple(None if window is None or deepest <= window else window for window in windows)

    def _roomy_state(self, room: Room) -> DecodeState:
        """The tensors, with room for a batch. Graphs that hold other addresses are dropped."""
        version, pool = self._model.version, self._model.kv_cache.pool
        have = self._state.room if self._state is not None else room
        if self._state is None or have.with_at_least(room) != have:
            self._graphs.clear()
            self._state = DecodeState(have.with_at_least(room), self._model.device)
        if version != self._version or self._pool is None or self._pool() is not pool:
            self._graphs.clear()
            self._version, self._pool = version, ref(pool)
        return self._state

    def _move(self, rows: Sequence[SampledRow], shared: SharedPrefixes, size: int) -> None:
        """Move `rows`, which are not finished, to the front of a step of `size` rows."""
        assert self._state is not None
        self._state.keep(np.array([row.at for row in rows]))
        self._state.empty_rows(len(rows), size)
        self._state.set_segments(shared.table(np.array([row.prompt for row in rows])))
        for index, row in enumerate(rows):
            row.at = index

    def _step(self, kind: _Kind) -> None:
        """Compute the newest tokens and sample the next ones."""
        if kind.reports_supports:  # sizes of supports are read at once, which no graph can do
            self._sample(self._hidden(kind), kind)
        else:
            assert self._state is not None
            code = replace(kind, most_keys=0), self._state.room
            self._graphs.run(kind, code, lambda: self._sample(self._hidden(kind), kind))

    def _hidden(self, kind: _Kind) -> Tensor:
        """The hidden states of the newest tokens, float [R, hidden]."""
        assert self._state is not None
        policy, state, size = self._model.policy, self._state, kind.rows
        tables = state.tables(size, kind.levels, kind.most_rows, kind.most_keys)
        rules = zip(policy.rules.distinct, kind.windows, strict=True)
        plan = TreePlan(
            policy.rules,
            {rule.window: DecodeRows(tables, window) for rule, window in rules},
            self._model.kv_cache.pool,
            row_slots=state.rows.slot[:size],
            row_states=state.states if policy.is_recurrent else None,
        )
        nothing = state.types[:0]
        rows = state.rows
        position = rows.position[:size].t().contiguous()  # as in a prefill, whose compiled layers these are
        return policy.hidden_states(rows.token[:size], position, state.types[:size], plan, None, nothing)

    def _sample(self, hidden: Tensor, kind: _Kind) -> None:
        """Draw a token per row from hidden states float [R, hidden], and advance the rows that go on."""
        assert self._state is not None
        state, rows, size = self._state, self._state.rows, kind.rows
        count, alive = rows.count[:size], rows.alive[:size]
        uniforms = rows.uniforms[:size].gather(1, count.clamp(max=state.room.new - 1)[:, None])[:, 0]
        policy = self._model.policy
        final = Final(policy.banned, rows.temperature[:size, None], policy.logit_map)
        how = Draw(final, uniforms, rows.is_greedy[:size], rows.shape[:size], kind.shapes, kind.has_greedy)
        token, logprob, supports = draw_tokens(policy.raw_logits(hidden), how)
        self._supports.append(supports)
        state.sampled[:, :size].index_copy_(0, state.steps, token[None])
        state.logprobs[:, :size].index_copy_(0, state.steps, logprob[None])
        state.steps.add_(1)
        count.add_(alive)
        alive.logical_and_((rows.stop_ids[:size] != token[:, None]).all(1)).logical_and_(count < rows.limit[:size])
        rows.token[:size].copy_(torch.where(alive, token, 0))
        rows.position[:size].add_(alive[:, None])
        rows.depth[:size].add_(alive)
        rows.own_length[:size].copy_(torch.where(alive, rows.private[:size] + count, 1))
        last = rows.own_slots[:size].gather(1, (rows.own_length[:size] - 1)[:, None].long())[:, 0]
        rows.slot[:size].copy_(torch.where(alive, last, state.unread_slot))

    def _fetch(self, rows: Sequence[SampledRow], steps: int) -> _Fetched:
        """Send the results of the last `steps` steps to the host, without waiting for them."""
        assert self._state is not None
        supports, self._supports = self._supports[-steps:], []
        return _Fetched(rows, np.array([row.at for row in rows]), steps, self._state.fetch(steps), supports)

    def _read(self, fetched: _Fetched) -> None:
        """Hand the results to the rows that were not finished before.

        Raises `NonFiniteLossError` where a probability is NaN or infinite.
        """
        going = [index for index, row in enumerate(fetched.rows) if not row.is_finished]
        rows, at = [fetched.rows[index] for index in going], fetched.at[going]
        token_ids, logprobs, count, alive = fetched.results.arrays()
        new = count[at] - np.array([row.length for row in rows])
        if not np.isfinite(logprobs[at][np.arange(fetched.steps) < new[:, None]]).all():
            raise not_finite(self._model.version)
        for row, place, more in zip(rows, at.tolist(), new.tolist(), strict=True):
            own = [of_step[place] for of_step in fetched.supports if of_step]
            row.add(token_ids[place, :more], logprobs[place, :more], own[:more], has_ended=not alive[place])
        if self._model.policy.is_recurrent:
            self._take_states([row for row in rows if row.is_finished])

    def _take_states(self, ended: Sequence[SampledRow]) -> None:
        """Give rows that have just ended their states. The device went on behind a stop string, so there is none."""
        assert self._state is not None
        known = [row for row in ended if not row.has_stop_string]
        copies = self._state.states.of([row.at for row in known]) if known else []
        for row in ended:
            row.states = None
        for row, states in zip(known, copies, strict=True):
            row.states = states


def _deepest(requests: Sequence[Request], prompts: Sequence[DistinctPrompt], request_prompt: Sequence[int]) -> int:
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
