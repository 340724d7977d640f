"""What the embedded engine knows about one request, and what a session keeps between its turns."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.models.attention.recurrent import PrefixStates
from vlmrl.types import IntArray, Prompt, SamplingParams


@dataclass(frozen=True, eq=False)
class CachedTurn:
    """Entries of the KV cache that a session's last turn wrote or read."""

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

    last_turn: CachedTurn | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to sample."""

    prompt: Prompt
    sampling: SamplingParams
    session: SessionCache
    """Read for the prompt's cached prefix; gets the turn that this request makes."""
