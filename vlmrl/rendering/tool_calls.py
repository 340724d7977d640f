"""Tools and tool calls between our records and the dictionaries that chat formats take, and a probe of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmrl.types import Answer, BrokenCall, Message, ToolCall, ToolSpec

PROBE_TOOL = ToolSpec(
    "w90001w",
    "w90002w",
    {
        "type": "object",
        "properties": {"w90003w": {"type": "string", "description": "w90004w"}},
        "required": ["w90003w"],
    },
)
"""A tool of words that no chat format writes by itself."""
PROBE_CALL = ToolCall("w90001w", {"w90003w": "w90005w"}, "w900006w9")
PROBE = (
    Message.of("user", "w90007w"),
    Message("assistant", (), (PROBE_CALL,)),
    replace(Message.of("tool", "w90008w"), tool_call_id=PROBE_CALL.id, name=PROBE_CALL.name),
)
"""A question, a call, and its result."""
PROBE_WORDS = tuple(f"w9000{number}w" for number in (1, 2, 3, 4, 5, 7, 8))


def tool_entry(tool: ToolSpec) -> dict[str, Any]:
    """A tool as chat templates take it, in the form of OpenAI's chat API."""
    described = {"name": tool.name, "description": tool.description, "parameters": plain_json(tool.parameters)}
    return {"type": "function", "function": described}


def tool_entries(tools: Sequence[ToolSpec]) -> list[dict[str, Any]] | None:
    """The tools as chat templates take them; None where there is none."""
    return [tool_entry(tool) for tool in tools] or None


def message_fields(message: Message) -> dict[str, Any]:
    """What a message has besides role and content, by the names that chat templates read. Empty fields are left out."""
    fields: dict[str, Any] = {}
    if message.tool_calls:
        fields["tool_calls"] = [_call_entry(call) for call in message.tool_calls]
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.name:
        fields["name"] = message.name
    if message.reasoning:
        fields["reasoning_content"] = message.reasoning
    return fields


def _call_entry(call: ToolCall) -> dict[str, Any]:
    entry = {"type": "function", "function": {"name": call.name, "arguments": plain_json(call.arguments)}}
    return {"id": call.id, **entry} if call.id else entry


def fields_key(message: Message) -> Hashable:
    """A key that is equal for messages with equal `message_fields`. The order of arguments counts: it is written.

    >>> fields_key(Message("assistant", (), (ToolCall("zoom", {"a": 1}),)))
    '{"tool_calls": [{"type": "function", "function": {"name": "zoom", "arguments": {"a": 1}}}]}'
    """
    fields = message_fields(message)
    return json.dumps(fields) if fields else None


def tools_key(tools: Sequence[ToolSpec]) -> Hashable:
    """A key that is equal for equal tools."""
    return json.dumps(tool_entries(tools)) if tools else None


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` applied to each of its texts, names of fields included.

    >>> map_texts({"a": ["b", 1]}, str.upper)
    {'A': ['B', 1]}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): map_texts(each, change) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_texts(each, change) for each in value]
    return value


def plain_json(value: Any) -> Any:
    """A JSON value as dicts and lists."""
    return map_texts(value, str)


def map_message(message: Message, change: Callable[[str], str]) -> Message:
    """The message with `change` applied to each text outside of its content."""
    calls = tuple(
        ToolCall(change(call.name), map_texts(call.arguments, change), change(call.id)) for call in message.tool_calls
    )
    return replace(
        message,
        tool_calls=calls,
        tool_call_id=change(message.tool_call_id),
        name=change(message.name),
        reasoning=change(message.reasoning),
    )


def map_tool(tool: ToolSpec, change: Callable[[str], str]) -> ToolSpec:
    """The tool with `change` applied to each of its texts."""
    return ToolSpec(change(tool.name), change(tool.description), map_texts(tool.parameters, change))


def texts_beside(messages: Iterable[Message], tools: Iterable[ToolSpec] = ()) -> list[str]:
    """The texts of tools, and of messages outside of their content."""
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    for message in messages:
        map_message(message, note)
    for tool in tools:
        map_tool(tool, note)
    return [text for text in texts if text]


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_call(name: Any, arguments: Any, text: str, id: str = "") -> ToolCall | BrokenCall:
    """A call from what stands in an answer. `arguments` may be JSON text; `text` is what the policy wrote.

    >>> read_call("zoom", '{"image": 1}', "…")
    ToolCall(name='zoom', arguments={'image': 1}, id='')
    >>> read_call("zoom", [1], "…").reason
    'has arguments that are not a JSON object'
    """
    if not isinstance(name, str) or not name:
        return BrokenCall(text, "has no name of a tool")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            return BrokenCall(text, f"has arguments that are not valid JSON ({error})")
    if not isinstance(arguments, dict):
        return BrokenCall(text, "has arguments that are not a JSON object")
    try:
        json.dumps([name, arguments], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return BrokenCall(text, "has text that is not valid Unicode")
    except (ValueError, RecursionError):
        return BrokenCall(text, "has a number that is not finite, or is nested too deeply")
    return ToolCall(name, arguments, id)


def answer_of(text: str, reasoning: str, found: Sequence[ToolCall | BrokenCall]) -> Answer:
    """An answer from its parts, with the calls in the order in which the policy wrote them."""
    calls = tuple(each for each in found if isinstance(each, ToolCall))
    return Answer(text, reasoning, calls, tuple(each for each in found if isinstance(each, BrokenCall)))
