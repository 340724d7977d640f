"""`inference=embedded`: the policy generates in the trainer's own process, from the trainer's own weights.

    sessions ──▶ wait until every awaited session has a pending request ──▶ one batch:
        prefill   (prefill.py)    the new tokens of all distinct prompts, as one prefix tree over the KV cache
        decode    (decoding.py)   one row per distinct continuation: requests that sampled the same tokens so far
                                  share a row
                  (row_decoding.py) on a GPU: one row per request, siblings read their prompt once, CUDA graphs
        (ranked.py) in a run of several ranks: each of them samples a share of the batch

The KV cache (kv_cache.py) holds the keys and values of one policy version. A session's next turn starts from the cache
entries of its last turn.

Sampling (sampling.py) takes one uniform number per token from the request's own seed, so a completion does not depend
on the other requests of the batch. A batch is formed from the open sessions, never after a time limit. So runs repeat
bit for bit, unless `inference.batching=rolling` lets requests enter a batch that runs (arrivals.py, row_batch.py).

Sessions of foreign programs are not awaited (`session(…, is_awaited=False)`): a program may take any time between two
requests, and waiting for all of them would never end where two wait for each other. While some of them have no request,
a batch starts once no request has come for a short time (quiet.py), so that programs that were answered together come
back together.

On a CPU this is the reference engine for tests. It is the default engine because it needs only torch. Left out on
purpose, and there on a CPU only: prefill in several passes (prefill_chunks.py), and a limit on the size of the KV cache
(cache_memory.py). Left out everywhere: preemption.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from vlmrl.errors import EngineError
from vlmrl.inference.embedded.arrivals import Arrivals, Pending, in_order
from vlmrl.inference.embedded.generator import BatchSampler, Generator
from vlmrl.inference.embedded.quiet import QuietTime
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.inference.stop_strings import TextOf
from vlmrl.models.lora import merged
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, Prompt, SamplingParams

CACHE_PER_SESSION = 4
"""Slots of the KV cache per session that is not awaited, in units of `max_model_len`: room for some branches."""

CONVERSATIONS = 4
"""Conversations of a session that is not awaited whose ends stay in the KV cache: those of its agents."""

CACHED_SESSIONS = 64
"""Sessions that are not awaited and have room in the KV cache although they are idle."""


class EmbeddedSession:
    """One rollout's session; implements `vlmrl.types.EngineSession`."""

    def __init__(self, engine: EmbeddedEngine, is_awaited: bool) -> None:
        self._engine = engine
        self.is_awaited = is_awaited
        self.missed_since = time.monotonic()
        """When it was opened, or got its last answer."""
        self.cache = SessionCache(most=1 if is_awaited else CONVERSATIONS)

    async def __aenter__(self) -> EmbeddedSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._engine.close_session(self)

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """See `vlmrl.types.EngineSession.generate`."""
        return await self._engine.submit(self, prompt, sampling)


class EmbeddedEngine:
    """Runs the requests of all open sessions in one batch at a time; implements `vlmrl.types.InferenceEngine`."""

    def __init__(
        self,
        policy: Policy,
        version: Callable[[], int],
        max_model_len: int,
        text_of: TextOf | None = None,
        sampler: BatchSampler | None = None,
        *,
        is_rolling: bool = False,
    ) -> None:
        """`version` returns the policy version of the weights that `policy` holds now; `max_model_len` limits prompt
        plus completion, in tokens; `text_of` is the renderer's `decode`, which only stop strings need; `sampler` takes
        the place of a `Generator` in this process. `is_rolling`: whether requests enter a batch that runs, and
        completions leave it; only for a policy on a GPU."""
        self._policy = policy
        self._version = version
        self._max_model_len = max_model_len
        self._sessions: set[EmbeddedSession] = set()
        self._pending: list[Pending] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embedded-engine")
        self._generator: BatchSampler = sampler or Generator(policy, text_of)
        self._running = False
        self._is_rolling = is_rolling
        self._arrivals: Arrivals | None = None
        """Of the batch that runs, if requests may enter it."""
        self._quiet = QuietTime(self._run)
        self._largest_batch = 0
        """Requests of the largest batch since the KV cache was empty."""

    async def start(self) -> None:
        """Do nothing: the policy is in this process already."""

    async def stop(self) -> None:
        """Wait for the batch in progress, if any. May be called twice."""
        self._executor.shutdown(wait=True)

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> EmbeddedSession:
        """Open a session. If it is awaited, the next batch waits until it has a pending request or is closed."""
        session = EmbeddedSession(self, is_awaited)
        self._sessions.add(session)
        return session

    def close_session(self, session: EmbeddedSession) -> None:
        """Close a session. When the last one closes, clear the KV cache, so that a resumed run repeats bit for bit:
        what later rollouts compute must not depend on the rollouts before them."""
        self._sessions.discard(session)
        if not self._sessions:
            self._generator.clear_cache()
        self._maybe_run()

    def weights(self) -> dict[str, Tensor]:
        """The weights that the engine generates from, by their names in a checkpoint; not copies."""
        return dict(merged(self._policy.model))

    def metrics(self) -> dict[str, float]:
        """Tokens computed since the last call, as `inference/rows_prefill` and `inference/rows_decode`;
        `wire/bytes_sent` is 0.0."""
        return {"wire/bytes_sent": 0.0, **self._generator.take_counters()}

    async def submit(self, session: EmbeddedSession, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Queue one request of an open session and wait for its completion.

        Raises `EngineError` where the session is closed, or prompt plus completion would exceed `max_model_len`.
        """
        assert isinstance(sampling.seed, int), f"seed {sampling.seed!r} is not an int"
        assert 0 <= sampling.seed < 2**64, f"seed {sampling.seed} does not fit into 64 bits"
        if session not in self._sessions:
            raise EngineError("this session is closed")
        if len(prompt.token_ids) + sampling.max_new_tokens > self._max_model_len:
            raise EngineError(
                f"prompt of {len(prompt.token_ids)} tokens + max_new_tokens={sampling.max_new_tokens} exceeds "
                f"inference.max_model_len={self._max_model_len}"
            )
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        pending = Pending(session, Request(prompt, sampling, session.cache), future)
        if self._arrivals is not None and not self._is_cache_full():
            self._arrivals.add(pending)
        else:
            self._pending.append(pending)
            self._maybe_run()
        return await future

    def _maybe_run(self) -> None:
        """Start a batch if none is running and every awaited session has a pending request: at once where the other
        sessions have one, too, else after a quiet time."""
        self._forget_cancelled()
        asking = {pending.session for pending in self._pending}
        silent = self._sessions - asking
        if self._running or not asking or any(session.is_awaited for session in silent):
            self._quiet.stop()
        elif silent:
            now = time.monotonic()
            missing = sum(now - session.missed_since < self._quiet.patience_s for session in silent)
            self._quiet.begin(missing / (missing + len(asking)))
        else:
            self._run()

    def _run(self) -> None:
        """Start a batch of the pending requests."""
        self._quiet.stop()
        self._forget_cancelled()
        if not self._pending:
            return
        self._bound_cache()
        batch, self._pending = in_order(self._pending), []
        self._running = True
        loop = asyncio.get_running_loop()
        arrivals = self._arrivals = Arrivals(batch, loop) if self._is_rolling else None
        requests = [pending.request for pending in batch]
        started = time.monotonic()
        task = loop.run_in_executor(self._executor, self._generator.run, requests, self._version(), arrivals)

        def deliver(done: asyncio.Future[list[Completion]]) -> None:
            self._running, self._arrivals = False, None
            self._quiet.note_batch(time.monotonic() - started)
            error = done.exception()
            if arrivals is not None:
                self._pending += arrivals.close(error)
            else:
                for i, pending in enumerate(batch):
                    pending.settle(None if error is not None else done.result()[i], error)
            # Sessions of this batch may have closed in the meantime, and the pending requests waited only for them.
            self._maybe_run()

        task.add_done_callback(deliver)

    def _forget_cancelled(self) -> None:
        """Drop requests of cancelled rollouts: they must not count for a session that has not sent its request yet."""
        self._pending = [pending for pending in self._pending if not pending.future.done()]

    def _bound_cache(self) -> None:
        """Clear the KV cache where sessions that are not awaited have filled it: a server of foreign programs may never
        be without an open session."""
        self._largest_batch = max(self._largest_batch, len(self._pending))
        if self._is_cache_full():
            self._largest_batch = 0
            self._generator.clear_cache()
            for session in self._sessions:
                session.cache.clear()

    def _is_cache_full(self) -> bool:
        """Whether the KV cache is to be cleared before more requests come. Sessions that are awaited will all end."""
        sessions = max(self._largest_batch, min(len(self._sessions), CACHED_SESSIONS))
        limit = CACHE_PER_SESSION * self._max_model_len * sessions
        return self._generator.cached_slots > limit and not any(session.is_awaited for session in self._sessions)
