"""What a chat request may say, and the words for what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from support.chat import ZOOM, asked, assistant, picture, user
from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ClientSampling, read_request
from vlmrl.types import Image, Message, Text, ToolCall, ToolSpec

HI = user("hi")


def told(body: Any, **settings: Any) -> RefusedError:
    """The refusal of a body."""
    with pytest.raises(RefusedError) as error:
        read_request(body, DataMedia(), **{"client_samples": False, "temperature": 1.0, **settings})
    return error.value


def test_everything_that_is_taken() -> None:
    request = asked(
        {"role": "developer", "content": "be brief"},
        user("look", picture(3)),
        assistant(None, tool_calls=[{"id": "c", "function": {"name": "zoom", "arguments": '{"image": 1}'}}]),
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "here"}]},
        model="any",
        tools=[ZOOM],
        tool_choice="auto",
        stop=["\n", "END", "\n"],
        max_tokens=9,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=0,
        n=1,
        presence_penalty=0.0,
        response_format={"type": "text"},
        temperature=1,
        top_p=1.0,
        seed=None,
        store=False,
    )
    system, question, call, result = request.messages
    assert system == Message.of("system", "be brief")
    assert question.content[0] == Text("look")
    assert isinstance(question.content[1], Image)
    assert (call.content, call.tool_calls) == ((), (ToolCall("zoom", {"image": 1}, "c"),))
    assert (result.role, result.tool_call_id, result.name, result.content) == ("tool", "c", "zoom", (Text("here"),))
    assert request.tools == (ToolSpec("zoom", "d", {"type": "object"}),)
    assert (request.stop, request.max_tokens) == (("\n", "END"), 7)
    assert (request.stream, request.include_usage, request.logprobs) == (True, True, True)
    assert request.sampling == ClientSampling()


def test_the_same_data_url_is_one_part() -> None:
    request = asked(user(picture(1), picture(2), picture(1)))
    first, other, again = request.messages[0].content
    assert first is again
    assert first is not other


def test_base64_with_line_breaks_is_read() -> None:
    part = picture(1)
    part["image_url"]["url"] = part["image_url"]["url"].replace("base64,", "base64,\n").replace("A", "A\n", 1)
    assert asked(user(part)).messages[0].content[0] is asked(user(part)).messages[0].content[0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ([], None, "the body is no JSON object"),
        ({}, "messages", "messages is empty"),
        ({"messages": "hi"}, "messages", "a list is expected"),
        ({"messages": ["hi"]}, "messages[0]", "an object is expected"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]", "role is 'function'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]", "role is ['user']"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a list is expected"),
        ({"messages": [HI, assistant("so")]}, "messages", "not continued here"),
        (
            {"messages": [user({"type": "input_audio"})]},
            "messages[0].content[0]",
            "reads only text, image_url and video_url",
        ),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text", "a string is expected"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "https://host/a.png"}})]},
            "messages[0].content[0].image_url.url",
            "images are not fetched",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": "file:///etc/passwd"})]},
            "messages[0].content[0].image_url.url",
            "images are not fetched",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": "data:image/png,abc"})]},
            "messages[0].content[0].image_url.url",
            "not encoded in base64",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": "data:image/png;base64,§"})]},
            "messages[0].content[0].image_url.url",
            "no valid base64",
        ),
        (
            {"messages": [HI, assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), HI]},
            "messages[1].tool_calls[0].function.arguments",
            "is no JSON",
        ),
        (
            {"messages": [HI, assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), HI]},
            "messages[1].tool_calls[0].function.arguments",
            "an object is expected",
        ),
        ({"messages": [HI], "tools": [{"type": "retrieval"}]}, "tools[0]", "only functions can be called"),
        ({"messages": [HI], "tools": [{"type": "function"}]}, "tools[0].function", "an object is expected"),
        ({"messages": [HI], "tool_choice": "required"}, "tool_choice", "cannot be done here"),
        ({"messages": [HI], "n": 2}, "n", "n=2 cannot be done here"),
        ({"messages": [HI], "n": True}, "n", "n=True cannot be done here"),
        ({"messages": [HI], "top_logprobs": 5}, "top_logprobs", "cannot be done here"),
        ({"messages": [HI], "logit_bias": {"5": -100}}, "logit_bias", "cannot be done here"),
        ({"messages": [HI], "presence_penalty": 0.5}, "presence_penalty", "cannot be done here"),
        ({"messages": [HI], "response_format": {"type": "json_object"}}, "response_format", "cannot be done here"),
        ({"messages": [HI], "guided_json": {}}, "guided_json", "is not known here"),
        ({"messages": [HI], "max_tokens": 0}, "max_tokens", "no whole number from 1"),
        ({"messages": [HI], "max_tokens": True}, "max_tokens", "no whole number from 1"),
        ({"messages": [HI], "max_tokens": 1.5}, "max_tokens", "no whole number from 1"),
        ({"messages": [HI], "stop": [""]}, "stop", "none of them empty"),
        ({"messages": [HI], "stop": [str(i) for i in range(17)]}, "stop", "at most 16"),
        ({"messages": [HI], "stop": [5]}, "stop[0]", "a string is expected"),
        ({"messages": [HI], "stream": "yes"}, "stream", "neither true nor false"),
        ({"messages": [HI], "stream_options": 1}, "stream_options", "an object is expected"),
        ({"messages": [HI], "temperature": 0.5}, "temperature", "whose temperature is 1"),
        ({"messages": [HI], "top_p": 0.9}, "top_p", "whose top_p is 1"),
        ({"messages": [HI], "top_k": 5}, "top_k", "whose top_k is 0"),
        ({"messages": [HI], "seed": 3}, "seed", "derived from the run's seed"),
    ],
)
def test_refusals(body: Any, param: str | None, words: str) -> None:
    error = told(body)
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_a_clients_sampling_is_taken_where_it_may_be() -> None:
    body = {"messages": [HI], "temperature": 0, "top_p": 0.9, "top_k": -1, "seed": 5}
    request = read_request(body, DataMedia(), client_samples=True, temperature=1.0)
    assert request.sampling == ClientSampling(temperature=0.0, top_p=0.9, top_k=0, seed=5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("seed", -1)],
)
def test_a_clients_sampling_has_ranges(key: str, value: Any) -> None:
    assert told({"messages": [HI], key: value}, client_samples=True).param == key


def test_a_long_value_is_quoted_in_short() -> None:
    error = told({"messages": [HI], "response_format": "x" * 10_000})
    assert len(error.message) < 250
