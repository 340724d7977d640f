"""`inference=vllm`: vLLM servers as the sampler; see `vlmrl.types.InferenceEngine`.

    session ──▶ the replica with the fewest sessions ──▶ VllmClient ──HTTP──▶ server
                 dies? ─▶ started again ─▶ gets the current weights ─▶ takes requests again
                          its sessions move to another replica, their lost turns are asked again

A session stays on its replica, whose prefix cache has its earlier turns. Nothing is sampled before the weight sync has
published: a server starts with the checkpoint's weights, which have no version.

Left out on purpose: a bound on requests in flight (the orchestrator's), hedged requests, moving a session for balance.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmrl.config.inference import VllmConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.client import ImageEncoder, ServerLostError, VllmClient
from vlmrl.inference.vllm.frames import ROUTE
from vlmrl.inference.vllm.server import (
    HEALTH_POLL_S,
    NEW_FLAGS,
    SERVER_FLAGS,
    STOP_S,
    VllmServer,
    WeightTransfer,
    command_line,
)
from vlmrl.inference.vllm.slurm_servers import find_servers
from vlmrl.inference.vllm.wire import Answer
from vlmrl.types import Completion, Prompt, SamplingParams

SETTLE_S = 0.2
"""Seconds between two looks at a server that has dropped a request: is it dying, or was it this connection only?"""


@dataclass(eq=False)
class Replica:
    """One place for a server; servers come and go in it."""

    name: str
    """For messages; of a server that the run did not start, its URL."""
    server: VllmServer | None
    """None for a server that the run did not start."""
    key: str | None = None
    """API key of such a server."""
    client: VllmClient | None = None
    """Of the server's present life."""
    is_ready: bool = False
    """Up, and its weights are those that were published last (or none were yet)."""
    error: EngineError | None = None
    """Why it is given up; the run goes on with the others."""
    version: int = -1
    """Policy version of its weights; −1 before the first one was published."""
    sessions: int = 0
    restarts: int = 0
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a server that the run did not start was found not to be healthy."""


class VllmSession:
    """One rollout's hold on the engine."""

    def __init__(self, engine: VllmEngine, rollout_id: str) -> None:
        self._engine = engine
        self.rollout_id = rollout_id
        self.replica: Replica | None = None

    async def __aenter__(self) -> VllmSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the place on the replica back."""
        if self.replica is not None:
            self.replica.sessions -= 1
            self.replica = None

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """See `vlmrl.types.EngineSession.generate`."""
        return await self._engine.generate(self, prompt, sampling)


class VllmEngine:
    """Replicas, and the sessions on them."""

    def __init__(
        self,
        config: VllmConfig,
        checkpoint: Path,
        log_folder: Path,
        flat_mm_kwargs: Collection[str],
        on_progress: Callable[[str], None],
        warn: Callable[[str], None],
        weight_transfer: WeightTransfer | None = None,
    ) -> None:
        """`checkpoint` is a folder; `log_folder` gets `vllm_<replica>.log`; `flat_mm_kwargs` are the `mm_kwargs` that a
        batch of images concatenates (vllm_wire.encode_image); `on_progress` gets a line now and then while servers
        start, `warn` one for each that has died; `weight_transfer` as `VllmServer`'s."""
        self._config = config
        self._encoder = ImageEncoder(config.dtype, flat_mm_kwargs)
        self._run = log_folder.parent
        self._on_progress = on_progress
        self._warn = warn
        self._counts: Counter[str] = Counter()
        self._restore: Callable[[Replica], Awaitable[None]] | None = None
        self._changed = asyncio.Condition()
        self._retired: list[VllmClient] = []
        """Clients of servers that are gone; requests of theirs may still be failing."""
        self._watchers: list[asyncio.Task[None]] = []
        if config.urls:
            self.replicas = [Replica(url, None, os.environ.get("VLLM_API_KEY")) for url in config.urls]
        elif config.slurm_tasks:
            self.replicas = []  # found by `start`
        else:
            servers = [
                VllmServer(config, index, checkpoint, log_folder / f"vllm_{index}.log", weight_transfer)
                for index in range(config.replicas)
            ]
            self.replicas = [Replica(server.name, server) for server in servers]

    # ── the engine's life ───────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Bring all servers up. Raises `EngineError` where one does not come up, and leaves none running then."""
        if self._config.slurm_tasks:
            found = await find_servers(self._run, self._config.startup_timeout_s, self._on_progress)
            self.replicas = [Replica(server.url, None, server.key) for server in found]
        coming = [asyncio.create_task(self._bring_up(replica)) for replica in self.replicas]
        try:
            await asyncio.wait(coming, return_when=asyncio.FIRST_EXCEPTION)
            for task in coming:
                if task.done():
                    task.result()
        except BaseException:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)
            await self.stop()
            raise
        for replica in self.replicas:
            replica.is_ready = True
            self._watchers.append(asyncio.create_task(self._watch(replica)))

    async def stop(self) -> None:
        """Leave nothing running. May be called twice."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        await asyncio.gather(*(self._take_down(replica) for replica in self.replicas))
        await asyncio.gather(*(client.close() for client in self._retired))
        self._retired.clear()

    def session(self, rollout_id: str) -> VllmSession:
        """Open a session; it gets its replica with its first request."""
        return VllmSession(self, rollout_id)

    def metrics(self) -> dict[str, float]:
        """Counters since the last call.

        `wire/bytes_sent` of request bodies; `wire/bytes_saved`: what sending every image with every request would have
        cost on top; `wire/images_sent`, `wire/images_forgotten` (requests that a server lacked an image for);
        `inference/requests`, `inference/retries` (lost turns asked again), `inference/restarts`, `inference/timeouts`.
        """
        wire = ("wire/bytes_sent", "wire/bytes_saved", "wire/images_sent", "wire/images_forgotten")
        faults = ("inference/requests", "inference/retries", "inference/restarts", "inference/timeouts")
        counts = {name: float(self._counts[name]) for name in (*wire, *faults)}
        self._counts.clear()
        return counts

    # ── for the weight sync ─────────────────────────────────────────────────────────────────────────────────

    @property
    def config(self) -> VllmConfig:
        return self._config

    def restore_with(self, restore: Callable[[Replica], Awaitable[None]]) -> None:
        """Have `restore` bring the published weights to a replica that has come back, before it is asked anything."""
        self._restore = restore

    def remove_if_killed(self, folder: Path) -> None:
        """Have `folder` removed if the run dies before it can do so itself."""
        for replica in self.replicas:
            if replica.server is not None:
                replica.server.remove_if_killed(folder)

    def ready_replicas(self) -> list[Replica]:
        """Those that take requests. Raises `EngineError` where none does or ever will."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        given_up = [replica.error for replica in self.replicas if replica.error is not None]
        if not ready and len(given_up) == len(self.replicas):
            raise EngineError(f"no vLLM server is left: {given_up[0]}")
        return ready

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, session: VllmSession, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Sample one completion for a session, on another server if the session's own dies under it."""
        for attempt in range(self._config.max_retries + 1):
            replica = await self._replica_of(session)
            client, version = replica.client, replica.version
            assert client is not None
            try:
                answer = await client.generate(session.rollout_id, prompt, sampling)
            except ServerLostError as error:
                lost = error
                if attempt < self._config.max_retries:
                    self._counts["inference/retries"] += 1
                    await self._settle(replica, client)
                continue
            return _completion(session.rollout_id, answer, version, sampling)
        raise EngineError(
            f"rollout {session.rollout_id}: lost {self._config.max_retries + 1} times, the last time because {lost}; "
            "inference.max_retries bounds this"
        )

    async def _replica_of(self, session: VllmSession) -> Replica:
        """The session's replica, or the one with the fewest sessions if it has none that is ready; waits for one."""
        async with self._changed:
            while session.replica is None or not session.replica.is_ready:
                session.leave()
                ready = self.ready_replicas()
                if ready:
                    session.replica = min(ready, key=lambda replica: replica.sessions)
                    session.replica.sessions += 1
                else:
                    await self._changed.wait()
            return session.replica

    async def _settle(self, replica: Replica, client: VllmClient) -> None:
        """Return when it is known whether the server that dropped a request is alive."""
        give_up = time.monotonic() + STOP_S
        while replica.is_ready and replica.client is client and not await client.is_healthy():
            if replica.server is None:
                replica.suspected.set()
            elif time.monotonic() > give_up:  # neither healthy nor ending
                await replica.server.stop()
            await asyncio.sleep(SETTLE_S)

    # ── servers that die and come back ──────────────────────────────────────────────────────────────────────

    async def _watch(self, replica: Replica) -> None:
        """Wait for a replica's death and bring it back, as often as `max_restarts` allows."""
        try:
            while True:
                what = await self._death(replica)
                await self._set_ready(replica, False)
                await self._bring_back(replica, what)
                await self._set_ready(replica, True)
        except EngineError as error:
            replica.error = error
        finally:
            # Whoever waits for the replica must not wait for ever, whatever ended the watch.
            replica.error = replica.error or EngineError(f"{replica.name} was stopped")
            await self._set_ready(replica, False)

    async def _bring_back(self, replica: Replica, what: str) -> None:
        """A new life, with the published weights. Raises `EngineError` when the last restart has failed."""
        error = EngineError(f"{replica.name} {what}")
        if replica.server is not None:
            error = replica.server.error(what)
        while replica.restarts < self._config.max_restarts:
            replica.restarts += 1
            self._counts["inference/restarts"] += 1
            self._warn(f"{replica.name} {what}; restart {replica.restarts} of {self._config.max_restarts}")
            try:
                await self._bring_up(replica)
                if self._restore is not None:
                    await self._restore(replica)
                return
            except ServerLostError as lost:
                what, error = "was lost again", EngineError(str(lost))
            except EngineError as failed:
                what, error = "did not come back", failed
        await self._take_down(replica)
        raise EngineError(f"given up after inference.max_restarts={self._config.max_restarts} restarts: {error}")

    async def _bring_up(self, replica: Replica) -> None:
        """A new life: process (if it is ours), health, client, settings."""
        await self._take_down(replica)
        replica.suspected.clear()
        replica.version = -1
        server = replica.server
        if server is not None:
            await server.launch()
        url, key = (server.url, server.api_key) if server else (replica.name, replica.key)
        client = VllmClient(replica.name, url, key, self._encoder, self._counts, self._config.request_timeout_s)
        replica.client = client
        if server is not None:
            await server.wait_healthy(client.is_healthy, self._on_progress)
        else:
            await self._wait_healthy(replica, client)
        await check_settings(client, self._config)

    async def _wait_healthy(self, replica: Replica, client: VllmClient) -> None:
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                while not await client.is_healthy():
                    self._on_progress(f"{replica.name}: waiting for its health")
                    await asyncio.sleep(HEALTH_POLL_S)
        except TimeoutError:
            raise EngineError(
                f"inference.urls: {replica.name} was not healthy within inference.startup_timeout_s="
                f"{self._config.startup_timeout_s:g}: start it, or take it out of inference.urls"
            ) from None

    async def _take_down(self, replica: Replica) -> None:
        replica.is_ready = False
        client, replica.client = replica.client, None
        if client is not None:
            self._retired.append(client)
        if replica.server is not None:
            await replica.server.stop()

    async def _death(self, replica: Replica) -> str:
        if replica.server is None:
            await replica.suspected.wait()
            return "does not answer"
        return f"ended with status {await replica.server.exited()}"

    async def _set_ready(self, replica: Replica, is_ready: bool) -> None:
        async with self._changed:
            replica.is_ready = is_ready
            self._changed.notify_all()


async def check_settings(client: VllmClient, config: VllmConfig) -> None:
    """Refuse a server whose samples the trainer could not learn from. Raises `EngineError`."""
    try:
        (settings, *_) = await client.call_workers("vlmrl_settings")
    except EngineError as error:
        flags = command_line(SERVER_FLAGS | NEW_FLAGS)
        raise EngineError(
            f"{error}; a server of inference.urls is started with VLLM_SERVER_DEV_MODE=1, vlmrl on its PYTHONPATH, and "
            f"vllm serve {' '.join(flags)}"
        ) from error
    demands = [
        ("logprobs_mode", "processed_logprobs", "its logprobs are not those of the distribution it samples from"),
        ("mm_device_do_normalize", False, "it normalizes pixels that are normalized already"),
        ("dtype", config.dtype.value, "it rounds otherwise than the trainer"),
    ]
    for name, value, consequence in demands:
        if settings[name] != value:
            raise EngineError(
                f"{client.name} runs with {name}={settings[name]}, so {consequence}: start it with {name}={value}"
            )
    if settings["max_model_len"] < config.max_model_len:
        raise EngineError(
            f"{client.name} runs with max_model_len={settings['max_model_len']}, so it refuses prompts that "
            f"inference.max_model_len={config.max_model_len} allows: raise the one or lower the other"
        )
    client.keeps_images = settings["keeps_images"]
    client.has_route = await client.call("GET", ROUTE, optional=True) is not None


def _completion(rollout_id: str, answer: Answer, version: int, sampling: SamplingParams) -> Completion:
    """`version` is that of the server when the request was sent: the oldest that a token can have."""
    versions = answer.versions
    if versions is None:
        versions = np.full(len(answer.token_ids), version, np.int64)
    stopped = int(answer.token_ids[-1]) in sampling.stop_token_ids
    if answer.finish_reason != ("stop" if stopped else "length"):
        raise EngineError(
            f"rollout {rollout_id}: the server says finish_reason={answer.finish_reason}, but the last token is "
            f"{answer.token_ids[-1]} and the stop tokens are {sampling.stop_token_ids}"
        )
    return Completion(answer.token_ids, answer.logprobs, versions, "stop" if stopped else "length")
