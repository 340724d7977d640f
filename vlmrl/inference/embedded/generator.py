"""Prefill and decode of one batch of the embedded engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.decoding import decode
from vlmrl.inference.embedded.prefill import distinct_prompts, prefill
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.policy import Policy
from vlmrl.types import Completion

_log = logging.getLogger(__name__)


def decodes_by_rows(policy: Policy) -> bool:
    """Whether row_decoding.py decodes, not decoding.py: on a GPU, unless layers carry a state."""
    if policy.device.type != "cuda":
        return False
    if policy.is_recurrent:
        _log.info("layers of this model carry a state, so the embedded engine decodes it without CUDA graphs")
    return not policy.is_recurrent


class Generator:
    """Samples the completions of one batch after another, in one thread."""

    def __init__(self, policy: Policy, text_of: TextOf | None = None) -> None:
        """`text_of` is needed for stop strings only."""
        self._text_of = text_of
        self._model = CachedPolicy(policy)
        self._rows = RowDecoder(self._model, text_of) if decodes_by_rows(policy) else None
        """Decodes in place of `decode`, which stays the reference."""
        self._counters = {"inference/rows_prefill": 0.0, "inference/rows_decode": 0.0}

    def take_counters(self) -> dict[str, float]:
        """Rows computed since the last call: `inference/rows_prefill`, `inference/rows_decode`."""
        counters, self._counters = self._counters, dict.fromkeys(self._counters, 0.0)
        return counters

    @property
    def cached_slots(self) -> int:
        """Slots of the KV cache that are in use."""
        return self._model.kv_cache.used

    def clear_cache(self) -> None:
        """Have the next batch start with empty caches."""
        self._model.clear()
        if self._rows is not None:
            self._rows.release()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], version: int) -> list[Completion]:
        """Sample one completion per request, in order. `version` is the policy version of the weights."""
        self._model.use_version(version)
        prompts, request_prompt = distinct_prompts(self._model, requests)
        prefilled, rows = prefill(self._model, prompts)
        self._counters["inference/rows_prefill"] += rows
        if self._rows is not None:
            completions, rows = self._rows.decode(version, requests, prompts, request_prompt, prefilled)
        else:
            completions, rows = decode(
                self._model, version, requests, prompts, request_prompt, prefilled, self._text_of
            )
        self._counters["inference/rows_decode"] += rows
        return completions
