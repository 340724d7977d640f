"""One rollout through the chat endpoint: open a session, let a program play, and take the turns.

    Seat ─▶ ChatSession ─▶ Endpoint.open ─▶ address ─▶ the program plays ─▶ Result
                 └──────────── close ─▶ turns ─────────────────────────────────┴─▶ rollout, StopReason

A program that is refused an answer often ends with an error of its own. So an engine that failed, an image that cannot
be read and a budget that is used up are recorded in place of that error.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmrl.config.run import RunConfig
from vlmrl.errors import EngineError
from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.server import Endpoint, SessionAddress
from vlmrl.orchestrator.endpoint.session import Budgets, ChatAnswer, ChatSession
from vlmrl.orchestrator.envs.base import Seat
from vlmrl.orchestrator.programs.results import UNPAID, Result
from vlmrl.rendering.images import ImageError, decode, image_hash
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.border import TaskCodeError, TaskTimeoutError
from vlmrl.types import EngineSession, EnvTime, Image, Message, Rollout, StopReason, Text, Video, VideoItem

Play = Callable[[SessionAddress], Awaitable[Result]]
"""Lets a program play with the session at an address. Raises `TaskCodeError`."""


class EndpointOfRun:
    """The endpoint of a run, which starts with the first program."""

    def __init__(self, model: str, *, temperature: float) -> None:
        """`model` is the name in the answers; `temperature` is the run's own (`Endpoint`)."""
        self.endpoint = Endpoint(model, temperature=temperature)
        self._starting = asyncio.Lock()

    @staticmethod
    def of(config: RunConfig) -> EndpointOfRun:
        """The endpoint of a run with this config."""
        return EndpointOfRun(config.model.name, temperature=config.orchestrator.temperature)

    async def open(self, session: ChatSession) -> SessionAddress:
        """Serve a session until it is closed. Raises OSError where this machine has no port left."""
        async with self._starting:
            if self.endpoint.failure is None:
                await self.endpoint.start()
        return self.endpoint.open(session)

    async def stop(self) -> None:
        """Close every connection. May be called twice, and without a start."""
        await self.endpoint.stop()

    async def unless_failed(self, playing: Awaitable[Result]) -> Result:
        """The result of a program; raises the endpoint's own error where that comes first, because it ends the run."""
        task = asyncio.ensure_future(playing)
        failure = self.endpoint.failure
        assert failure is not None, "a session was opened"
        waiting: set[asyncio.Future[Any]] = {task, failure}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                failure.result()
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


@asynccontextmanager
async def in_slot(slots: asyncio.Semaphore, spent: EnvTime) -> AsyncIterator[None]:
    """Play inside the block once a slot is free. The wait and the time of the block are added to `spent`."""
    queued = time.monotonic()
    async with slots:
        started = time.monotonic()
        spent.queue_s += started - queued
        spent.resets += 1
        try:
            yield
        finally:
            spent.reset_s += time.monotonic() - started


async def play_by_chat(
    rollout: Rollout,
    seat: Seat,
    endpoint: EndpointOfRun,
    play: Play,
    *,
    noise: bool = False,
    client_samples: bool = False,
) -> StopReason:
    """Fill turns, reward and metrics of `rollout`; return why it ended. With `noise` the policy sees noise in place of
    every image. `client_samples`: `SessionSampling`. Raises `UserFault` and `EngineError`."""
    sampling = SessionSampling(seat.sampling, seat.seed, client_samples)
    kind = NoiseSession if noise else ChatSession
    budgets = Budgets(seat.max_turns, seat.max_new_tokens, seat.max_model_len, seat.max_frames)
    chat = kind(rollout.rollout_id, seat.renderer, seat.engine, sampling, budgets)
    fault: TaskCodeError | None = None
    result = UNPAID
    try:
        result = await endpoint.unless_failed(play(await endpoint.open(chat)))
    except TaskCodeError as error:
        fault = error
    finally:
        rollout.turns, rollout.chat_use = chat.close(result.lanes), chat.use
    if chat.failure is not None:
        raise chat.failure
    rollout.reward, rollout.metrics, rollout.rewards = result.reward, result.metrics, dict(result.rewards)
    return ending(chat, fault)


def ending(chat: ChatSession, fault: TaskCodeError | None) -> StopReason:
    """Why a rollout ended, from its session and the program's own fault. Raises `UserFault` and `EngineError`."""
    if isinstance(chat.fault, EngineError):
        raise chat.fault
    reason = chat.stop_reason
    if fault is None:
        return reason if reason is not None and reason.is_truncated else StopReason.TERMINATED
    is_used_up = reason in (StopReason.MAX_TURNS, StopReason.CONTEXT_FULL, StopReason.FRAMES_FULL)
    if reason is not None and is_used_up and not isinstance(fault, TaskTimeoutError):
        return reason
    raise fault if chat.fault is None or isinstance(fault, TaskTimeoutError) else chat.fault


class NoiseSession(ChatSession):
    """A session that shows noise in place of every image and video of the program's."""

    def __init__(
        self,
        rollout_id: str,
        renderer: Renderer,
        engine: EngineSession,
        sampling: SessionSampling,
        budgets: Budgets,
    ) -> None:
        super().__init__(rollout_id, renderer, engine, sampling, budgets)
        self._by_pixels: dict[str, Image] = {}
        self._by_image: dict[Image, Image] = {}  # so that an image is decoded once
        self._by_clip: dict[str, Video] = {}
        self._by_video: dict[Video, Video] = {}
        self._lock = asyncio.Lock()

    async def answer(self, request: ChatRequest) -> ChatAnswer:
        try:
            async with self._lock:
                messages = await asyncio.to_thread(self._in_noise, request.messages)
        except ImageError:  # the session says so
            messages = request.messages
        return await super().answer(replace(request, messages=messages))

    def _in_noise(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(
            replace(
                message,
                content=tuple(part if isinstance(part, Text) else self._noise_for(part) for part in message.content),
            )
            for message in messages
        )

    def _noise_for(self, part: Image | Video) -> Image | Video:
        """Noise of the size of an image or a video. It depends on the rollout and on which image or video of it this
        is, and on no pixel."""
        return self._noise_for_video(part) if isinstance(part, Video) else self._noise_for_image(part)

    def _noise_for_image(self, image: Image) -> Image:
        if image not in self._by_image:
            pixels = decode(image.source)
            noise = Image(self._noise(f"{len(self._by_pixels)}", pixels.shape))
            self._by_image[image] = self._by_pixels.setdefault(image_hash(pixels), noise)
        return self._by_image[image]

    def _noise_for_video(self, video: Video) -> Video:
        if video not in self._by_video:
            (item,) = self._renderer.items([video])
            assert isinstance(item, VideoItem)
            frames = self._noise(f"video/{len(self._by_clip)}", item.frames.shape)
            noise = Video(frames, fps=item.rate, times=tuple(item.times.tolist()))
            self._by_video[video] = self._by_clip.setdefault(item.hash, noise)
        return self._by_video[video]

    def _noise(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        digest = hashlib.blake2b(f"noise/{self.rollout_id}/{name}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "big")).integers(0, 256, shape, np.uint8)
