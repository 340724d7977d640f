"""What a finished request becomes: its completion, and the turn that its session keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmrl.inference.embedded.prefill import DistinctPrompt
from vlmrl.inference.embedded.requests import CachedTurn, Request
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.types import Completion, FloatArray, IntArray, Supports


@dataclass(frozen=True, eq=False)
class Sampled:
    """The n tokens that a request sampled."""

    token_ids: IntArray
    """int64 [n]."""
    logprobs: FloatArray
    """float32 [n]; natural logs, under the distributions that the tokens were sampled from."""
    supports: Sequence[NDArray[np.int32]]
    """One per token, int32 [k], ascending; empty where they are not reported."""
    stop: str | None
    """The stop string that ended the completion."""
    is_stopped: bool
    """Whether the last token is a stop token, or completes a stop string."""
    slots: IntArray
    """int64 [n − 1]; slots in the KV cache of all tokens but the last, which was never an input of the model."""
    states: PrefixStates | None
    """After all tokens but the last; empty for a model whose layers carry no state. None: they are not known."""


def finish(
    request: Request, version: int, prompt: DistinctPrompt, prompt_slots: IntArray, sampled: Sampled
) -> Completion:
    """The completion of a finished request; its session keeps the turn, if its states are known."""
    if sampled.states is not None:
        keys = np.concatenate([prompt.keys, sampled.token_ids[:-1]])
        slots = np.concatenate([prompt_slots, sampled.slots])
        request.session.add(CachedTurn(version, keys, slots, sampled.states))
    return Completion(
        token_ids=sampled.token_ids,
        logprobs=sampled.logprobs,
        versions=np.full(len(sampled.token_ids), version, dtype=np.int64),
        finish_reason="stop" if sampled.is_stopped else "length",
        stop=sampled.stop,
        supports=Supports.of(sampled.supports) if sampled.supports else None,
    )
