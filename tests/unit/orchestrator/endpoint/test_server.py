"""The endpoint by a raw socket: whatever a client does has an outcome, blocks nothing, and trains no token twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.chat import ScriptedSession, assistant, chat_session, picture, user
from vlmrl.orchestrator.endpoint.server import Endpoint, SessionAddress
from vlmrl.orchestrator.samples import make_samples
from vlmrl.types import Rollout, StopReason, Turn

HI = user("hi")


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint("tiny", temperature=1.0, **settings)
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.stop()


def letters() -> Callable[[str], str]:
    left = iter("abcdefghij")
    return lambda prompt: next(left)


def http(
    body: Any,
    address: SessionAddress,
    *,
    key: str | None = None,
    path: str = "",
    headers: str = "",
    length: int | None = None,
) -> bytes:
    """A request as bytes. `body` is JSON or bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = path or f"/session/{address.id}/v1/chat/completions"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {address.api_key if key is None else key}\r\n{headers}"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    )
    return head.encode() + content


async def exchanged(endpoint: Endpoint, sent: bytes) -> tuple[int, str, bytes]:
    """(status, headers, body) of the response to `sent` on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    try:
        writer.write(sent)
        return await response(reader)
    finally:
        writer.close()


async def response(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status = int(head.split()[1])
    lines = [line.lower() for line in head.split("\r\n")]
    length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length")), None)
    return status, head, await (reader.read() if length is None else reader.readexactly(length))


async def asked(endpoint: Endpoint, address: SessionAddress, *messages: Any, **body: Any) -> tuple[int, Any]:
    """(status, JSON) of a chat request."""
    status, _, content = await exchanged(endpoint, http({"messages": list(messages), **body}, address))
    return status, json.loads(content)


def content(answer: tuple[int, Any]) -> str:
    assert answer[0] == 200, answer
    text: str = answer[1]["choices"][0]["message"]["content"]
    return text


def learned(turns: list[Turn]) -> list[str]:
    rollout = Rollout("r", "p", 0, turns, 0.0, {}, StopReason.TERMINATED)
    return ["".join(map(chr, each.token_ids[each.loss_mask])) for each in make_samples(rollout)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_one_answer_to_the_letter() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            session = chat_session(letters())
            address = endpoint.open(session)
            status, body = await asked(endpoint, address, HI, logprobs=True)
            assert status == 200
            assert body.pop("id").startswith("chatcmpl-")
            assert isinstance(body.pop("created"), int)
            tokens = [
                {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []},
                {"token": "", "bytes": [], "logprob": -0.5, "top_logprobs": []},
            ]
            assert body == {
                "object": "chat.completion",
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "a"},
                        "finish_reason": "stop",
                        "logprobs": {"content": tokens, "refusal": None},
                    }
                ],
                "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
            }

    asyncio.run(main())


def test_a_stream_to_the_letter() -> None:
    async def main() -> list[Any]:
        async with serving() as endpoint:
            address = endpoint.open(chat_session(lambda prompt: '(why)yes<zoom {"image": 1}>'))
            body = {"messages": [HI], "stream": True, "stream_options": {"include_usage": True}}
            status, head, content = await exchanged(endpoint, http(body, address, headers="Connection: close\r\n"))
            assert (status, "text/event-stream" in head) == (200, True)
            events = [
                line[6:] for line in content.decode().split("\r\n") for line in line.split("\n") if line[:6] == "data: "
            ]
            assert events[-1] == "[DONE]"
            return [json.loads(event) for event in events[:-1]]

    chunks = asyncio.run(main())
    assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {
        ("chat.completion.chunk", "tiny", chunks[0]["id"])
    }
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "why"},
        {"content": "yes"},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_0_0",
                    "type": "function",
                    "function": {"name": "zoom", "arguments": '{"image":1}'},
                }
            ]
        },
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["tool_calls"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 8, "completion_tokens": 28, "total_tokens": 36}


def test_the_model_is_listed() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            address = endpoint.open(chat_session())
            sent = http(b"", address, path=f"/session/{address.id}/v1/models").replace(b"POST", b"GET")
            status, _, body = await exchanged(endpoint, sent)
            assert (status, json.loads(body)["data"][0]["id"]) == (200, "tiny")

    asyncio.run(main())


def test_the_header_chooses_a_session_too() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            sessions = [chat_session(lambda prompt, name=name: name) for name in "xy"]  # type: ignore[misc]
            addresses = [endpoint.open(session) for session in sessions]
            for address, expected in zip(addresses, "xy", strict=True):
                sent = http(
                    {"messages": [HI]}, address, path="/v1/chat/completions", headers=f"X-Session-ID: {address.id}\r\n"
                )
                status, _, body = await exchanged(endpoint, sent)
                assert content((status, json.loads(body))) == expected

    asyncio.run(main())


def test_a_key_opens_its_session_and_no_other() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            mine, other = chat_session(letters()), chat_session(letters())
            my, their = endpoint.open(mine), endpoint.open(other)
            body = {"messages": [HI]}
            for sent in (
                http(body, their, key=my.api_key),
                http(body, my, path="/v1/chat/completions", headers=f"X-Session-ID: {their.id}\r\n"),
                http(body, my, path="/session/0000/v1/chat/completions"),
                http(body, my, path="/v1/chat/completions"),
                http(body, my, key=""),
                http(body, my, key="ä"),
                http(body, my).replace(b"Bearer", b"Basic"),
            ):
                status, _, told = await exchanged(endpoint, sent)
                assert (status, json.loads(told)["error"]["type"]) == (401, "authentication_error")
            assert endpoint.metrics()["endpoint/denied"] == 7
            assert (mine.close(), other.close()) == ([], [])

    asyncio.run(main())


def test_garbage_is_answered_and_the_next_client_is_served() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            session = chat_session(letters())
            address = endpoint.open(session)
            for sent in (b"\x00\xff\x16\x03\x01garbage\r\n\r\n", b"GET\r\n\r\n", b"POST /v1 HTTP/9.9\r\n\r\n"):
                assert (await exchanged(endpoint, sent))[0] == 400
            for body in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b"null"):
                status, _, told = await exchanged(endpoint, http(body, address))
                assert (status, json.loads(told)["error"]["type"]) == (400, "invalid_request_error")
            assert (await exchanged(endpoint, http({}, address, path="/elsewhere")))[0] == 404
            assert (await exchanged(endpoint, http({}, address).replace(b"POST", b"GET")))[0] == 405
            assert content(await asked(endpoint, address, HI)) == "a"
            assert session.metrics()["endpoint/refused"] == 5
            assert endpoint.metrics()["endpoint/malformed"] == 3
            assert learned(session.close()) == ["a$"]

    asyncio.run(main())


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    """curl sends `Expect: 100-continue` before a large body, and waits for the answer."""

    async def main() -> None:
        async with serving(max_body_bytes=2000) as endpoint:
            address = endpoint.open(chat_session(letters()))
            head, _, body = http({"messages": [HI]}, address, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            writer.write(head + b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            status, _, answer = await response(reader)
            assert content((status, json.loads(answer))) == "a"
            writer.close()
            large = http(b"x" * 3000, address, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")[0]
            assert (await exchanged(endpoint, large + b"\r\n\r\n"))[0] == 413

    asyncio.run(main())


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_huge_body_is_refused(is_declared: bool) -> None:
    async def main() -> None:
        async with serving(max_body_bytes=2000) as endpoint:
            session = chat_session(letters())
            address = endpoint.open(session)
            sent = http(b"x" * 3000, address)
            if not is_declared:
                head, _, body = sent.partition(b"\r\n\r\n")
                sent = head.replace(b"Content-Length: 3000", b"Transfer-Encoding: chunked")
                sent += b"\r\n\r\n" + b"bb8\r\n" + body + b"\r\n0\r\n\r\n"
            status, _, told = await exchanged(endpoint, sent)
            assert (status, "larger than 2000 bytes" in json.loads(told)["error"]["message"]) == (413, True)
            assert content(await asked(endpoint, address, HI)) == "a"
            assert session.metrics()["endpoint/refused"] == 1

    asyncio.run(main())


def test_a_body_that_never_ends_is_given_up() -> None:
    async def main() -> None:
        async with serving(body_patience_s=0.05) as endpoint:
            session = chat_session(letters())
            address = endpoint.open(session)
            status, _, told = await exchanged(endpoint, http({"messages": [HI]}, address, length=10_000))
            assert (status, "did not come within" in json.loads(told)["error"]["message"]) == (408, True)
            assert session.metrics()["endpoint/refused"] == 1
            assert content(await asked(endpoint, address, HI)) == "a"

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: "])
def test_headers_that_never_end_are_given_up(sent: bytes) -> None:
    async def main() -> None:
        async with serving(header_patience_s=0.05) as endpoint:
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            writer.write(sent)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()
            assert endpoint.metrics()["endpoint/timed_out"] == 1

    asyncio.run(main())


def test_a_connection_serves_many_requests_and_its_patience_begins_again() -> None:
    async def main() -> None:
        async with serving(header_patience_s=1.5) as endpoint:
            gate = asyncio.Event()
            engine = ScriptedSession(letters(), gate=gate)
            address = endpoint.open(chat_session(engine=engine))
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            writer.write(http({"messages": [HI]}, address))
            await asyncio.sleep(2.0)  # longer than the patience: the answer takes its time
            gate.set()
            assert (await response(reader))[0] == 200
            writer.write(http({"messages": [user("again")]}, address))
            assert (await response(reader))[0] == 200
            assert await reader.read() == b""  # no third request comes, so the connection is closed
            writer.close()

    asyncio.run(main())


# ── duplicates, parallel requests, clients that leave ───────────────────────────────────────────────────────


def with_gate(play: Callable[[Endpoint, SessionAddress, ScriptedSession], Awaitable[None]]) -> list[str]:
    """Play with an engine that answers only once its gate is set; returns what is learned."""

    async def main() -> list[str]:
        async with serving() as endpoint:
            engine = ScriptedSession(letters(), gate=asyncio.Event())
            session = chat_session(engine=engine)
            await play(endpoint, endpoint.open(session), engine)
            return learned(session.close())

    return asyncio.run(main())


def test_duplicates_are_sampled_once() -> None:
    async def play(endpoint: Endpoint, address: SessionAddress, engine: ScriptedSession) -> None:
        assert engine.gate is not None
        pending = [asyncio.create_task(asked(endpoint, address, HI)) for _ in range(5)]
        await until(lambda: len(engine.asked) == 1)
        engine.gate.set()
        bodies = [body for _, body in await asyncio.gather(*pending)]
        late = (await asked(endpoint, address, HI))[1]
        assert all(body == late for body in bodies)

    assert with_gate(play) == ["a$"]


def test_two_in_parallel_are_both_learned() -> None:
    async def play(endpoint: Endpoint, address: SessionAddress, engine: ScriptedSession) -> None:
        assert engine.gate is not None
        pending = [asyncio.create_task(asked(endpoint, address, user(text))) for text in ("one", "two")]
        await until(lambda: len(engine.asked) == 2)
        engine.gate.set()
        assert sorted(map(content, await asyncio.gather(*pending))) == ["a", "b"]

    assert sorted(with_gate(play)) == ["a$", "b$"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_keeps_its_turn(stream: bool) -> None:
    async def play(endpoint: Endpoint, address: SessionAddress, engine: ScriptedSession) -> None:
        assert engine.gate is not None
        _, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(http({"messages": [HI], "stream": stream}, address))
        await until(lambda: len(engine.asked) == 1)
        writer.transport.abort()
        engine.gate.set()
        assert content(await asked(endpoint, address, HI)) == "a"
        assert content(await asked(endpoint, address, HI, assistant(" a "), user("on"))) == "b"

    assert with_gate(play) == ["a$b$"]


def test_256_sessions_at_once() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            sessions = [chat_session(lambda prompt: prompt[-2]) for _ in range(256)]

            async def episode(number: int) -> None:
                address = endpoint.open(sessions[number])
                first = [user("look", picture(number % 7)), user(f"{number % 10}")]
                answer = content(await asked(endpoint, address, *first))
                assert answer == str(number % 10)
                assert content(await asked(endpoint, address, *first, assistant(answer), user("x"))) == "x"

            await asyncio.gather(*map(episode, range(256)))
            for number, session in enumerate(sessions):
                assert learned(session.close()) == [f"{number % 10}$x$"]
            assert endpoint.metrics() == {"endpoint/denied": 0, "endpoint/malformed": 0, "endpoint/timed_out": 0}

    asyncio.run(main())


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_closed_session_is_refused_and_forgotten() -> None:
    async def main() -> None:
        async with serving() as endpoint:
            session = chat_session()
            address = endpoint.open(session)
            session.close()
            assert (await asked(endpoint, address, HI))[0] == 409
            endpoint.open(chat_session())
            assert (await asked(endpoint, address, HI))[0] == 401

    asyncio.run(main())


def test_requests_of_no_session_are_logged_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving() as endpoint:
            address = endpoint.open(chat_session())
            await exchanged(endpoint, http({"messages": [HI]}, address, key="wrong"))
            await exchanged(endpoint, b"garbage\r\n\r\n")

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == [
        "requests that belong to no session: 1 without the right key, 1 that are no HTTP, 0 not finished in time"
    ]


def test_stop_closes_what_is_open() -> None:
    async def main() -> None:
        endpoint = Endpoint("tiny", temperature=1.0)
        await endpoint.start()
        engine = ScriptedSession(letters(), gate=asyncio.Event())
        session = chat_session(engine=engine)
        pending = asyncio.create_task(asked(endpoint, endpoint.open(session), HI))
        await until(lambda: len(engine.asked) == 1)
        await endpoint.stop()
        await endpoint.stop()
        assert (await pending)[0] == 409
        assert session.is_closed
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", endpoint.port)

    asyncio.run(main())


def test_a_bug_is_told_to_the_run() -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError("a bug")

    async def main() -> None:
        async with serving() as endpoint:
            status, body = await asked(endpoint, endpoint.open(chat_session(broken)), HI)
            assert (status, body["error"]["type"]) == (500, "server_error")
            assert endpoint.failure is not None
            with pytest.raises(ZeroDivisionError):
                await endpoint.failure

    asyncio.run(main())


def test_it_listens_on_loopback_only() -> None:
    async def main() -> list[str]:
        async with serving() as endpoint:
            assert endpoint._listener is not None
            return [socket.getsockname()[0] for socket in endpoint._listener.sockets]

    assert asyncio.run(main()) == ["127.0.0.1"]
