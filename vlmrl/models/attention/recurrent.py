"""Layers that carry a state from token to token, over a prefix tree: a segment starts from its parent's end state.

    S S S a b      [S S S] ─ state ─┬─▶ [a] ─ state ─┬─▶ [b]
    S S S a c                       │                └─▶ [c]
    S S S d                         └─▶ [d]

A state is what the layer's own forward hands to the cache of transformers: the window of its causal convolution, and
the recurrent state where there is one. `share_states` replaces the forward of every layer that does so. Nothing names a
family: gated delta nets and short convolutions differ in what they compute, which is their own code. The replacement
calls it once per group of equally long pieces, with a stand-in for the cache, so nothing is padded, and gradients flow
through the states: the gradient of a state is the sum over the branches that start from it.

A layer is accepted only where its forward continues from a state as if it had seen the tokens at once; `share_states`
tries that on random tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmrl.errors import ModelError
from vlmrl.models.attention.delta_rule import keep_references
from vlmrl.models.attention.layer_cache import LayerCache, PrefixStates, State
from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.attention.row_step import shifts_windows
from vlmrl.models.features import to_device

WHOLE_CHUNKS = 64
"""Tokens that chunked kernels compute at once; a shorter piece is padded by the kernel itself. A segment is cut into
pieces of this many tokens times a power of two, and a rest, so that segments of different lengths share calls."""

PROBE_LENGTHS = (2, 1, 66)
"""Pieces of the random tokens that a layer is tried on: shorter than a convolution, one token, and longer than a
chunk."""

PROBE_TOLERANCE = 1e-3
HALF_PROBE_TOLERANCE = 0.03
"""Largest difference, relative to the output's norm, between the pieces and the whole: in float32, and in the layer's
own half precision, in which kernels of other packages compute."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """Neighboring rows of one segment."""

    rows: range
    before: int
    """Index of the piece whose end state it starts from; −1 where there is none in this pass."""
    start: PrefixStates | None
    """States of an earlier pass that it starts from."""
    level: int
    """Pieces before it on its path."""
    ends: int
    """Segment that ends with this piece; −1 where the piece is followed by another of its segment."""


@dataclass(eq=False)
class StatePlan:
    """In which order the pieces of a pass are computed, and the states it starts from and ends in."""

    pieces: list[_Piece]
    groups: list[list[int]]
    """Indices of pieces of one length that are computed together. A piece comes after the one before it."""
    order: Tensor
    """int64 [T]; the rows in the order of the groups."""
    inverse: Tensor
    """int64 [T]; where each row stands in `order`."""
    continued: frozenset[int]
    """Pieces from whose end another piece starts."""
    kept: frozenset[int]
    """Segments whose end states are kept in `ends`."""
    ends: dict[int, PrefixStates] = field(default_factory=dict)
    """Segment → the states after it, filled by the pass."""


def plan_states(
    segments: Sequence[Segment],
    device: torch.device,
    starts: Mapping[int, PrefixStates] | None = None,
    kept: Sequence[int] = (),
) -> StatePlan:
    """The order of a pass over `segments` (parents first).

    `starts`: segment → states of an earlier pass that it starts from, for a segment whose parent has no rows in this
    pass. The end states of the `kept` segments are left in the plan.
    """
    pieces: list[_Piece] = []
    last_piece: dict[int, int] = {}
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for number, segment in enumerate(segments):
        if not len(segment.rows):
            continue
        start = (starts or {}).get(number)
        before = last_piece[segment.parent] if start is None and segment.parent >= 0 else -1
        lengths = piece_lengths(len(segment.rows))
        row = int(segment.rows[0])
        for index, length in enumerate(lengths):
            level = pieces[before].level + 1 if before >= 0 else 0
            ends = number if index == len(lengths) - 1 else -1
            groups.setdefault((level, length, before >= 0 or start is not None), []).append(len(pieces))
            pieces.append(_Piece(range(row, row + length), before, start, level, ends))
            before, start, row = len(pieces) - 1, None, row + length
        last_piece[number] = before
    ordered = [groups[key] for key in sorted(groups)]
    order = np.array([row for group in ordered for piece in group for row in pieces[piece].rows], np.int64)
    return StatePlan(
        pieces,
        ordered,
        order=to_device(order, device),
        inverse=to_device(np.argsort(order), device),
        continued=frozenset(piece.before for piece in pieces),
        kept=frozenset(kept),
    )


def piece_lengths(length: int) -> list[int]:
    """Cut `length` tokens into pieces: whole chunks by powers of two, then the rest.

    >>> piece_lengths(300), piece_lengths(64), piece_lengths(5)
    ([256, 44], [64], [5])
    """
    pieces = []
    while length >= WHOLE_CHUNKS:
        pieces.append(WHOLE_CHUNKS << ((length // WHOLE_CHUNKS).bit_length() - 1))
        length -= pieces[-1]
    return [*pieces, length] if length else pieces


class SharedStates:
    """Replaces the forward of one layer that carries a state."""

    def __init__(self, mixer: Any, number: int) -> None:
        self._own, self._number = mixer.forward, number
        self._cache = _cache_argument(mixer)
        self._shifts_in_place = shifts_windows(mixer)
        self._name = type(mixer).__name__
        self.plan: Any = None
        """The `TreePlan` of the pass, which the block around the layer got; not every block passes it on."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, hidden_states: Tensor, *args: Any, tree_plan: Any = None, **kwargs: Any) -> Any:
        """hidden_states [1, T, hidden] → [1, T, hidden]. Without a plan, the layer's own forward."""
        plan, self.plan = self.plan, None
        if plan is None:
            return self._own(hidden_states, *args, **kwargs)
        kwargs.pop(self._cache, None)
        self._refuse_rows(kwargs)
        if plan.row_states is not None:
            rows = hidden_states.transpose(0, 1)
            stepped = plan.row_states.step(
                self._number,
                len(rows),
                lambda cache: self._own(rows, **{**kwargs, self._cache: cache}),
                shifts_in_place=self._shifts_in_place,
            )
            return stepped.transpose(0, 1)
        if plan.states is None:
            plan.states = plan_states(plan.segments, hidden_states.device)
        return self.run(hidden_states[0], plan.states, kwargs)[None]

    def _refuse_rows(self, kwargs: Mapping[str, Any]) -> None:
        """Raise `ModelError` for tensors: they would have to be cut with the rows, and it is unclear how."""
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor | tuple)]
        if tensors:
            raise ModelError(
                f"{self._name}, a layer that carries a state, also takes {', '.join(tensors)}, which the policy cannot "
                "cut where branches start: choose a model whose recurrent layers read hidden states only"
            )

    def run(self, rows: Tensor, plan: StatePlan, kwargs: Mapping[str, Any]) -> Tensor:
        """rows [T, hidden] → [T, hidden]."""
        rows = rows.index_select(0, plan.order)
        outputs: list[Tensor] = []
        states: dict[int, State] = {}
        done = 0
        for group in plan.groups:
            pieces = [plan.pieces[index] for index in group]
            length = len(pieces[0].rows)
            cache = LayerCache.of(self._before(pieces, states))
            batch = rows[done : done + len(group) * length].view(len(group), length, -1)
            outputs.append(self._own(batch, **{**kwargs, self._cache: cache}).reshape(len(group) * length, -1))
            done += len(group) * length
            wanted = [
                piece.ends in plan.kept or index in plan.continued for index, piece in zip(group, pieces, strict=True)
            ]
            if any(wanted):
                states |= {
                    i: state for i, state, is_wanted in zip(group, cache.after(), wanted, strict=True) if is_wanted
                }
        for index, state in states.items():
            if (segment := plan.pieces[index].ends) in plan.kept:
                plan.ends.setdefault(segment, {})[self._number] = state
        return torch.cat(outputs).index_select(0, plan.inverse)

    def _before(self, pieces: Sequence[_Piece], states: Mapping[int, State]) -> list[State]:
        """The states that a group starts from; empty where it starts from none."""
        before = []
        for piece in pieces:
            if piece.before >= 0:
                before.append(states[piece.before])
            elif piece.start is not None:
                before.append(piece.start[self._number])
        return before


class _HandPlan:
    """A hook of a block: hands the plan of the pass to the layers in it."""

    def __init__(self, layers: Sequence[SharedStates]) -> None:
        self._layers = layers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for layer in self._layers:
            layer.plan = kwargs.get("tree_plan")


def share_states(decoder: Any, hidden_size: int, stateful: Mapping[int, str]) -> bool:
    """Have the layers of `decoder` that carry a state start from the states of a `TreePlan` → whether there are any.
    May be called twice. `stateful`: index and kind of the layers that are not softmax attention.

    Raises `ModelError` for a layer that cannot continue from a state.
    """
    number = 0
    tried: set[type] = set()
    blocks = [block for block in decoder.modules() if isinstance(block, GradientCheckpointingLayer)]
    for index, block in enumerate(blocks):
        mixers: list[Any] = [module for module in block.modules() if _hands_over_states(type(module))]
        if not mixers and index in stateful:
            _refuse_hidden_state(block, stateful[index])
        added: list[SharedStates] = []
        for mixer in mixers:
            if not isinstance(mixer.forward, SharedStates):
                if type(mixer) not in tried:
                    keep_references(mixer)
                    own = next(mixer.parameters()).dtype
                    for dtype in (torch.float32, own) if own.itemsize == 2 else (torch.float32,):
                        _try(mixer, hidden_size, dtype)
                    tried.add(type(mixer))
                added.append(SharedStates(mixer, number))
                mixer.forward = added[-1]
            number += 1
        if added:
            block.register_forward_pre_hook(_HandPlan(added), with_kwargs=True)
    return number > 0


def _refuse_hidden_state(block: Any, kind: str) -> None:
    """Raise `ModelError` for a block without softmax attention in which a layer keeps its state in a way of its own."""
    for module in block.modules():
        if module is not block and {"cache_params", "past_key_values"} & set(_arguments(module)):
            raise ModelError(
                f"{type(module).__name__}, in layers of type {kind}, does not hand its state to transformers' cache as "
                "other recurrent layers do, so branches could not start from their prefix: choose a model with softmax "
                "attention, gated delta nets or short convolutions"
            )


def _hands_over_states(kind: type) -> bool:
    """Whether the code of a class of layers hands its state to transformers' cache."""
    return any("update_conv_state" in names or "update_recurrent_state" in names for names in _names_in(kind))


def _names_in(kind: type) -> Iterator[tuple[str, ...]]:
    for value in vars(kind).values():
        code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        if code is not None:
            yield code.co_names


def _arguments(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _cache_argument(mixer: Any) -> str:
    """The name of the forward's argument that takes the cache."""
    return "past_key_values" if "past_key_values" in _arguments(mixer) else "cache_params"


def _try(mixer: Any, hidden_size: int, dtype: torch.dtype) -> None:
    """Raise `ModelError` where a layer gives another result or gradient for a sequence that it gets in pieces."""
    mixer = copy.deepcopy(mixer).to(dtype)
    tolerance = PROBE_TOLERANCE if dtype.itemsize > 2 else HALF_PROBE_TOLERANCE
    device = next(mixer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(2, sum(PROBE_LENGTHS), hidden_size, generator=generator).to(device, dtype)
    rows.requires_grad_()
    segments, first = [], 0
    for index, length in enumerate(PROBE_LENGTHS):
        added = np.arange(first, first + length)
        segments.append(Segment(index - 1, added, added))
        first += length
    layer = SharedStates(mixer, 0)
    reason = ""
    try:
        with torch.enable_grad():
            outputs = mixer(rows[None])[0], layer.run(rows, plan_states(segments, device), {})
            gradients = [torch.autograd.grad((output * weights).sum(), rows)[0] for output in outputs]
        for name, (whole, pieces) in {"output": outputs, "gradient": gradients}.items():
            if not (error := float(((pieces - whole).norm() / whole.norm()).detach())) <= tolerance:
                reason = f"its {name} for a sequence in pieces differs by {error:.2g}"
    except Exception as error:  # noqa: BLE001  code of any family
        reason = f"{type(error).__name__}: {str(error)[:100]}"
    if reason:
        raise ModelError(
            f"{type(mixer).__name__} carries a state from token to token and cannot continue from it ({reason}), so "
            "branches could not start from their prefix: choose a model whose recurrent layers continue from a cache"
        )
