"""What a layer that carries a state hands to the cache of transformers, and a stand-in for that cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class State:
    """What one layer carries past the last token of a prefix. Layers may have several, by transformers' index."""

    conv: dict[int, Tensor]
    """float [channels, window]; the last inputs of a causal convolution."""
    recurrent: dict[int, Tensor]
    """float; the recurrent state. Empty for a layer that is a convolution only."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that is the same for all states of a layer."""
        return [each[index] for each in (self.conv, self.recurrent) for index in sorted(each)]


PrefixStates: TypeAlias = dict[int, State]
"""The state of every layer after one prefix, by the layer's number in `share_states`."""


class LayerCache:
    """Stands in for transformers' cache in one call of a layer's forward over B sequences. It keeps the graph of the
    states, where transformers copies them in place."""

    def __init__(
        self, conv: Mapping[int, Tensor], recurrent: Mapping[int, Tensor], *, continues: bool, record_past: bool = True
    ) -> None:
        """The states [B, …] that the call starts from, if it `continues` some. `record_past`: transformers' name for
        layers that hand over even a single token, instead of shifting the window in place."""
        self.record_past = record_past
        self.conv_states, self.recurrent_states, self._continues = dict(conv), dict(recurrent), continues
        self.layers = _EveryIndex(self)

    @staticmethod
    def of(before: Sequence[State]) -> LayerCache:
        """A cache with the states of each sequence; empty where they start from none."""
        first = before[0] if before else State({}, {})
        conv = {i: torch.stack([state.conv[i] for state in before]) for i in first.conv}
        recurrent = {i: torch.stack([state.recurrent[i] for state in before]) for i in first.recurrent}
        return LayerCache(conv, recurrent, continues=bool(before))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the call starts from states."""
        return self._continues

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Take the inputs [B, channels, n] of a convolution → the same after the window before them."""
        before = self.conv_states.get(state_idx)
        if before is not None:
            size = before.shape[-1]
            conv_states = torch.cat([before, conv_states], dim=-1)
        else:
            size = conv_kernel_size or conv_states.shape[-1]
            if (missing := size - conv_states.shape[-1]) > 0:
                conv_states = torch.nn.functional.pad(conv_states, (missing, 0))
        self.conv_states[state_idx] = conv_states[..., -size:].contiguous()
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Take the recurrent states [B, …] after the call's tokens."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    @property
    def stacked(self) -> State:
        """The states of all sequences, [B, …] each."""
        return State(self.conv_states, self.recurrent_states)

    def after(self) -> list[State]:
        """The states after the call, one for each sequence. A layer may have written them in place."""
        conv = {i: states.unbind() for i, states in self.conv_states.items()}
        recurrent = {i: states.unbind() for i, states in self.recurrent_states.items()}
        count = len(next(iter((conv or recurrent).values())))
        return [
            State({i: x[b] for i, x in conv.items()}, {i: x[b] for i, x in recurrent.items()}) for b in range(count)
        ]


class _EveryIndex:
    """`cache.layers`: the call has one layer only, whatever its index is."""

    def __init__(self, cache: LayerCache) -> None:
        self._cache = cache

    def __getitem__(self, index: int) -> LayerCache:
        return self._cache
