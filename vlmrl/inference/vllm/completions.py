"""From a server's answer to the completion that a rollout gets."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vlmrl.errors import EngineError
from vlmrl.inference.stop_strings import TextOf, find_stop
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.wire import Answer
from vlmrl.types import Completion, SamplingParams


def completion_of(
    rollout_id: str, answer: Answer, version: int, sampling: SamplingParams, text_of: TextOf | None
) -> Completion:
    """`version` is the server's policy version when the request was sent: the oldest that a token can have.

    The end of the completion is the one that `vlmrl.inference.stop_strings` defines. A server that finds a stop string
    later, or not at all, has sampled more tokens, which are left out: those before are the same with and without them.
    Raises `EngineError` where the server ended the completion without a reason that the run knows.
    """
    versions = answer.versions
    if versions is None:
        versions = old_vllm.versions_of_request(len(answer.token_ids), version)
    found = None
    if sampling.stop:
        assert text_of is not None, "a request with stop strings needs an engine that was given `text_of`"
        found = find_stop(answer.token_ids, sampling.stop, sampling.stop_token_ids, text_of)
    if found is not None:
        count, stop = found
        supports = None if answer.supports is None else answer.supports.take(np.arange(count))
        return Completion(answer.token_ids[:count], answer.logprobs[:count], versions[:count], "stop", stop, supports)
    stopped = int(answer.token_ids[-1]) in sampling.stop_token_ids
    if answer.finish_reason != ("stop" if stopped else "length"):
        strings = f", and its text has none of the stop strings {list(sampling.stop)}" if sampling.stop else ""
        raise EngineError(
            f"rollout {rollout_id}: the server reports finish_reason={answer.finish_reason}, but the last token is "
            f"{answer.token_ids[-1]} and the stop tokens are {sampling.stop_token_ids}{strings}"
        )
    reason: Literal["stop", "length"] = "stop" if stopped else "length"
    return Completion(answer.token_ids, answer.logprobs, versions, reason, supports=answer.supports)
