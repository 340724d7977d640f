"""Decoding on a GPU: one row per request, a step of fixed sizes, and a look at the results every 8 steps.

    state (decode_state.py) ─▶ embed ▶ layers ▶ norm ▶ head ▶ sample ─▶ state      one CUDA graph (step_graphs.py)
        every READ_EVERY steps: tokens and logprobs to the host, which reads them while the next steps run; finished
        rows leave, and if the others fit into a smaller size, they move to the front; requests that have come
        meanwhile may enter (row_batch.py), and all rows are laid out anew (row_layout.py)

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
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.completions import finish
from vlmrl.inference.embedded.decode_state import DecodeState, Results, Room
from vlmrl.inference.embedded.device_sampling import Draw, Final, draw_tokens
from vlmrl.inference.embedded.kernels_ahead import KernelsAhead, StepShape, step_shape
from vlmrl.inference.embedded.prefill import DistinctPrompt, Prefilled
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.row_batch import Company, Entering, RowBatch
from vlmrl.inference.embedded.row_layout import (
    StepKind,
    kind_of,
    lay_out,
    longest,
    move_to_front,
    room_for,
    row_sizes,
    windows_at,
)
from vlmrl.inference.embedded.sampled_row import SampledRow
from vlmrl.inference.embedded.sampling import not_finite
from vlmrl.inference.embedded.step_graphs import CompiledLayers, StepGraphs
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.attention.decode import DecodeRows, uses_kernels
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.models.attention.plan import KVPool, TreePlan
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.types import IntArray

READ_EVERY = 8
"""Steps between two readings. A row that ends is computed for less than twice as many steps more: the next ones have
begun when its end is read, so that the device never waits for the host."""


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


@dataclass(frozen=True, eq=False)
class _Call:
    """What stays the same while a batch is decoded."""

    version: int
    """Of the policy."""
    company: Company
    unread: int
    """A slot of the KV cache that no row reads."""


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
            windows = windows_at(self._model.policy, longest(requests, prompts, request_prompt))
            return step_shape(prompts, request_prompt, row_sizes(len(requests)), windows)

        if self._ahead is not None:
            self._ahead.begin(shape)

    def decode(self, version: int, entering: Entering, company: Company) -> int:
        """Sample the completions of requests, and of those that enter beside them, which `company` gets → the rows that
        were computed, of tokens that belong to a completion. Inside `running`."""
        if self._ahead is not None:
            self._ahead.wait()
        cache = self._model.kv_cache
        batch = self._batch(entering)
        call = _Call(version, company, int(cache.take(1)[0]))
        kind = self._begin(batch, entering.prefilled, call)
        fetched: _Fetched | None = self._fetch(batch.rows, 1)
        computed = 0
        while batch.rows:
            left = max(row.request.sampling.max_new_tokens - row.length for row in batch.rows)
            steps = min(READ_EVERY, left - (fetched.steps if fetched is not None else 0))
            for _ in range(steps):
                self._step(kind)
            ahead = self._fetch(batch.rows, steps)
            if fetched is not None:
                self._read(fetched)
            fetched = ahead
            computed += self._leave(batch, call)
            if (more := company.take(len(batch.rows))) is not None:
                self._read(fetched)
                fetched = None
                computed += self._leave(batch, call)
                batch, kind, rows = self._enter(batch, more, call)
                computed += rows
            elif batch.rows and row_sizes(len(batch.rows)) < kind.rows:
                kind = replace(kind, rows=row_sizes(len(batch.rows)))
                assert self._state is not None
                move_to_front(self._state, batch, kind.rows)
        cache.give_back(np.array([call.unread]))
        cache.give_back(_unused(batch.left))
        return computed

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

    def _batch(self, entering: Entering) -> RowBatch:
        """Rows for requests, with their slots."""

        def row(request: Request, prompt: int) -> SampledRow:
            slots = self._model.kv_cache.take(request.sampling.max_new_tokens - 1)
            return SampledRow(request, prompt, slots, self._text_of)

        return RowBatch.of(entering, row)

    def _begin(self, batch: RowBatch, prefilled: Prefilled, call: _Call) -> StepKind:
        """Lay out rows whose prompts have just been computed, and sample their first tokens."""
        prompts = [row.prompt for row in batch.rows]
        kind = self._prepare(batch, [prefilled.states[prompt] for prompt in prompts], call)
        first = prefilled.hidden[torch.tensor(prompts, device=prefilled.hidden.device)]
        padding = first.new_zeros(kind.rows - len(prompts), first.shape[1])
        self._sample(torch.cat([first, padding]), kind)
        return kind

    def _enter(self, batch: RowBatch, entering: Entering, call: _Call) -> tuple[RowBatch, StepKind, int]:
        """Have requests enter a batch of which nothing is on its way to the host → the new batch, laid out, and the
        rows of completions that have ended already. Those that enter sample their first tokens by themselves."""
        states = self._states_of(batch.rows)
        fresh, prefilled = self._batch(entering), entering.prefilled
        states |= {id(row): prefilled.states[row.prompt] for row in fresh.rows}
        kind = self._begin(fresh, prefilled, call)
        fetched = self._fetch(fresh.rows, 1)
        joined = batch.joined(fresh)  # while the device computes
        self._read(fetched)
        computed = self._leave(joined, call)
        # No step computes what has left, from here on.
        self._model.kv_cache.give_back(_unused([*batch.left, *joined.left]))
        joined.left = []
        if joined.rows:
            kind = self._prepare(joined, [states[id(row)] for row in joined.rows], call)
        return joined, kind, computed

    def _states_of(self, rows: Sequence[SampledRow]) -> dict[int, PrefixStates]:
        """Copies of the states of rows, by their ids; empty for a model whose layers carry none."""
        if not (self._model.policy.is_recurrent and rows):
            return {id(row): {} for row in rows}
        assert self._state is not None
        copies = self._state.states.of([row.at for row in rows])
        return {id(row): each for row, each in zip(rows, copies, strict=True)}

    def _leave(self, batch: RowBatch, call: _Call) -> int:
        """Hand over the completions that have ended → their rows."""
        ended = batch.take_ended()
        for row in ended:
            prompt, slots = batch.prompts[row.prompt], batch.slots[row.prompt]
            call.company.ended(row.request, finish(row.request, call.version, prompt, slots, row.sampled()))
        return sum(row.length - 1 for row in ended)

    def _prepare(self, batch: RowBatch, states: Sequence[PrefixStates], call: _Call) -> StepKind:
        """Fill the tensors for a batch whose rows have these `states`."""
        state = self._roomy_state(room_for(batch, READ_EVERY))
        lay_out(state, batch, call.unread, states)
        return kind_of(batch, self._model.policy)

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

    def _step(self, kind: StepKind) -> None:
        """Compute the newest tokens and sample the next ones."""
        if kind.reports_supports:  # sizes of supports are read at once, which no graph can do
            self._sample(self._hidden(kind), kind)
        else:
            assert self._state is not None
            code = replace(kind, most_keys=0), self._state.room
            self._graphs.run(kind, code, lambda: self._sample(self._hidden(kind), kind))

    def _hidden(self, kind: StepKind) -> Tensor:
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

    def _sample(self, hidden: Tensor, kind: StepKind) -> None:
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


def _unused(rows: Sequence[SampledRow]) -> IntArray:
    """The slots behind the completions of finished rows."""
    return np.concatenate([np.empty(0, np.int64), *(row.unused_slots for row in rows)])
