"""Chat sessions: what is bridged, what is a branch, what is the same request, and how a rollout ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.chat import (
    ZOOM,
    ChatRenderer,
    ScriptedSession,
    asked,
    asked_otherwise,
    assistant,
    chat_session,
    picture,
    user,
)
from support.lockstep import END, text_of
from vlmrl.errors import ConfigError, EngineError
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.session import ChatAnswer, ChatSession
from vlmrl.orchestrator.metrics import bridge_break_rate, history_metrics
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.types import Message, Rollout, StopReason, Text, Turn, TurnSampling, Video, VideoItem


def answers(session: ChatSession, *requests: Any) -> list[ChatAnswer]:
    """Send requests one after the other."""

    async def main() -> list[ChatAnswer]:
        return [await session.answer(request) for request in requests]

    return asyncio.run(main())


def refused(session: ChatSession, request: Any) -> RefusedError:
    with pytest.raises(RefusedError) as error:
        answers(session, request)
    return error.value


def said(answer: ChatAnswer) -> str:
    return "".join(part.text for part in answer.message.content if isinstance(part, Text))


def prompts(turns: list[Turn]) -> list[tuple[int, str]]:
    return [(turn.branch, text_of(turn.prompt)) for turn in turns]


def rollout(turns: list[Turn]) -> Rollout:
    return Rollout("r", "p", 0, turns, 0.0, {}, StopReason.TERMINATED)


def learned(turns: list[Turn]) -> list[str]:
    """The loss tokens of each branch."""
    return ["".join(map(chr, each.token_ids[each.loss_mask])) for each in make_samples(rollout(turns))]


def zoomed(arguments: Any, id: str = "call_0_0") -> dict[str, Any]:
    """A call in a client's message."""
    return {"id": id, "type": "function", "function": {"name": "zoom", "arguments": arguments}}


def letters() -> Callable[[str], str]:
    """Answers a, b, c, …"""
    left = iter("abcdefghij")
    return lambda prompt: next(left)


def test_a_later_request_extends_the_sampled_tokens() -> None:
    session = chat_session(letters())
    first, second = answers(session, asked(user("hi")), asked(user("hi"), assistant("a"), user("go on")))
    assert (said(first), said(second)) == ("a", "b")
    turns = session.close()
    assert prompts(turns) == [(0, "user:hi>"), (0, "user:hi>a$user:go on>")]
    assert learned(turns) == ["a$b$"]
    assert [[part.text for part in m.content if isinstance(part, Text)] for m in turns[1].messages] == [["go on"]]
    assert session.metrics() == {
        "endpoint/requests": 2,
        "endpoint/repeated": 0,
        "endpoint/refused": 0,
        "endpoint/bridged": 1,
        "endpoint/breaks": 0,
    }


@pytest.mark.parametrize(
    "sent_back",
    [
        assistant(
            "  yes\n", tool_calls=[{"id": "call_0_0", "function": {"name": "zoom", "arguments": '{"a":1,"b":[2]}'}}]
        ),
        assistant(
            "yes", tool_calls=[{"id": "call_0_0", "function": {"name": "zoom", "arguments": '{"b": [2.0], "a": 1}'}}]
        ),
        assistant("yes", tool_calls=[{"id": "x", "function": {"name": "zoom", "arguments": {"b": [2], "a": 1}}}]),
        assistant(
            [{"type": "text", "text": "yes"}],  # type: ignore[arg-type]
            tool_calls=[zoomed('{"a":1,"b":[2]}')],
            reasoning_content="why",
            refusal=None,
        ),
    ],
)
def test_what_clients_change_of_an_answer_does_not_break_the_bridge(sent_back: dict[str, Any]) -> None:
    script = iter(['(why) yes <zoom {"a": 1, "b": [2]}>', "done"])
    session = chat_session(lambda prompt: next(script))
    tool = {"role": "tool", "tool_call_id": "call_0_0", "content": [picture(9)]}
    first, _ = answers(session, asked(user("hi"), tools=[ZOOM]), asked(user("hi"), sent_back, tool, tools=[ZOOM]))
    assert (first.message.reasoning, said(first), first.message.tool_calls[0].id) == ("why", " yes ", "call_0_0")
    turns = session.close()
    assert prompts(turns)[1] == (0, '[zoom]user:hi>(why) yes <zoom {"a": 1, "b": [2]}>$tool:#>')
    assert len(turns[1].prompt.images) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([user("hi")], [user("hi "), assistant("a"), user("go on")]),
        ([user("hi")], [user("hi"), assistant("b"), user("go on")]),
        ([user("hi", picture(1))], [user("hi", picture(2)), assistant("a"), user("go on")]),
        ([user("hi")], [user("hi"), assistant("a", tool_calls=[{"function": {"name": "f"}}]), user("go on")]),
        ([user("hi")], [user("hi"), assistant("a"), user("go on"), assistant("own"), user("more")]),
    ],
)
def test_another_conversation_is_a_branch(first: list[Any], second: list[Any]) -> None:
    session = chat_session(letters())
    answers(session, asked(*first), asked(*second))
    turns = session.close()
    assert [turn.branch for turn in turns] == [0, 1]
    assert turns[1].starts_over
    assert len(turns[1].messages) == len(second)
    assert learned(turns) == ["a$", "b$"]
    assert (bridge_break_rate([rollout(turns)]), history_metrics([rollout(turns)])) == (0.0, {"history_cut_rate": 1.0})


def test_other_tools_are_another_conversation() -> None:
    session = chat_session(letters())
    answers(session, asked(user("hi"), tools=[ZOOM]), asked(user("hi"), assistant("a"), user("go on")))
    assert [turn.branch for turn in session.close()] == [0, 1]


def test_images_are_compared_by_pixels() -> None:
    session = chat_session(letters())
    again = [user("look", picture(7, kind="BMP")), assistant("a"), user("and this?", picture(8))]
    answers(session, asked(user("look", picture(7))), asked(*again))
    turns = session.close()
    assert prompts(turns) == [(0, "user:look#>"), (0, "user:look#>a$user:and this?#>")]
    assert [image.pixels[0, 0, 0] for image in turns[1].prompt.images] == [7, 8]


def test_a_fork_learns_the_shared_tokens_once() -> None:
    session = chat_session(letters())
    start = [user("hi"), assistant("a")]
    answers(
        session,
        asked(user("hi")),
        asked(*start, user("left")),
        asked(*start, user("right")),
        asked(*start, user("left"), assistant("b"), user("on")),
        asked(*start, user("right"), assistant("c"), user("on")),
    )
    turns = session.close()
    assert prompts(turns) == [
        (0, "user:hi>"),
        (0, "user:hi>a$user:left>"),
        (0, "user:hi>a$user:left>b$user:on>"),
        (1, "user:hi>a$user:right>"),
        (1, "user:hi>a$user:right>c$user:on>"),
    ]
    assert learned(turns) == ["a$b$d$", "c$e$"]
    assert [turn.starts_over for turn in turns] == [False, False, False, True, False]
    assert len(turns[3].messages) == 3
    assert len(rollout(turns).messages_before(4)) == 4


def test_two_agents_in_turns_are_two_branches() -> None:
    session = chat_session(letters())
    answers(
        session,
        asked(user("one")),
        asked(user("two")),
        asked(user("one"), assistant("a"), user("on")),
        asked(user("two"), assistant("b"), user("on")),
    )
    turns = session.close()
    assert prompts(turns) == [
        (0, "user:one>"),
        (0, "user:one>a$user:on>"),
        (1, "user:two>"),
        (1, "user:two>b$user:on>"),
    ]
    assert learned(turns) == ["a$c$", "b$d$"]


def test_a_bridge_break_is_counted_and_follows_its_turn() -> None:
    session = chat_session(letters(), renderer=ChatRenderer(bridges=False))
    answers(session, asked(user("hi")), asked(user("hi"), assistant("a"), user("on")))
    turns = session.close()
    assert prompts(turns) == [(0, "user:hi>"), (1, "user:hiassistant:auser:on>")]
    assert [turn.starts_over for turn in turns] == [False, False]
    assert bridge_break_rate([rollout(turns)]) == 1.0
    assert session.metrics()["endpoint/breaks"] == 1
    assert learned(turns) == ["a$", "b$"]


def test_a_bridge_that_does_not_extend_the_tokens_is_refused() -> None:
    class Rewriting(ChatRenderer):
        async def next_turn(self, *args: Any, **kwargs: Any) -> Any:
            prompt, _ = await super().next_turn(*args, **kwargs)
            prompt.token_ids[0] += 1
            return prompt, True

    session = chat_session(letters(), renderer=Rewriting())
    answers(session, asked(user("hi")))
    error = refused(session, asked(user("hi"), assistant("a"), user("on")))
    assert (error.status, error.code) == (400, "contract")
    assert session.stop_reason is StopReason.CONTRACT
    assert len(session.close()) == 1


# ── the same request ────────────────────────────────────────────────────────────────────────────────────────


def test_a_repeated_request_gets_the_same_answer() -> None:
    session = chat_session(letters())
    one, two = answers(session, asked(user("hi")), asked(user("hi"), stream=True))
    assert one is two
    assert session.metrics()["endpoint/repeated"] == 1
    assert learned(session.close()) == ["a$"]


@pytest.mark.parametrize("other", [{"max_tokens": 9}, {"stop": "x"}, {"user": "b"}, {"metadata": {"try": "2"}}])
def test_other_parameters_are_another_request(other: dict[str, Any]) -> None:
    session = chat_session(letters())
    one, two = answers(session, asked(user("hi"), user="a"), asked(user("hi"), **{"user": "a", **other}))
    assert (said(one), said(two)) == ("a", "b")
    assert learned(session.close()) == ["a$", "b$"]


def with_gate(play: Callable[[ChatSession, ScriptedSession], Awaitable[None]]) -> ChatSession:
    """Play with an engine that answers only once its gate is set."""

    async def main() -> ChatSession:
        engine = ScriptedSession(letters(), gate=asyncio.Event())
        session = chat_session(engine=engine)
        await play(session, engine)
        return session

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_request_that_is_repeated_while_it_is_sampled_is_sampled_once() -> None:
    async def play(session: ChatSession, engine: ScriptedSession) -> None:
        first = asyncio.create_task(session.answer(asked(user("hi"))))
        await until(lambda: len(engine.asked) == 1)
        second = asyncio.create_task(session.answer(asked(user("hi"))))
        await until(lambda: session.metrics()["endpoint/repeated"] == 1)
        assert engine.gate is not None
        engine.gate.set()
        assert await first is await second

    assert learned(with_gate(play).close()) == ["a$"]


def test_two_requests_at_once_are_two_branches() -> None:
    async def play(session: ChatSession, engine: ScriptedSession) -> None:
        both = [asyncio.create_task(session.answer(asked(user(text)))) for text in ("one", "two")]
        await until(lambda: len(engine.asked) == 2)
        assert engine.gate is not None
        engine.gate.set()
        await asyncio.gather(*both)

    assert sorted(learned(with_gate(play).close())) == ["a$", "b$"]


def test_a_client_that_leaves_does_not_cost_the_turn() -> None:
    async def play(session: ChatSession, engine: ScriptedSession) -> None:
        gone = asyncio.create_task(session.answer(asked(user("hi"))))
        await until(lambda: len(engine.asked) == 1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.gate is not None
        engine.gate.set()
        assert said(await session.answer(asked(user("hi")))) == "a"

    assert learned(with_gate(play).close()) == ["a$"]


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_closed_session_refuses_what_is_sampled_and_what_comes_later() -> None:
    async def play(session: ChatSession, engine: ScriptedSession) -> None:
        held = asyncio.create_task(session.answer(asked(user("hi"))))
        await until(lambda: len(engine.asked) == 1)
        assert session.close() == []
        for request in (held, session.answer(asked(user("ho")))):
            with pytest.raises(RefusedError, match="this session is closed") as error:
                await request
            assert error.value.status == 409

    session = with_gate(play)
    assert session.close() == []
    assert session.metrics()["endpoint/refused"] == 2


def test_the_turn_budget_ends_in_a_refusal_and_a_repeated_request_is_still_answered() -> None:
    session = chat_session(letters(), max_turns=1)
    answers(session, asked(user("hi")))
    error = refused(session, asked(user("hi"), assistant("a"), user("on")))
    assert (error.status, error.code) == (400, "max_turns")
    assert session.stop_reason is StopReason.MAX_TURNS
    assert said(answers(session, asked(user("hi")))[0]) == "a"
    assert learned(session.close()) == ["a$"]


def test_too_many_frames_are_refused_and_fewer_go_on() -> None:
    class Filmed(ChatRenderer):
        def items(self, parts: Sequence[Any]) -> tuple[Any, ...]:
            frames, times = np.zeros((3, 1, 1, 3), np.uint8), np.arange(3, dtype=np.float64)
            return tuple(VideoItem("hash-3", frames, times, 1.0, ("",) * 3, {}, 1) for _ in parts)

    def shown(count: int) -> Any:
        return replace(asked(user("hi")), messages=(Message("user", (Video(3),) * count),))

    session = chat_session(letters(), renderer=Filmed())
    session._budgets = replace(session._budgets, max_frames=5)
    assert said(answers(session, shown(1))[0]) == "a"
    error = refused(session, shown(2))
    assert (error.status, error.code, error.param) == (400, "frames_full", "messages")
    assert "have 6 frames, and they may have 5" in str(error)
    assert session.stop_reason is StopReason.FRAMES_FULL


def test_a_full_context_is_refused_and_a_shorter_request_goes_on() -> None:
    session = chat_session(letters(), max_model_len=30)
    error = refused(session, asked(user("x" * 30)))
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert session.stop_reason is StopReason.CONTEXT_FULL
    answers(session, asked(user("hi")))
    assert session.stop_reason is None
    assert session.metrics()["endpoint/refused"] == 1


@pytest.mark.parametrize(
    ("max_tokens", "max_new_tokens", "max_model_len", "budget", "reason"),
    [
        (None, 3, 100, 3, StopReason.MAX_NEW_TOKENS),
        (2, 3, 100, 2, StopReason.MAX_NEW_TOKENS),
        (99, 3, 100, 3, StopReason.MAX_NEW_TOKENS),
        (None, 50, 12, 4, StopReason.CONTEXT_FULL),
    ],
)
def test_an_answer_is_cut_at_the_smallest_budget(
    max_tokens: int | None, max_new_tokens: int, max_model_len: int, budget: int, reason: StopReason
) -> None:
    engine = ScriptedSession(lambda prompt: "a long answer")
    session = chat_session(engine=engine, max_new_tokens=max_new_tokens, max_model_len=max_model_len)
    (answer,) = answers(session, asked(user("hi"), max_tokens=max_tokens))  # user:hi> has 8 tokens
    assert engine.asked[0][1].max_new_tokens == budget == len(answer.completion.token_ids)
    assert session.stop_reason is reason


def test_seeds_follow_the_number_of_the_request() -> None:
    engine = ScriptedSession(letters())
    session = chat_session(engine=engine)
    requests = [asked(user("one")), asked(user("one")), asked(user("two"))]
    answers(session, *requests)
    assert [sampling.seed for _, sampling in engine.asked] == [
        sampling_seed(0, "train/000001/00/00", number) for number in (0, 1)
    ]


def test_a_turn_says_how_its_client_sampled_it() -> None:
    """The run's own temperature is nothing to note. A seed is, where it does not follow from the turn's place: the fork
    of the second request is a branch of its own behind the third, which goes on from the first."""
    engine = ScriptedSession(letters())
    session = chat_session(engine=engine)
    first = [user("one"), assistant("a")]
    answers(session, asked_otherwise(user("one"), temperature=0.5, top_k=3))
    answers(session, asked_otherwise(user("two"), temperature=1.0))
    answers(session, asked_otherwise(*first, user("more"), temperature=0, top_p=0.5))
    answers(session, asked_otherwise(*first, user("less"), seed=7))
    assert [params.temperature for _, params in engine.asked] == [0.5, 1.0, 0.0, 1.0]
    turns = session.close()
    assert [turn.text for turn in turns] == ["a", "c", "b", "d"]
    own = [sampling_seed(0, "train/000001/00/00", number) for number in range(4)]
    assert [turn.sampling for turn in turns] == [
        TurnSampling(0.5, top_k=3),
        TurnSampling(0.0, seed=own[2]),
        TurnSampling(seed=own[1]),
        TurnSampling(seed=7),
    ]
    assert [turn.is_learnable for turn in turns] == [False, False, True, True]


def test_a_temperature_that_cannot_be_sampled_with_is_refused() -> None:
    session = chat_session()
    error = refused(session, asked_otherwise(user("hi"), temperature=1e-12))
    assert (error.status, "temperature=1e-12 is neither 0" in error.message) == (400, True)
    assert answers(session, asked_otherwise(user("hi"), temperature=0.25)), "the session goes on"


def test_an_engine_error_is_told_and_ends_the_session() -> None:
    session = chat_session(lambda prompt: "engine error")
    error = refused(session, asked(user("hi")))
    assert (error.status, error.message) == (503, "the engine failed: the server of replica 0 has died")
    assert isinstance(session.fault, EngineError)
    assert session.stop_reason is StopReason.ENGINE_ERROR
    assert refused(session, asked(user("ho"))).message.startswith("this rollout has failed")


def test_a_bug_is_kept_for_the_run() -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError("a bug")

    session = chat_session(broken)
    with pytest.raises(ZeroDivisionError):
        answers(session, asked(user("hi")))
    assert isinstance(session.failure, ZeroDivisionError)


def test_an_image_that_cannot_be_read_is_told() -> None:
    session = chat_session()
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    error = refused(session, asked(user("look", broken)))
    assert (error.status, error.code) == (400, "image_error")
    assert "cannot be decoded" in error.message
    assert session.stop_reason is StopReason.IMAGE_ERROR


def test_a_broken_call_stays_in_the_text_and_can_be_answered() -> None:
    script = iter(["see <zoom {>", "b"])
    session = chat_session(lambda prompt: next(script))
    (first,) = answers(session, asked(user("hi"), tools=[ZOOM]))
    assert (said(first), first.message.tool_calls) == ("see <zoom {>", ())
    answers(session, asked(user("hi"), assistant(said(first)), user("that is no JSON"), tools=[ZOOM]))
    assert [turn.branch for turn in session.close()] == [0, 0]


def test_a_stop_string_ends_the_answer_and_stays_in_the_tokens() -> None:
    session = chat_session(lambda prompt: "think.Observation: x" if "go on" not in prompt else "b")
    first, _ = answers(
        session,
        asked(user("hi"), stop=["Observation:"]),
        asked(user("hi"), assistant("think."), user("go on"), stop=["Observation:"]),
    )
    assert (said(first), first.completion.finish_reason) == ("think.", "stop")
    turns = session.close()
    assert prompts(turns)[1] == (0, "user:hi>think.Observation:user:go on>")
    assert [turn.text for turn in turns] == ["think.", "b"]
    assert learned(turns) == ["think.Observation:b$"]


def test_tools_that_the_chat_format_cannot_describe_are_refused() -> None:
    class Plain(ChatRenderer):
        def check_tools(self) -> None:
            raise ConfigError("the chat format cannot be used with tools")

    session = chat_session(letters(), renderer=Plain())
    error = refused(session, asked(user("hi"), tools=[ZOOM]))
    assert (error.status, error.param) == (400, "tools")
    assert said(answers(session, asked(user("hi")))[0]) == "a"


def test_the_text_of_a_turn_is_all_that_was_sampled() -> None:
    session = chat_session(lambda prompt: "(why)yes")
    (answer,) = answers(session, asked(user("hi"), logprobs=True))
    (turn,) = session.close()
    assert (turn.text, turn.completion.token_ids[-1]) == ("(why)yes", END)
    assert answer.spellings == (*"(why)yes", "")
    assert np.array_equal(answer.completion.logprobs, turn.completion.logprobs)
