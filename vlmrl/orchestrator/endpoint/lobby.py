"""Sessions for clients that know none (mode=serve): each conversation is one.

    X-Session-ID: run-17            the session of that name
    no header, messages go on       the session whose answer they extend
    no header, a new conversation   a new session

A conversation is over when no request has come for a while. Then its session is closed and handed on as a rollout
without a reward.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from vlmrl.errors import UserFault, safe_text
from vlmrl.orchestrator.endpoint.conversation import conversation_of
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import DropReason, InferenceEngine, Rollout, StopReason

MAX_NAME = 200
"""Longest X-Session-ID, in characters."""

MakeSessionSampling = Callable[[str], SessionSampling]
"""Rollout id → how the answers of its session are sampled."""


@dataclass(eq=False)
class _Conversation:
    """An open session."""

    session: ChatSession
    closing: AsyncExitStack
    name: str
    started: float
    used: float
    """When its last request came, by the clock of the lobby."""


class ConversationLobby:
    """A `Lobby` that opens sessions and closes them when they are idle. Use it in one event loop."""

    def __init__(
        self,
        key: str,
        renderer: Renderer,
        engine: InferenceEngine,
        sampling: MakeSessionSampling,
        budgets: Budgets,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = key
        self._renderer, self._engine, self._sampling, self._budgets = renderer, engine, sampling, budgets
        self._idle_s, self._clock = idle_s, clock
        self._open: dict[str, _Conversation] = {}
        """By rollout id."""
        self._named: dict[str, _Conversation] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._open)

    async def session(self, name: str | None, request: ChatRequest) -> ChatSession:
        """The session of a request. Raises `RefusedError`."""
        if name is not None and len(name) > MAX_NAME:
            raise RefusedError(
                f"X-Session-ID has {len(name)} characters, and may have at most {MAX_NAME}", param="X-Session-ID"
            )
        found = self._named.get(name) if name is not None else await self._extended_by(request)
        if found is None:
            found = await self._new(name)
        found.used = self._clock()
        return found.session

    async def _extended_by(self, request: ChatRequest) -> _Conversation | None:
        """The conversation that has the longest answer's conversation in common with the request."""
        if not any(message.role == "assistant" for message in request.messages):
            return None
        try:
            conversation = await conversation_of(request, self._renderer, {})
        except UserFault:
            return None  # a new session, which refuses it with words
        found = [(each.session.known(conversation), each) for each in self._open.values()]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return best if length else None

    async def _new(self, name: str | None) -> _Conversation:
        self._count += 1
        block, place = divmod(self._count - 1, 100)
        id = f"serve/{block + 1:06d}/{place:02d}/00"
        closing = AsyncExitStack()
        engine = await closing.enter_async_context(self._engine.session(id, is_awaited=False))
        session = ChatSession(id, self._renderer, engine, self._sampling(id), self._budgets, samples_again=True)
        now = self._clock()
        made = self._open[id] = _Conversation(session, closing, name or id, now, now)
        if name is not None:
            self._named[name] = made
        return made

    async def finished(self, *, everything: bool = False) -> list[Rollout]:
        """Close the conversations that are over, or all, and return them as rollouts without a reward."""
        now = self._clock()
        over = [
            (id, each)
            for id, each in self._open.items()
            if everything or (now - each.used > self._idle_s and not each.session.is_busy)
        ]
        for id, each in over:
            del self._open[id]
            if self._named.get(each.name) is each:
                del self._named[each.name]
        return await asyncio.gather(*(_rollout(each, now) for _, each in over))


async def _rollout(conversation: _Conversation, now: float) -> Rollout:
    session = conversation.session
    turns = session.close()
    await conversation.closing.aclose()
    rollout = Rollout.unplayed(session.rollout_id, "serve", problem_index=0, index=0)
    rollout.problem_id = conversation.name
    rollout.turns = turns
    rollout.metrics = session.metrics()
    rollout.stop_reason = session.stop_reason or StopReason.TERMINATED
    rollout.seconds = now - conversation.started
    rollout.dropped = DropReason.NO_REWARD
    if not turns:
        rollout.dropped = DropReason.EMPTY
    if rollout.stop_reason.is_fault:
        rollout.dropped = DropReason.FAULT
        fault = session.fault
        rollout.error = fault.text if isinstance(fault, UserFault) else safe_text(fault)
    return rollout
