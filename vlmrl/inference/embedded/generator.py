"""Prefill and decode of one batch of the embedded engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from vlmrl.inference.embedded.cache_memory import CacheMemory, free_bytes
from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.decoding import decode
from vlmrl.inference.embedded.prefill import distinct_prompts, prefill
from vlmrl.inference.embedded.prefill_chunks import prefill_in_passes
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.models.policy import Policy
from vlmrl.types import Completion

_log = logging.getLogger(__name__)


def decodes_by_rows(policy: Policy) -> bool:
    """Whether row_decoding.py decodes, not decoding.py."""
    return policy.device.type == "cuda"


class BatchSampler(Protocol):
    """What the engine needs of a `Generator`, or of one per rank (ranked.py)."""

    @property
    def cached_slots(self) -> int: ...

    def run(self, requests: Sequence[Request], version: int) -> list[Completion]: ...

    def take_counters(self) -> dict[str, float]: ...

    def clear_cache(self) -> None: ...


class Generator:
    """Samples the completions of one batch after another, in one thread."""

    def __init__(self, policy: Policy, text_of: TextOf | None = None, free: Callable[[], int] | None = None) -> None:
        """`text_of` is needed for stop strings only. `free` returns the bytes of the GPU that are free; by default it
        asks the device."""
        self._text_of = text_of
        self._model = CachedPolicy(policy)
        self._rows: RowDecoder | None = None
        """Decodes in place of `decode`, which stays the reference."""
        if decodes_by_rows(policy):
            self._rows = RowDecoder(self._model, text_of)
            self._memory = CacheMemory(
                self._model, free or partial(free_bytes, policy.device), on_eviction=self._rows.release
            )
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
        self.forget_weights()

    def forget_weights(self) -> None:
        """Have no graph read the weights where they are now: they are about to move."""
        if self._rows is not None:
            self._rows.release()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], version: int) -> list[Completion]:
        """Sample one completion per request, in order. `version` is the policy version of the weights."""
        self._model.use_version(version)
        if self._rows is not None:
            return self._run_by_rows(self._rows, requests, version)
        with uncompiled_in_inference():
            prompts, request_prompt = distinct_prompts(self._model, requests)
            prefilled, rows = prefill(self._model, prompts)
            self._counters["inference/rows_prefill"] += rows
            completions, rows = decode(
                self._model, version, requests, prompts, request_prompt, prefilled, self._text_of
            )
            self._counters["inference/rows_decode"] += rows
        return completions

    def _run_by_rows(self, decoder: RowDecoder, requests: Sequence[Request], version: int) -> list[Completion]:
        """The same in as many parts as memory asks for. A part that still runs out of memory is halved."""
        found: dict[int, Completion] = {}
        for part in self._memory.parts(requests):
            chosen = [requests[index] for index in part]
            completions = self._tried(decoder, chosen, version)
            if completions is None:
                _log.warning("%d requests at once ran out of memory, so they are sampled in two parts", len(part))
                self._memory.evict()
                middle = len(part) // 2
                completions = [
                    *self._run_by_rows(decoder, chosen[:middle], version),
                    *self._run_by_rows(decoder, chosen[middle:], version),
                ]
            found |= zip(part, completions, strict=True)
        return [found[index] for index in range(len(requests))]

    def _tried(self, decoder: RowDecoder, requests: Sequence[Request], version: int) -> list[Completion] | None:
        """The completions; None where memory ran out, once nothing of the attempt is left."""
        try:
            return self._run_part(decoder, requests, version)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        return None

    def _run_part(self, decoder: RowDecoder, requests: Sequence[Request], version: int) -> list[Completion]:
        prompts, request_prompt = distinct_prompts(self._model, requests)
        decoder.compile_ahead(requests, prompts, request_prompt)
        with decoder.running():
            prefilled, rows = prefill_in_passes(self._model, prompts)
            self._counters["inference/rows_prefill"] += rows
            completions, rows = decoder.decode(version, requests, prompts, request_prompt, prefilled)
            self._counters["inference/rows_decode"] += rows
        return completions
