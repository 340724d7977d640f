"""`inference=embedded`: the policy generates in the trainer's own process, from the trainer's own weights.

    sessions ──▶ wait until every open session has asked ──▶ one batch:
        prefill   the distinct new tokens of all prompts, as one prefix tree over the KV pool
        decode    one row per distinct continuation, not per request: siblings that sampled the same so far share it

The pool holds the keys and values of one policy version; a session's next turn starts from what its last turn left
there. Sampling takes one uniform number per token from the request's own seed, so a completion does not depend on
which other requests are in the batch, and a batch is formed by who is there, never by time: runs repeat exactly.

The reference engine for tests, and the default because it needs nothing but torch. Left out: preemption, chunked
prefill, a bound on the pool beyond the batch itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import EngineError, NonFiniteLossError
from vlmrl.models.attention.prefix_tree import ImageKeys, Segment, build_tree, sort_key
from vlmrl.models.attention.tree import (
    KVPool,
    SharedBlock,
    TreePlan,
    local_blocks,
    plan_tree,
    shared_segments,
)
from vlmrl.models.features import ImageFeatures
from vlmrl.models.lora import merged
from vlmrl.models.policy import Policy
from vlmrl.models.transfer import to_device
from vlmrl.types import Completion, ImageItem, IntArray, Prompt, SamplingParams, mm_token_type_ids


@dataclass(eq=False)
class _Cached:
    """What a session's last turn left in the pool."""

    version: int
    keys: IntArray
    """int64 [n]; prompt plus completion without its last token, which was sampled but never fed."""
    slots: IntArray
    """int64 [n]."""


@dataclass(eq=False)
class _Request:
    prompt: Prompt
    sampling: SamplingParams
    session: EmbeddedSession
    future: asyncio.Future[Completion]


@dataclass(eq=False)
class _Branch:
    """A distinct continuation of a distinct prompt, while it is being decoded."""

    prompt: int
    """Index of the prompt."""
    tail: list[int] = field(default_factory=list)
    """Slots of the continuation's tokens."""
    requests: list[int] = field(default_factory=list)
    """Indices of the requests that have sampled exactly this."""


class EmbeddedSession:
    """One rollout's hold on the engine."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine
        self.cached: _Cached | None = None

    async def __aenter__(self) -> EmbeddedSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._engine.close_session(self)

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """See `vlmrl.types.EngineSession.generate`."""
        return await self._engine.submit(self, prompt, sampling)


class EmbeddedEngine:
    """Batches sessions in lockstep. `version` reads the policy version of the weights that generate."""

    def __init__(self, policy: Policy, version: Callable[[], int], max_model_len: int) -> None:
        self._policy = policy
        self._version = version
        self._max_model_len = max_model_len
        self._sessions: set[EmbeddedSession] = set()
        self._waiting: list[_Request] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embedded-engine")
        self._generator = Generator(policy)
        self._running = False

    async def start(self) -> None:
        """Nothing to bring up."""

    async def stop(self) -> None:
        """Wait for the batch in progress, if any."""
        self._executor.shutdown(wait=True)

    def session(self, rollout_id: str) -> EmbeddedSession:
        """Open a session; the next batch waits for it to ask or to close."""
        session = EmbeddedSession(self)
        self._sessions.add(session)
        return session

    def close_session(self, session: EmbeddedSession) -> None:
        """The session asks no more. The last one takes along what the pool holds: what later rollouts compute, to the
        last bit, must not depend on which came before them, or a resumed run would differ from one never stopped."""
        self._sessions.discard(session)
        if not self._sessions:
            self._generator.forget()
        self._maybe_run()

    def weights(self) -> dict[str, Tensor]:
        """What it generates from, by the names in a checkpoint; not copies."""
        return dict(merged(self._policy.model))

    def metrics(self) -> dict[str, float]:
        """Tokens computed since the last call: `inference/rows_prefill`, `inference/rows_decode`. There is no wire."""
        return {"wire/bytes_sent": 0.0, **self._generator.take_counters()}

    async def submit(self, session: EmbeddedSession, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Queue one request of an open session."""
        if session not in self._sessions:
            raise EngineError("this session is closed")
        if len(prompt.token_ids) + sampling.max_new_tokens > self._max_model_len:
            raise EngineError(
                f"prompt of {len(prompt.token_ids)} tokens + max_new_tokens={sampling.max_new_tokens} passes "
                f"inference.max_model_len={self._max_model_len}"
            )
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(prompt, sampling, session, future))
        self._maybe_run()
        return await future

    def _maybe_run(self) -> None:
        if self._running or len(self._waiting) < len(self._sessions):
            return
        # A cancelled rollout's request is nobody's: it must not stand for a session that is still on its way.
        self._waiting = [request for request in self._waiting if not request.future.done()]
        if not self._waiting or len(self._waiting) < len(self._sessions):
            return
        # Order by content, not by arrival: arrival depends on threads, and the order of rows moves the last bit.
        batch, self._waiting = self._waiting, []
        batch.sort(key=lambda r: (sort_key(r.prompt.token_ids), r.sampling.seed))
        self._running = True
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(self._executor, self._generator.run, batch, self._version())

        def deliver(done: asyncio.Future[list[Completion]]) -> None:
            self._running = False
            error = done.exception()
            for i, request in enumerate(batch):
                if request.future.done():
                    continue
                if error is not None:
                    request.future.set_exception(error)
                else:
                    request.future.set_result(done.result()[i])
            # Sessions of the batch may have closed meanwhile, and those that wait were waiting for them alone.
            self._maybe_run()

        task.add_done_callback(deliver)


class Generator:
    """Prefill and decode of one batch; owns the KV pool. Runs in one thread."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._pool = KVPool([], [])
        self._capacity = 0
        self._used = 0
        self._pool_version = -1
        self._features: dict[str, ImageFeatures] = {}
        self._image_keys = ImageKeys()
        self._counters = {"inference/rows_prefill": 0.0, "inference/rows_decode": 0.0}

    def take_counters(self) -> dict[str, float]:
        """The counters since the last call."""
        counters, self._counters = self._counters, dict.fromkeys(self._counters, 0.0)
        return counters

    def forget(self) -> None:
        """Begin the next batch with an empty pool."""
        self._pool_version = -1

    @torch.inference_mode()
    def run(self, batch: Sequence[_Request], version: int) -> list[Completion]:
        """Sample one completion per request, in order."""
        if version != self._pool_version:
            self._pool_version, self._used = version, 0
            self._features, self._image_keys = {}, ImageKeys()
        prompts, request_prompt = self._distinct_prompts(batch)
        slots, hidden, segments = self._prefill(prompts)
        return self._decode(batch, version, prompts, request_prompt, slots, hidden, segments)

    def _distinct_prompts(self, batch: Sequence[_Request]) -> tuple[list[_DistinctPrompt], list[int]]:
        """The distinct prompts in sorted order, and for each request the index of its own."""
        by_key: dict[bytes, _DistinctPrompt] = {}
        requested: list[bytes] = []
        seen: dict[int, bytes] = {}
        for request in batch:
            prompt = request.prompt
            key = seen.get(id(prompt))
            if key is None:
                keys = self._image_keys.keys(prompt.token_ids, prompt.placeholders)
                key = seen[id(prompt)] = sort_key(keys)
                by_key.setdefault(key, _DistinctPrompt(prompt, keys))
            distinct = by_key[key]
            cached = request.session.cached
            if cached is not None and cached.version == self._pool_version and len(cached.keys) > distinct.cached:
                n = min(len(cached.keys), len(distinct.keys) - 1)
                if np.array_equal(cached.keys[:n], distinct.keys[:n]):
                    distinct.cached, distinct.cached_slots = n, cached.slots[:n]
            requested.append(key)
        order = {key: i for i, key in enumerate(sorted(by_key))}
        return [by_key[key] for key in order], [order[key] for key in requested]

    def _prefill(self, prompts: Sequence[_DistinctPrompt]) -> tuple[list[IntArray], Tensor, list[Segment]]:
        """Compute what the pool lacks → per prompt its slots, the hidden state of its last token, all segments."""
        tree = build_tree([p.keys for p in prompts])
        # Tree nodes (distinct prompt tokens) → pool slots; those without one yet become the rows of this pass.
        slot = np.full(tree.num_rows, -1, np.int64)
        for prompt, nodes in zip(prompts, tree.rows, strict=True):
            slot[nodes[: prompt.cached]] = prompt.cached_slots
        # A prompt's last token is a row even where another session, a turn ahead, has its keys: sampling reads it.
        slot[[nodes[-1] for nodes in tree.rows]] = -1
        new = np.flatnonzero(slot < 0)
        first_slot = self._allocate(len(new))
        slot[new] = np.arange(first_slot, first_slot + len(new))
        row = np.full(tree.num_rows, -1, np.int64)
        row[new] = np.arange(len(new))

        token_ids = np.empty(len(new), np.int64)
        position_ids = np.empty((4, len(new)), np.int64)
        types = np.empty(len(new), np.int64)
        shown: dict[int, ImageItem] = {}
        for prompt, nodes, new_from in zip(prompts, tree.rows, tree.new_from, strict=True):
            source = prompt.prompt
            start = max(new_from, prompt.cached)
            rows = row[nodes[start:]]
            fresh = rows >= 0
            length = len(source.token_ids)
            positions = self._policy.positions(length, source.placeholders, source.images)
            prompt.next_position = positions[1:, -1].max() + 1
            prompt.next_text_position = length
            token_ids[rows[fresh]] = source.token_ids[start:][fresh]
            position_ids[:, rows[fresh]] = positions[:, start:][:, fresh]
            types[rows[fresh]] = mm_token_type_ids(length, source.placeholders)[start:][fresh]
            for placeholder, image in zip(source.placeholders, source.images, strict=True):
                first = int(row[nodes[placeholder.offset]])
                if first >= 0:
                    shown.setdefault(first, image)
        images = [image for _, image in sorted(shown.items(), key=lambda item: item[0])]

        segments: list[Segment] = []
        segment_of: dict[int, int] = {}
        for index, (parent, start, end) in enumerate(tree.segments):
            # A segment may begin in the pool and go on in new rows: cut it there.
            fresh_from = start + int((row[start:end] < 0).sum())
            above = segment_of[parent] if parent >= 0 else -1
            for a, b in ((start, fresh_from), (fresh_from, end)):
                if a < b:
                    fresh_rows = row[a:b] if a == fresh_from else np.empty(0, np.int64)
                    segments.append(Segment(above, slot[a:b], fresh_rows))
                    above = len(segments) - 1
            segment_of[index] = above
        plan = plan_tree(segments, self._policy.device)
        last_rows = np.array([row[nodes[-1]] for nodes in tree.rows])
        hidden = self._forward(token_ids, position_ids, types, images, plan, first_slot)
        self._counters["inference/rows_prefill"] += len(new)
        ends = [end for _, _, end in tree.segments]
        for prompt, nodes in zip(prompts, tree.rows, strict=True):
            prompt.segment = segment_of[int(np.searchsorted(ends, nodes[-1], side="right"))]
        return [slot[nodes] for nodes in tree.rows], hidden[torch.from_numpy(last_rows)], segments

    def _decode(
        self,
        batch: Sequence[_Request],
        version: int,
        prompts: Sequence[_DistinctPrompt],
        request_prompt: Sequence[int],
        prompt_slots: Sequence[IntArray],
        hidden: Tensor,
        segments: Sequence[Segment],
    ) -> list[Completion]:
        sampled: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        finished: list[_Branch | None] = [None] * len(batch)
        stops = [frozenset(request.sampling.stop_token_ids) for request in batch]
        uniforms = [
            np.random.Generator(np.random.Philox(key=request.sampling.seed)).random(request.sampling.max_new_tokens)
            for request in batch
        ]
        chain = _SharedChain(prompts, segments, request_prompt)
        branches = [_Branch(i) for i in range(len(prompts))]
        for request, prompt in enumerate(request_prompt):
            branches[prompt].requests.append(request)
        for step in range(max(request.sampling.max_new_tokens for request in batch)):
            tokens, token_logprobs = self._sample(batch, branches, hidden, uniforms, step)
            children: list[_Branch] = []
            child_tokens: list[int] = []
            position = 0
            for branch in branches:
                by_token: dict[int, _Branch] = {}
                for request in branch.requests:
                    token = int(tokens[position])
                    sampled[request].append(token)
                    logprobs[request].append(float(token_logprobs[position]))
                    position += 1
                    if token in stops[request] or len(sampled[request]) == batch[request].sampling.max_new_tokens:
                        finished[request] = branch
                    else:
                        by_token.setdefault(token, _Branch(branch.prompt, branch.tail)).requests.append(request)
                for token, child in sorted(by_token.items()):
                    children.append(child)
                    child_tokens.append(token)
            if not children:
                break
            branches = children
            first_slot = self._allocate(len(branches))
            for i, branch in enumerate(branches):
                branch.tail = [*branch.tail, first_slot + i]
            paths = [
                np.concatenate([chain.private_slots[b.prompt], np.array(b.tail, dtype=np.int64)]) for b in branches
            ]
            plan = TreePlan(
                shared=chain.blocks([b.prompt for b in branches], self._policy.device),
                local=local_blocks(
                    paths,
                    [np.array([i]) for i in range(len(branches))],
                    [len(path) - 1 for path in paths],
                    self._policy.device,
                ),
            )
            at = np.array([[prompts[b.prompt].next_text_position, prompts[b.prompt].next_position] for b in branches])
            positions = np.stack([at[:, 0], at[:, 1], at[:, 1], at[:, 1]]) + step
            types = np.zeros(len(branches), np.int64)
            hidden = self._forward(np.array(child_tokens), positions, types, [], plan, first_slot)
            self._counters["inference/rows_decode"] += len(branches)

        completions = []
        for request, (entry, last) in enumerate(zip(batch, finished, strict=True)):
            assert last is not None
            prompt = request_prompt[request]
            token_ids = np.array(sampled[request], dtype=np.int64)
            entry.session.cached = _Cached(
                version,
                np.concatenate([prompts[prompt].keys, token_ids[:-1]]),
                np.concatenate([prompt_slots[prompt], np.array(last.tail, dtype=np.int64)]),
            )
            completions.append(
                Completion(
                    token_ids=token_ids,
                    logprobs=np.array(logprobs[request], dtype=np.float32),
                    versions=np.full(len(token_ids), version, dtype=np.int64),
                    finish_reason="stop" if sampled[request][-1] in stops[request] else "length",
                )
            )
        return completions

    def _sample(
        self,
        batch: Sequence[_Request],
        branches: Sequence[_Branch],
        hidden: Tensor,
        uniforms: Sequence[np.ndarray],
        step: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and logprobs, in the order of `branches` and their requests."""
        temperatures = {batch[request].sampling.temperature for branch in branches for request in branch.requests}
        row = np.repeat(np.arange(len(branches)), [len(branch.requests) for branch in branches])
        order = [request for branch in branches for request in branch.requests]
        tokens = np.empty(len(order), np.int64)
        chosen = np.empty(len(order), np.float32)
        for temperature in temperatures:
            mine = np.array([i for i, r in enumerate(order) if batch[r].sampling.temperature == temperature])
            log_probs = self._policy.log_probs(hidden, temperature)
            if temperature == 0:
                picked = log_probs.argmax(-1).cpu().numpy()[row[mine]]
            else:
                # Inverse of the cumulative distribution, in float64; the last nonzero token takes the rounding.
                cumulative = log_probs.double().exp().cumsum(-1)
                cumulative /= cumulative[:, -1:].clone()
                draw = torch.tensor([uniforms[order[i]][step] for i in mine], dtype=torch.float64)
                rows = cumulative[torch.from_numpy(row[mine])]
                picked = torch.searchsorted(rows, draw.to(rows.device)[:, None], right=True)[:, 0].cpu().numpy()
                picked = picked.clip(max=rows.shape[1] - 1)  # of NaN; caught below
            tokens[mine] = picked
            chosen[mine] = log_probs[torch.from_numpy(row[mine]), torch.from_numpy(picked)].cpu().numpy()
        if not np.isfinite(chosen).all():
            raise NonFiniteLossError(
                f"the policy of version {self._pool_version} gives probabilities that are not finite: continue from an "
                "earlier checkpoint, with a lower trainer.learning_rate"
            )
        return tokens, chosen

    def _forward(
        self,
        token_ids: np.ndarray,
        position_ids: np.ndarray,
        types: np.ndarray,
        images: Sequence[ImageItem],
        plan: TreePlan,
        first_slot: int,
    ) -> Tensor:
        """float [rows, hidden]; `images` stand in the order of their placeholders in the rows."""
        device = self._policy.device
        plan.pool, plan.first_slot = self._pool, first_slot
        features = self._encode(images)
        feature_rows = [np.empty(0, np.int64)]
        if features is not None:
            feature_rows += [
                np.arange(features.first[image.hash], features.first[image.hash] + image.num_tokens) for image in images
            ]
        return self._policy.hidden_states(
            to_device(token_ids, device),
            to_device(position_ids, device),
            to_device(types, device),
            plan,
            features,
            to_device(np.concatenate(feature_rows), device),
        )

    def _encode(self, images: Sequence[ImageItem]) -> ImageFeatures | None:
        """Features of the images, each encoded once per policy version."""
        missing = {image.hash: image for image in images if image.hash not in self._features}
        encoded = self._policy.encode_images(list(missing.values()))
        if encoded is not None:
            for image in missing.values():
                start = encoded.first[image.hash]
                levels = [level[start : start + image.num_tokens] for level in encoded.levels]
                self._features[image.hash] = ImageFeatures(levels, {image.hash: 0})
        if not images:
            return None
        distinct = list({image.hash: image for image in images}.values())
        first, total = {}, 0
        for image in distinct:
            first[image.hash] = total
            total += image.num_tokens
        per_image = [self._features[image.hash].levels for image in distinct]
        return ImageFeatures([torch.cat(level) for level in zip(*per_image, strict=True)], first)

    def _allocate(self, slots: int) -> int:
        """Reserve `slots` slots in a row; the pool doubles when it is full."""
        first = self._used
        self._used += slots
        if self._used > self._capacity:
            self._capacity = max(4096, 2 * self._used)
            pool = self._policy.kv_pool(self._capacity)
            for old, new in zip(
                [*self._pool.keys, *self._pool.values], [*pool.keys, *pool.values], strict=bool(self._pool.keys)
            ):
                new[:, :first] = old[:, :first]
            self._pool = pool
        return first


@dataclass(eq=False)
class _DistinctPrompt:
    prompt: Prompt
    keys: IntArray
    """int64 [P]; token ids, images by number (`ImageKeys`)."""
    cached: int = 0
    """Leading tokens that are in the pool."""
    cached_slots: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [cached]."""
    next_position: int = 0
    """MRoPE position of the first sampled token."""
    next_text_position: int = 0
    segment: int = -1
    """Index of the segment that the prompt ends in."""


class _SharedChain:
    """Which part of each prompt is read through shared blocks while decoding, and which part is private."""

    def __init__(
        self, prompts: Sequence[_DistinctPrompt], segments: Sequence[Segment], request_prompt: Sequence[int]
    ) -> None:
        below = [0] * len(segments)
        for number in request_prompt:
            segment = prompts[number].segment
            while segment >= 0:
                below[segment] += 1
                segment = segments[segment].parent
        shared = shared_segments([s.parent for s in segments], [len(s.slots) for s in segments], below)
        self._segments = segments
        self._members: dict[int, list[int]] = {i: [] for i in range(len(segments)) if shared[i]}
        """Shared segment → indices of the prompts below it, ascending and contiguous."""
        self.private_slots: list[IntArray] = []
        for index, prompt in enumerate(prompts):
            private: list[IntArray] = []
            segment = prompt.segment
            while segment >= 0:
                if shared[segment]:
                    self._members[segment].append(index)
                else:
                    private.append(segments[segment].slots)
                segment = segments[segment].parent
            self.private_slots.append(np.concatenate([np.empty(0, np.int64), *reversed(private)]))

    def blocks(self, row_prompts: Sequence[int], device: torch.device) -> list[SharedBlock]:
        """Shared blocks over rows whose prompts are `row_prompts` (ascending)."""
        blocks = []
        for segment, members in self._members.items():
            start, end = np.searchsorted(row_prompts, [members[0], members[-1] + 1])
            if start < end:
                slots = to_device(self._segments[segment].slots, device)
                blocks.append(SharedBlock(int(start), int(end), slots))
        return blocks
