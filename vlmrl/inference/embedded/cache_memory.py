"""Fits the KV cache of a batch into the memory that a GPU has free beside weights, gradients and optimizer state.

    batch ─▶ room for all of its slots?  yes ─▶ one part
                                         no  ─▶ forget the turns of sessions before: is there room now?
                                                yes ─▶ one part          no ─▶ several parts, one after the other

kv_plan.py has the arithmetic, which `dry_run` uses too. A turn that is forgotten is computed again when its session
sends the next prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from weakref import WeakSet

import numpy as np
import torch

from vlmrl.inference.embedded import kv_plan
from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.prefill import distinct_prompts
from vlmrl.inference.embedded.prefill_chunks import new_tokens
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.models.attention.plan import KVPool, plan_tree
from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.attention.recurrent import plan_states

_log = logging.getLogger(__name__)

HEADROOM = 1.5
"""A pool that grows gets this many times the slots that are needed, where memory allows: turns come one by one, and
each growth is a copy."""

UNPLANNED = 1 << 50


def free_bytes(device: torch.device) -> int:
    """Bytes of the GPU that neither this process uses nor another one. The memory of a host is not planned."""
    if device.type != "cuda":
        return UNPLANNED
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class CacheMemory:
    """Makes room for batches in the KV cache of `model`."""

    def __init__(self, model: CachedPolicy, free: Callable[[], int], on_eviction: Callable[[], None]) -> None:
        """`free` returns the bytes that are free now; `on_eviction` is called when the KV pool has been dropped."""
        self._model, self._free, self._on_eviction = model, free, on_eviction
        self._vocabulary = len(model.policy.banned)
        self._sessions: WeakSet[SessionCache] = WeakSet()
        """Sessions that may hold turns."""
        self._slot_bytes = self._state_bytes = 0

    def parts(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """The indices of the requests of each part of a batch, for which there is room when it is handed out."""
        self._sessions.update(request.session for request in requests)
        if self._make_room(requests):
            yield list(range(len(requests)))
            return
        self.evict()
        if self._make_room(requests):
            yield list(range(len(requests)))
            return
        prompts, request_prompt = distinct_prompts(self._model, requests)
        order = np.argsort(request_prompt, kind="stable")
        further = new_tokens(prompts)
        of_order = [request_prompt[index] for index in order]
        is_new = [True, *(a != b for a, b in pairwise(of_order))]
        limit = self._affordable(len(requests))
        counts = kv_plan.parts(
            [len(prompts[prompt].keys) for prompt in of_order],
            [further[prompt] * new for prompt, new in zip(of_order, is_new, strict=True)],
            [requests[index].sampling.max_new_tokens for index in order],
            limit,
        )
        _log.warning(
            "the GPU has room for %d tokens of the KV cache: %d requests are sampled in %d parts",
            limit, len(requests), len(counts),
        )  # fmt: skip
        for part in np.split(order, np.cumsum(counts)[:-1]):
            chosen = part.tolist()
            if not self._make_room([requests[index] for index in chosen]):
                self.evict()
                self._make_room([requests[index] for index in chosen])
            yield chosen

    def has_room_beside(self, requests: Sequence[Request], running: int) -> bool:
        """Whether there is room for requests beside `running` rows; if so, it is reserved."""
        self._sessions.update(request.session for request in requests)
        return self._make_room(requests, running)

    def evict(self) -> None:
        """Forget all turns and drop the KV pool."""
        for session in self._sessions:
            session.clear()
        self._model.kv_cache.release()
        self._on_eviction()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_room(self, requests: Sequence[Request], running: int = 0) -> bool:
        """Reserve the slots of a batch beside `running` rows. False where memory does not allow it."""
        cache = self._model.kv_cache
        prompts, _ = distinct_prompts(self._model, requests)
        slots = kv_plan.batch_slots(0, [request.sampling.max_new_tokens for request in requests])
        needed = cache.capacity_for(sum(new_tokens(prompts)), slots)
        if needed <= cache.pool.capacity:
            return True
        if not cache.used:
            cache.release()  # nothing is copied, so its memory is free for the new pool
        affordable = self._affordable(running + len(requests))
        if needed > affordable:
            return False
        cache.reserve(min(affordable, int(HEADROOM * needed)) if cache.used else needed)
        return True

    def _affordable(self, rows: int) -> int:
        """Slots of a new pool that there is memory for now, while `rows` rows are decoded."""
        if not self._slot_bytes:
            self._slot_bytes, self._state_bytes = self._measured()
        return kv_plan.affordable_slots(
            self._free(), self._slot_bytes, rows, self._vocabulary, state_bytes=self._state_bytes
        )

    def _measured(self) -> tuple[int, int]:
        """Bytes of a slot, and of a row's states, from a pass over one token: families differ in the layers that have
        keys, and in those that carry a state."""
        kept, pool = self._model.kv_cache.pool, KVPool(1)
        self._model.kv_cache.pool = pool
        try:
            nothing = np.zeros(1, np.int64)
            segments, device = [Segment(-1, nothing, nothing, nothing)], self._model.device
            plan = plan_tree(segments, device, self._model.policy.rules)
            plan.states = plan_states(segments, device, kept=[0])
            self._model.forward(nothing, np.zeros((4, 1), np.int64), nothing, [], plan, 0)
        finally:
            self._model.kv_cache.pool = kept
        states = plan.states.ends.get(0, {}).values()
        slot = sum(tensor.nbytes for pair in pool.calls.values() for tensor in pair)
        return slot, sum(tensor.nbytes for state in states for tensor in state.tensors)
