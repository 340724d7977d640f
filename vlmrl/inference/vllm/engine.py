"""`inference=vllm`: vLLM servers sample; see `vlmrl.types.InferenceEngine`.

    session ──▶ the replica with the fewest sessions ──▶ VllmClient ──HTTP──▶ server
                 dies or hangs? ─▶ is restarted ─▶ gets the published weights ─▶ takes requests again
                                   its sessions move to another replica, and their lost turns are sent again

A session stays on its replica, whose prefix cache has the session's earlier turns. The run publishes its weights before
the first request, because a server starts with the checkpoint's weights, which have no version.

Left out on purpose: a limit on requests in flight (the orchestrator has one), hedged requests, and moving sessions to
balance the load.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmrl.config.inference import VllmConfig
from vlmrl.errors import EngineError, EngineLostError, VlmrlError
from vlmrl.inference.stop_strings import TextOf
from vlmrl.inference.vllm import progress
from vlmrl.inference.vllm.arguments import WeightTransfer
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.completions import completion_of
from vlmrl.inference.vllm.control import ServerLostError
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.inference.vllm.server import HEALTH_POLL_S, VllmServer
from vlmrl.inference.vllm.settings import check_settings
from vlmrl.inference.vllm.slurm_servers import Announced, announced, find_servers
from vlmrl.types import Completion, Prompt, SamplingParams

SETTLE_S = 0.2
"""Seconds between two health checks of a server that has dropped a request: either it is dying, or only the connection
broke."""


LOCAL_URL = "http://127.0.0.1"
"""URL of a server that the run reaches by a Unix socket. Its host is that of the weight transfer."""


@dataclass(eq=False)
class Replica:
    """One server, through all its restarts."""

    name: str
    """Name in messages; the URL of a server that the run did not start."""
    server: VllmServer | None
    """None for a server that the run did not start."""
    key: str | None = None
    """API key of a server that the run did not start; None for no key."""
    announcement: Path | None = None
    """Where a server on another task of the Slurm job announces URL and key, which are new after each restart."""
    client: VllmClient | None = None
    """Client of the current launch; None while the server is down."""
    is_ready: bool = False
    """The server is up, and it has the weights that were published last, if any were."""
    error: Exception | None = None
    """Why the run has given up this replica; None while it has not. The run goes on with the others. An error that is
    no `EngineError` is a bug."""
    version: int = -1
    """Policy version of the server's weights; −1 before it has received any."""
    sessions: int = 0
    restarts: int = 0
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a health check of a server that the run did not start has failed."""

    @property
    def takes_requests(self) -> bool:
        """Whether the server is ready and has not been given up."""
        return self.is_ready and self.client is not None and not self.client.given_up.is_set()


class VllmSession:
    """One rollout's session; implements `vlmrl.types.EngineSession`."""

    def __init__(self, engine: VllmEngine, rollout_id: str) -> None:
        self._engine = engine
        self.rollout_id = rollout_id
        self.replica: Replica | None = None

    async def __aenter__(self) -> VllmSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop counting as a session of the replica."""
        if self.replica is not None:
            self.replica.sessions -= 1
            self.replica = None

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """See `vlmrl.types.EngineSession.generate`."""
        return await self._engine.generate(self, prompt, sampling)


class VllmEngine:
    """Distributes sessions over replicas and restarts replicas that die; implements `vlmrl.types.InferenceEngine`."""

    def __init__(
        self,
        config: VllmConfig,
        checkpoint: Path,
        log_folder: Path,
        on_progress: Callable[[str], None],
        warn: Callable[[str], None],
        weight_transfer: WeightTransfer | None = None,
        image_sizes: Mapping[str, Any] = MappingProxyType({}),
        logit_scale: float | None = None,
        text_of: TextOf | None = None,
        top_k: int = 0,
    ) -> None:
        """`checkpoint` is a folder; `log_folder` gets `vllm_<replica>.log`; `on_progress` is called with a line about
        every half second while servers start, `warn` with a line for each server that has died; `weight_transfer` as
        for `VllmServer`; `image_sizes`: what the run sets of the image processor (`image_size.size_settings`);
        `logit_scale` and `top_k` as for `check_settings`; `text_of` is the renderer's `decode`, for stop strings."""
        self._text_of = text_of
        self._logit_scale, self._top_k = logit_scale, top_k
        self._config = config
        self._encoder = ItemEncoder(config.dtype, image_sizes)
        self._run = log_folder.parent
        self._on_progress = on_progress
        self._warn = warn
        self._counts: Counter[str] = Counter()
        self._restore: Callable[[Replica], Awaitable[None]] | None = None
        self._changed = asyncio.Condition()
        self._retired: list[VllmClient] = []
        """Clients of servers that have ended. Their requests may still be failing, so they are closed by `stop`."""
        self._watchers: list[asyncio.Task[None]] = []
        if config.urls:
            self.replicas = [Replica(url, None, os.environ.get("VLLM_API_KEY")) for url in config.urls]
        elif config.slurm_tasks:
            self.replicas = []  # `start` finds them
        else:
            servers = [
                VllmServer(config, index, checkpoint, log_folder / f"vllm_{index}.log", weight_transfer)
                for index in range(config.replicas)
            ]
            self.replicas = [Replica(server.name, server) for server in servers]

    # ── start and stop ──────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start all servers. If one does not start, stop the others and raise `EngineError`."""
        if self._config.slurm_tasks:
            found = await find_servers(self._run, self._config.startup_timeout_s, self._on_progress)
            self.replicas = [Replica(server.url, None, announcement=server.path) for server in found]
        coming = [asyncio.create_task(self._start(replica)) for replica in self.replicas]
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

    async def _start(self, replica: Replica) -> None:
        try:
            await self._bring_up(replica)
        except (ServerLostError, OSError) as error:
            raise EngineError(f"{replica.name} was lost while it started: {error}") from error

    async def stop(self) -> None:
        """Stop all servers and close all clients. May be called twice."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        await asyncio.gather(*(self._take_down(replica) for replica in self.replicas))
        await asyncio.gather(*(client.close() for client in self._retired))
        self._retired.clear()

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> VllmSession:
        """Open a session. Its first request chooses a replica."""
        return VllmSession(self, rollout_id)

    def metrics(self) -> dict[str, float]:
        """Counters since the last call.

        `wire/bytes_sent`: size of the request bodies; `wire/bytes_saved`: what sending every image with every request
        would have added; `wire/images_sent`; `wire/images_forgotten`: requests for which the server lacked an image;
        `inference/requests`; `inference/retries`: lost turns that were sent again; `inference/restarts`;
        `inference/timeouts`: servers that hung. Videos count as images.
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
        """Set the function that publishes the current weights to a restarted replica, before it gets requests."""
        self._restore = restore

    def remove_if_killed(self, folder: Path) -> None:
        """Have the servers' supervisors remove `folder` if the run dies before it can remove it itself."""
        for replica in self.replicas:
            if replica.server is not None:
                replica.server.remove_if_killed(folder)

    def ready_replicas(self) -> list[Replica]:
        """The replicas that take requests. Raises `EngineError` if the run has given up all replicas."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        given_up = [replica.error for replica in self.replicas if replica.error is not None]
        if not ready and len(given_up) == len(self.replicas):
            for error in given_up:
                if not isinstance(error, EngineError):
                    raise error
            raise EngineError(f"no vLLM server is left: {given_up[0]}")
        return ready

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, session: VllmSession, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Sample one completion for a session. If its server dies or hangs, send the request to another one.

        Raises `EngineLostError` after `inference.max_retries` retries, and `EngineError` where the server refuses the
        request.
        """
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
            return completion_of(session.rollout_id, answer, version, sampling, self._text_of)
        raise EngineLostError(
            f"rollout {session.rollout_id}: its request was lost {self._config.max_retries + 1} times, the limit that "
            f"inference.max_retries={self._config.max_retries} sets; the last error was: {lost}"
        )

    async def prefetch(self, prompt: Prompt) -> None:
        """Send the images of a prompt to every replica that takes requests, because siblings go to several. It reports
        no error and tries nothing again: what a server lacks, the request itself sends."""
        clients = [each.client for each in self.replicas if each.takes_requests and each.client is not None]
        for error in await asyncio.gather(*(client.prefetch(prompt) for client in clients), return_exceptions=True):
            if error is not None and not isinstance(error, EngineError | ServerLostError):
                raise error

    async def _replica_of(self, session: VllmSession) -> Replica:
        """The session's replica if it is ready, otherwise the ready one with the fewest sessions. Waits until one is
        ready."""
        async with self._changed:
            while session.replica is None or not session.replica.takes_requests:
                session.leave()
                ready = [replica for replica in self.ready_replicas() if replica.takes_requests]
                if ready:
                    session.replica = min(ready, key=lambda replica: replica.sessions)
                    session.replica.sessions += 1
                else:
                    await self._changed.wait()
            return session.replica

    async def _settle(self, replica: Replica, client: VllmClient) -> None:
        """A server dropped a request: return when it is known whether it is alive."""
        while replica.takes_requests and replica.client is client and not await client.is_healthy():
            if replica.server is None:
                replica.suspected.set()
            await asyncio.sleep(SETTLE_S)

    # ── restarts of servers that have died ──────────────────────────────────────────────────────────────────

    async def _watch(self, replica: Replica) -> None:
        """Restart the replica whenever it dies or hangs, as often as `max_restarts` allows."""
        try:
            while True:
                what = await self._death(replica)
                await self._set_ready(replica, False)
                await self._bring_back(replica, what)
                await self._set_ready(replica, True)
        except asyncio.CancelledError:
            replica.error = EngineError(f"{replica.name} was stopped")
            raise
        except Exception as error:  # noqa: BLE001 — a bug, too, must reach the requests that wait for a replica
            replica.error = error
        finally:
            # However this task ends, requests that wait for a replica must not wait forever.
            await self._set_ready(replica, False)

    async def _bring_back(self, replica: Replica, what: str) -> None:
        """Restart the replica and publish the current weights to it. Raises `EngineError` when the last restart has
        failed."""
        error: VlmrlError | OSError = EngineError(f"{replica.name} {what}")
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
            except (EngineError, OSError) as failed:
                what, error = "did not come back", failed
        await self._take_down(replica)
        raise EngineError(f"given up after inference.max_restarts={self._config.max_restarts} restarts: {error}")

    async def _bring_up(self, replica: Replica) -> None:
        """Start the server (if it is the run's own), wait until it is healthy, and check its settings. Raises
        `ServerLostError`, `EngineError` and `OSError`."""
        await self._take_down(replica)
        replica.suspected.clear()
        replica.version = -1
        server = replica.server
        if server is None:
            replica.client = client = await self._reach(replica)
        else:
            await server.launch()
            replica.client = client = self._client(replica.name, LOCAL_URL, server.api_key, server.socket)
            await server.wait_healthy(client.is_healthy, self._on_progress)
        await check_settings(client, self._config, self._logit_scale, self._top_k)

    async def _reach(self, replica: Replica) -> VllmClient:
        """Wait until a server that the run did not start is healthy → its client."""
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                while True:
                    found = Announced(replica.name, replica.key)
                    if replica.announcement is not None:
                        found = announced(replica.announcement)
                    client = self._client(replica.name, found.url, found.key)
                    # A restarted server of another task has a new key, and the file with it may arrive later.
                    if await client.is_healthy() and (replica.announcement is None or await client.accepts_key()):
                        return client
                    await client.close()
                    self._on_progress(f"{replica.name}: waiting until it is healthy")
                    await asyncio.sleep(HEALTH_POLL_S)
        except TimeoutError:
            raise EngineError(
                f"inference.urls: {replica.name} was not healthy within inference.startup_timeout_s="
                f"{self._config.startup_timeout_s:g}: start it, or remove it from inference.urls"
            ) from None

    def _client(self, name: str, url: str, key: str | None, unix_socket: Path | None = None) -> VllmClient:
        timeout_s = self._config.request_timeout_s
        return VllmClient(name, url, key, self._encoder, self._counts, timeout_s, unix_socket=unix_socket)

    async def _take_down(self, replica: Replica) -> None:
        replica.is_ready = False
        client, replica.client = replica.client, None
        if client is not None:
            self._retired.append(client)
        if replica.server is not None:
            await replica.server.stop()

    async def _death(self, replica: Replica) -> str:
        """Wait until the replica's server has ended, hangs or is unreachable → which of them, for a message."""
        client = replica.client
        assert client is not None
        hanging = asyncio.create_task(progress.watch(client, lambda: client.is_generating))
        ended = asyncio.create_task(replica.suspected.wait() if replica.server is None else replica.server.exited())
        try:
            await asyncio.wait({hanging, ended}, return_when=asyncio.FIRST_COMPLETED)
            if hanging.done():
                return hanging.result()
            return "does not answer" if replica.server is None else f"ended with status {ended.result()}"
        finally:
            hanging.cancel()
            ended.cancel()
            await asyncio.gather(hanging, ended, return_exceptions=True)

    async def _set_ready(self, replica: Replica, is_ready: bool) -> None:
        async with self._changed:
            replica.is_ready = is_ready
            self._changed.notify_all()
