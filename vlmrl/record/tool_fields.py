"""Tools and what messages have besides their content, as the JSON of rollouts/*.parquet.

ToolSpec ─▶ {"name", "description", "parameters"}
Message  ─▶ {"tool_calls": [{"name", "arguments", "id"}], "tool_call_id", "name", "reasoning"}, empty ones left out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from vlmrl.types import Message, ToolCall, ToolSpec


def tools_text(tools: Sequence[ToolSpec]) -> str | None:
    """The tools as JSON; None where there is none.

    >>> tools_text([ToolSpec("zoom", "Enlarge.", {"type": "object"})])
    '[{"name":"zoom","description":"Enlarge.","parameters":{"type":"object"}}]'
    """
    entries = [{"name": each.name, "description": each.description, "parameters": each.parameters} for each in tools]
    return _text(entries) if entries else None


def fields_text(messages: Sequence[Message]) -> str | None:
    """What each message has besides role and content, as JSON; None where no message has anything."""
    fields = [_fields(message) for message in messages]
    return _text(fields) if any(fields) else None


def _fields(message: Message) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.tool_calls]
    given = (calls, message.tool_call_id, message.name, message.reasoning)
    return {name: value for name, value in zip(FIELDS, given, strict=True) if value}


def _text(value: Any) -> str:
    return orjson.dumps(value, default=dict, option=orjson.OPT_NON_STR_KEYS).decode()


def read_json(text: str | None, absent: Any) -> Any:
    """The value of a JSON text; `absent` where there is none, None where it is no JSON."""
    if text is None:
        return absent
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def is_tools(value: Any) -> bool:
    """Whether `value` is the JSON of tools."""
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("description"), str)
        and isinstance(each.get("parameters"), dict)
        for each in value
    )


def is_fields(value: Any, count: int) -> bool:
    """Whether `value` is the JSON of what `count` messages have besides their content."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, dict) for each in value)
        and all(name in FIELDS and FIELDS[name](field) for each in value for name, field in each.items())
    )


def _is_calls(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
        and isinstance(call.get("id"), str)
        for call in value
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "tool_calls": _is_calls,
    "tool_call_id": _is_text,
    "name": _is_text,
    "reasoning": _is_text,
}
"""Field of a message → what its value must be."""


def message_of(role: Any, content: tuple[Any, ...], record: Mapping[str, Any]) -> Message:
    """The message of a record whose content is known."""
    calls = tuple(ToolCall(**call) for call in record.get("tool_calls", ()))
    beside = {name: record[name] for name in FIELDS if name in record and name != "tool_calls"}
    return Message(role, content, calls, **beside)


def tools_of(records: Sequence[Mapping[str, Any]]) -> tuple[ToolSpec, ...]:
    """The tools of a record."""
    return tuple(ToolSpec(each["name"], each["description"], each["parameters"]) for each in records)
