"""From a `ChatAnswer` to the JSON of a response, or to the chunks of a stream.

A stream is sent when the answer is complete: the engines give no tokens before. It has the form that clients expect:
role, reasoning, text, tool calls, the reason of the end, the token counts where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.orchestrator.endpoint.session import ChatAnswer
from vlmrl.types import Message, Text


def response(answer: ChatAnswer, request: ChatRequest, model: str) -> dict[str, Any]:
    """The body of a response."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", **_message(answer.message)},
        "finish_reason": finish_reason(answer),
        "logprobs": _logprobs(answer) if request.logprobs else None,
    }
    return {**_head(answer, model, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


def events(answer: ChatAnswer, request: ChatRequest, model: str) -> Iterator[bytes]:
    """The chunks of a response as server-sent events, with the closing `[DONE]`."""
    head = _head(answer, model, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return _event({**head, "choices": [choice]})

    message = _message(answer.message)
    yield chunk({"role": "assistant", "content": ""})
    if "reasoning_content" in message:
        yield chunk({"reasoning_content": message["reasoning_content"]})
    yield chunk({"content": message["content"] or ""}, logprobs=_logprobs(answer) if request.logprobs else None)
    for index, call in enumerate(message.get("tool_calls", [])):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, finish_reason(answer))
    if request.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield b"data: [DONE]\n\n"


def finish_reason(answer: ChatAnswer) -> str:
    """`tool_calls` where the answer ended and calls tools; else that of the completion."""
    if answer.completion.finish_reason == "stop" and answer.message.tool_calls:
        return "tool_calls"
    return answer.completion.finish_reason


def models(model: str) -> dict[str, Any]:
    """The list of models, which holds one."""
    return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "vlmrl"}]}


def to_bytes(value: Any) -> bytes:
    """JSON; numbers that are not finite become null."""
    return orjson.dumps(value)


def _head(answer: ChatAnswer, model: str, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": model}


def _event(value: Any) -> bytes:
    return b"data: " + to_bytes(value) + b"\n\n"


def _message(message: Message) -> dict[str, Any]:
    text = "".join(part.text for part in message.content if isinstance(part, Text))
    made: dict[str, Any] = {"content": text if text or not message.tool_calls else None}
    if message.reasoning:
        made["reasoning_content"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": to_bytes(dict(call.arguments)).decode()},
            }
            for call in message.tool_calls
        ]
    return made


def _logprobs(answer: ChatAnswer) -> dict[str, Any]:
    """One entry per sampled token, the one that ends the answer included. A float32 is written as the shortest decimal
    number that reads back as the same float32."""
    values = orjson.loads(orjson.dumps(answer.completion.logprobs, option=orjson.OPT_SERIALIZE_NUMPY))
    return {
        "content": [
            {"token": text, "bytes": _bytes(text), "logprob": value, "top_logprobs": []}
            for text, value in zip(answer.spellings, values, strict=True)
        ],
        "refusal": None,
    }


def _bytes(text: str) -> list[int] | None:
    """The bytes of a token. None for a part of a character, whose bytes its text does not show."""
    return None if "\ufffd" in text else list(text.encode())


def _usage(answer: ChatAnswer) -> dict[str, int]:
    sampled = len(answer.completion.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": answer.prompt_tokens + sampled,
    }
