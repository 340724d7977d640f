"""The states of layers that carry one (recurrent.py), for the rows of a decode step: tensors at addresses that stay.

    prefill ─ states after each prompt ─▶ fill ─▶ [R, …] ─▶ step: read, one token of each row, written in place
                                                    └─────▶ of: copies for rows that have finished

A row that is not alive keeps its state, from which the next turn of its session starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmrl.models.attention.layer_cache import LayerCache, PrefixStates, State
from vlmrl.models.attention.row_step import row_step


class RowStates:
    """States of R rows."""

    def __init__(self, alive: Tensor) -> None:
        """`alive`: bool [R]; the rows whose states steps change. Read in every step."""
        self._alive = alive
        self._layers: dict[int, State] = {}
        """By the layer's number; as in `State`, with a leading dimension of R."""

    def fill(self, states: Sequence[PrefixStates]) -> None:
        """Set the states of the first rows. Rows with one prompt may bring one object."""
        distinct = {id(each): each for each in states}
        place = {key: index for index, key in enumerate(distinct)}
        index = torch.tensor([place[id(each)] for each in states], device=self._alive.device)
        for number, first in states[0].items():
            if number not in self._layers:
                self._layers[number] = _mapped(first, lambda x: x.new_zeros(len(self._alive), *x.shape))
            values = LayerCache.of([each[number] for each in distinct.values()]).stacked
            for target, each in zip(self._layers[number].tensors, values.tensors, strict=True):
                torch.index_select(each, 0, index, out=target[: len(states)])

    def step(self, number: int, rows: int, forward: Callable[[LayerCache], Tensor], *, shifts_in_place: bool) -> Tensor:
        """What `forward` of layer `number` returns for one further token of each of the first rows; their states become
        those after it. `shifts_in_place`: see `shifts_windows`."""
        own = self._layers[number]
        before = _mapped(own, lambda x: x[:rows])
        cache = LayerCache(before.conv, before.recurrent, continues=True, record_past=not shifts_in_place)
        alive = self._alive[:rows]
        with row_step(alive) as step:
            output = forward(cache)
        for old, new in zip(before.tensors, cache.stacked.tensors, strict=True):
            if not step.has_written(new):
                assert new is not old, "a layer that writes its state in place would change rows that are not alive"
                torch.where(alive.view(-1, *[1] * (new.dim() - 1)), new, old, out=old)
        return output

    def keep(self, index: Tensor) -> None:
        """Move the rows `index`, int64 [n] ascending, to the front."""
        for own in self._layers.values():
            for tensor in own.tensors:
                tensor[: len(index)].copy_(tensor[index])

    def of(self, rows: Sequence[int]) -> list[PrefixStates]:
        """Copies of the states of some rows."""
        index = torch.tensor(rows, device=self._alive.device)
        found: list[PrefixStates] = [{} for _ in rows]
        for number, own in self._layers.items():
            copies = _mapped(own, lambda x: x[index])
            cache = LayerCache(copies.conv, copies.recurrent, continues=True)
            for states, each in zip(found, cache.after(), strict=True):
                states[number] = each
        return found


def _mapped(state: State, function: Callable[[Tensor], Tensor]) -> State:
    conv = {i: function(x) for i, x in state.conv.items()}
    return State(conv, {i: function(x) for i, x in state.recurrent.items()})
