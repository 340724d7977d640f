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
from vlmrl.inference.embedded.prefill import DistinctPrompt, distinct_prompts, prefill
from vlmrl.inference.embedded.prefill_chunks import prefill_in_passes
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.row_batch import Entering
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.models.policy import Policy
from vlmrl.types import Completion

_log = logging.getLogger(__name__)


def decodes_by_rows(policy: Policy) -> bool:
    """Whether row_decoding.py decodes, not decoding.py."""
    return policy.device.type == "cuda"


class Intake(Protocol):
    """Requests that come while a batch runs. Called from the thread of the batch."""

    def waiting(self, running: int) -> list[Request]:
        """Those that may enter beside `running` rows. Called at every reading."""

    def enter(self, requests: Sequence[Request]) -> None:
        """Take note that requests enter."""

    def ended(self, request: Request, completion: Completion) -> None:
        """Take a completion, of the batch itself or of what has entered it."""

    def withdraw(self) -> bool:
        """Have what has entered and not ended wait again → whether there is any."""


class BatchSampler(Protocol):
    """What the engine needs of a `Generator`, or of one per rank (ranked.py)."""

    @property
    def cached_slots(self) -> int: ...

    def run(self, requests: Sequence[Request], version: int, intake: Intake | None = None) -> list[Completion]: ...

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
    def run(self, requests: Sequence[Request], version: int, intake: Intake | None = None) -> list[Completion]:
        """Sample one completion per request, in order. `version` is the policy version of the weights. With an `intake`
        further requests enter while the batch runs; only the decoder of GPUs takes some."""
        self._model.use_version(version)
        if self._rows is not None:
            running = _Running(self, self._model, self._memory, requests, intake)
            self._run_by_rows(self._rows, running, requests, version)
            return [running.found[id(request)] for request in requests]
        assert intake is None, "the reference decoder takes no further requests"
        with uncompiled_in_inference():
            prompts, request_prompt = distinct_prompts(self._model, requests)
            prefilled, rows = prefill(self._model, prompts)
            self._counters["inference/rows_prefill"] += rows
            completions, rows = decode(
                self._model, version, requests, prompts, request_prompt, prefilled, self._text_of
            )
            self._counters["inference/rows_decode"] += rows
        return completions

    def _run_by_rows(self, decoder: RowDecoder, running: _Running, requests: Sequence[Request], version: int) -> None:
        """The same in as many parts as memory asks for. A part that still runs out of memory is halved, and nothing
        enters it any more."""
        for part in self._memory.parts(requests):
            chosen = [requests[index] for index in part]
            if len(chosen) < len(requests):
                running.takes = False  # the other parts come first
            if self._tried(decoder, running, chosen, version):
                continue
            left = [request for request in chosen if id(request) not in running.found]
            _log.warning("%d requests at once ran out of memory, so they are sampled in parts", len(left))
            self._memory.evict()
            middle = len(left) // 2
            for half in filter(None, (left[:middle], left[middle:])):
                self._run_by_rows(decoder, running, half, version)

    def _tried(self, decoder: RowDecoder, running: _Running, requests: Sequence[Request], version: int) -> bool:
        """Whether memory was enough; if not, nothing of the attempt is left but what has ended."""
        try:
            prompts, request_prompt = distinct_prompts(self._model, requests)
            decoder.compile_ahead(requests, prompts, request_prompt)
            with decoder.running():
                rows = decoder.decode(version, self.prefilled(requests, prompts, request_prompt), running)
                self._counters["inference/rows_decode"] += rows
        except torch.OutOfMemoryError:
            if not running.withdraw() and len(requests) == 1:
                raise
            return False
        return True

    def prefilled(
        self, requests: Sequence[Request], prompts: Sequence[DistinctPrompt], request_prompt: Sequence[int]
    ) -> Entering:
        """Compute the prompts of requests, which then can enter a batch."""
        prefilled, rows = prefill_in_passes(self._model, prompts)
        self._counters["inference/rows_prefill"] += rows
        return Entering(requests, prompts, request_prompt, prefilled)


class _Running:
    """A batch that runs, and what it has to do with its engine; implements `Company`."""

    def __init__(
        self,
        generator: Generator,
        model: CachedPolicy,
        memory: CacheMemory,
        requests: Sequence[Request],
        intake: Intake | None,
    ) -> None:
        """`requests`: those that the batch starts with."""
        self._generator, self._model, self._memory, self._intake = generator, model, memory, intake
        self._first = {id(request) for request in requests}
        self.takes = True
        """Whether something may enter, if there is an intake."""
        self.found: dict[int, Completion] = {}
        """Of the requests that the batch has started with, by their ids."""

    def take(self, running: int) -> Entering | None:
        if self._intake is None:
            return None
        requests = self._intake.waiting(running)
        if not requests or not self.takes or not self._memory.has_room_beside(requests, running):
            return None
        self._intake.enter(requests)
        return self._generator.prefilled(requests, *distinct_prompts(self._model, requests))

    def ended(self, request: Request, completion: Completion) -> None:
        if id(request) in self._first:
            self.found[id(request)] = completion
        if self._intake is not None:
            self._intake.ended(request, completion)

    def withdraw(self) -> bool:
        """After an attempt that has failed: nothing enters any more → whether something had."""
        self.takes = False
        return self._intake is not None and self._intake.withdraw()
