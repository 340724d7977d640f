"""What the embedded engine knows about one request, and what a session keeps between its turns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.types import IntArray, Prompt, SamplingParams


@dataclass(frozen=True, eq=False)
class CachedTurn:
    """Entries of the KV cache that a turn of a session wrote or read."""

    version: int
    """Policy version of the cache they are in."""
    keys: IntArray
    """int64 [n]; the prompt's keys (`ImageKeys`) and the completion's tokens, without the last one: it was sampled, but
    it was never an input of the model."""
    slots: IntArray
    """int64 [n]; the slot of each in the KV cache."""
    states: PrefixStates
    """After all of `keys`; empty for a model whose layers carry no state."""


@dataclass(eq=False)
class SessionCache:
    """What a session keeps between its turns."""

    most: int = 1
    """How many turns it keeps. A foreign program may hold several conversations, whose turns come in any order."""
    turns: list[CachedTurn] = field(default_factory=list)
    """The last ones, the newest at the end."""

    def add(self, turn: CachedTurn) -> None:
        """Keep a turn, in place of the one that it extends."""
        kept = [each for each in self.turns if not _extends(turn, each)] if self.most > 1 else []
        self.turns = [*kept, turn][-self.most :]

    def clear(self) -> None:
        """Forget all turns."""
        self.turns = []


def _extends(turn: CachedTurn, before: CachedTurn) -> bool:
    return np.array_equal(turn.keys[: len(before.keys)], before.keys)


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to sample."""

    prompt: Prompt
    sampling: SamplingParams
    session: SessionCache
    """Read for the prompt's cached prefix; gets the turn that this request makes."""
