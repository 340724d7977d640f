"""mode=serve's sessions: each conversation is one, named or found by its messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from support.chat import ChatRenderer, ScriptedEngine, asked, assistant, picture, user
from support.lockstep import END
from vlmrl.errors import EngineError
from vlmrl.orchestrator.endpoint.lobby import ConversationLobby
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.session import Budgets
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.types import DropReason, Rollout, StopReason

HI = user("hi")


def sampling(rollout_id: str) -> SessionSampling:
    return SessionSampling(OwnSampling(1.0, (END,), ()), seed=lambda number: number)


class Clock:
    """The time of a lobby, which the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lobby(script: Callable[[str], str] = lambda prompt: "ok", clock: Clock | None = None) -> ConversationLobby:
    """Conversations are over after a minute."""
    budgets = Budgets(max_turns=100, max_new_tokens=20, max_model_len=200)
    clock = Clock() if clock is None else clock
    return ConversationLobby("key", ChatRenderer(), ScriptedEngine(script), sampling, budgets, 60.0, clock)


async def told(lobby: ConversationLobby, request: ChatRequest, name: str | None = None) -> str:
    """The rollout that answers a request."""
    session = await lobby.session(name, request)
    await session.answer(request)
    return session.rollout_id


def play(script: Callable[[ConversationLobby], Any], where: ConversationLobby | None = None) -> list[Rollout]:
    """Play, and return the conversations as rollouts."""

    async def main() -> list[Rollout]:
        made = lobby() if where is None else where
        await script(made)
        assert isinstance(made._engine, ScriptedEngine)
        rollouts = await made.finished(everything=True)
        assert (len(made), made._engine.open) == (0, []), "an engine session was left open"
        return rollouts

    return asyncio.run(main())


def test_a_conversation_without_a_name_is_found_by_its_messages() -> None:
    async def script(lobby: ConversationLobby) -> None:
        first = [user("look", picture(1))]
        other = [user("look", picture(2))]
        one, two = await told(lobby, asked(*first)), await told(lobby, asked(*other))
        assert one != two
        assert await told(lobby, asked(*other, assistant("ok"), HI)) == two
        assert await told(lobby, asked(*first, assistant(" ok\n"), HI)) == one
        assert await told(lobby, asked(*first, assistant("never said"), HI)) not in (one, two)

    rollouts = play(script)
    assert [[turn.branch for turn in rollout.turns] for rollout in rollouts] == [[0, 0], [0, 0], [0]]
    assert {rollout.dropped for rollout in rollouts} == {DropReason.NO_REWARD}
    assert {rollout.stop_reason for rollout in rollouts} == {StopReason.TERMINATED}
    assert [rollout.rollout_id for rollout in rollouts] == [f"serve/000001/{n:02d}/00" for n in range(3)]


def test_the_same_question_is_sampled_again() -> None:
    async def script(lobby: ConversationLobby) -> None:
        assert await told(lobby, asked(HI)) != await told(lobby, asked(HI))
        go_on = asked(HI, assistant("ok"), user("again"))
        await told(lobby, go_on)
        await told(lobby, go_on)

    first, second = play(script)
    assert sorted([len(first.turns), len(second.turns)]) == [1, 3]


def test_a_name_chooses_the_session() -> None:
    async def script(lobby: ConversationLobby) -> None:
        assert await told(lobby, asked(HI), "a") == await told(lobby, asked(user("other")), "a")
        assert await told(lobby, asked(HI), "b") != await told(lobby, asked(HI), "a")
        with pytest.raises(RefusedError, match="at most 200"):
            await lobby.session("x" * 201, asked(HI))

    assert [rollout.problem_id for rollout in play(script)] == ["a", "b"]


def test_conversations_that_are_idle_are_over() -> None:
    async def main() -> None:
        clock = Clock()
        made = lobby(clock=clock)
        first = await told(made, asked(HI), "a")
        clock.now = 60.0
        assert await made.finished() == []
        clock.now = 61.0
        (rollout,) = await made.finished()
        assert (rollout.rollout_id, len(rollout.turns), rollout.seconds, len(made)) == (first, 1, 61.0, 0)
        assert await told(made, asked(HI), "a") != first
        assert await made.finished() == []
        assert len(await made.finished(everything=True)) == 1

    asyncio.run(main())


def test_a_conversation_that_is_being_sampled_is_not_idle() -> None:
    async def main() -> None:
        clock = Clock()
        made = lobby(clock=clock)
        assert isinstance(made._engine, ScriptedEngine)
        made._engine.gate = asyncio.Event()
        session = await made.session(None, asked(HI))
        pending = asyncio.create_task(session.answer(asked(HI)))
        while not session.is_busy:
            await asyncio.sleep(0)
        clock.now = 61.0
        assert await made.finished() == []
        made._engine.gate.set()
        await pending
        assert len(await made.finished()) == 1

    asyncio.run(main())


def test_an_engine_error_is_a_fault_of_its_conversation() -> None:
    def broken(prompt: str) -> str:
        raise EngineError("the server is gone")

    async def script(lobby: ConversationLobby) -> None:
        with pytest.raises(RefusedError, match="the server is gone"):
            await told(lobby, asked(HI))

    (rollout,) = play(script, lobby(broken))
    assert (rollout.stop_reason, rollout.dropped, rollout.error) == (
        StopReason.ENGINE_ERROR,
        DropReason.FAULT,
        "the server is gone",
    )


def test_a_conversation_without_an_answer_is_empty() -> None:
    async def script(lobby: ConversationLobby) -> None:
        with pytest.raises(RefusedError, match="shorten it"):
            await told(lobby, asked(user("x" * 300)))

    (rollout,) = play(script)
    assert (rollout.stop_reason, rollout.dropped) == (StopReason.CONTEXT_FULL, DropReason.EMPTY)
