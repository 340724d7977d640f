"""Messages and tools of a chat request ↔ our records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.reading import items, mapping, number, quoted, text
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.types import Message, Part, Text, ToolCall, ToolSpec, Video

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""A client's role → ours."""


def read_messages(value: Any, media: DataMedia) -> tuple[Message, ...]:
    """The messages of a request; the last one is not the assistant's. Raises `RefusedError`."""
    if not value:
        raise RefusedError("messages is empty, so there is nothing to answer", param="messages")
    messages = [
        _message(mapping(each, f"messages[{index}]"), f"messages[{index}]", media)
        for index, each in enumerate(items(value, "messages"))
    ]
    if messages[-1].role == "assistant":
        raise RefusedError(
            "messages ends with an assistant message, and an answer is not continued here: end with a user or tool "
            "message",
            param="messages",
        )
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return tuple(
        replace(message, name=names.get(message.tool_call_id, "")) if message.role == "tool" else message
        for message in messages
    )


def read_tools(value: Any) -> tuple[ToolSpec, ...]:
    """The tools of a request. Raises `RefusedError`."""
    tools = []
    for index, each in enumerate(items(value, "tools")):
        place = f"tools[{index}]"
        given = mapping(each, place)
        if given.get("type", "function") != "function":
            raise RefusedError(
                f"{place}.type is {quoted(given['type'])}, and only functions can be called", param=place
            )
        function = mapping(given.get("function"), f"{place}.function")
        tools.append(
            ToolSpec(
                name=text(function.get("name"), f"{place}.function.name"),
                description=text(function.get("description") or "", f"{place}.function.description"),
                parameters=mapping(function.get("parameters") or {}, f"{place}.function.parameters"),
            )
        )
    return tuple(tools)


def _message(given: dict[str, Any], place: str, media: DataMedia) -> Message:
    role = given.get("role")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise RefusedError(
            f"{place}.role is {quoted(role)}: it must be system, developer, user, assistant or tool", param=place
        )
    content = _content(given.get("content"), place, media)
    calls: tuple[ToolCall, ...] = ()
    reasoning = ""
    if known == "assistant":
        calls = _calls(given.get("tool_calls") or [], place)
        told = given.get("reasoning_content") or given.get("reasoning")
        reasoning = text(told, f"{place}.reasoning_content") if told else ""
    elif not content and known != "tool":
        raise RefusedError(f"{place}.content is missing, so the message says nothing", param=place)
    return Message(
        known,  # type: ignore[arg-type]  # a value of ROLES
        content,
        tool_calls=calls,
        tool_call_id=text(given.get("tool_call_id") or "", f"{place}.tool_call_id"),
        reasoning=reasoning,
    )


def _content(value: Any, place: str, media: DataMedia) -> tuple[Part, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (Text(value),)
    return tuple(
        _part(mapping(each, f"{place}.content[{index}]"), f"{place}.content[{index}]", media)
        for index, each in enumerate(items(value, f"{place}.content"))
    )


def _part(given: dict[str, Any], place: str, media: DataMedia) -> Part:
    match given.get("type"):
        case "text":
            return Text(text(given.get("text"), f"{place}.text"))
        case "image_url":
            url = given.get("image_url")
            if isinstance(url, dict):
                url = url.get("url")
            return media.image(text(url, f"{place}.image_url.url"), f"{place}.image_url.url")
        case "video_url":
            return _video(given.get("video_url"), f"{place}.video_url", media)
        case kind:
            raise RefusedError(
                f"{place}.type is {quoted(kind)}, and the policy reads only text, image_url and video_url", param=place
            )


def _video(given: Any, place: str, media: DataMedia) -> Video:
    """`{"url": …}`, or the URL alone. Frames may come with `fps` or `times`, as those of `Video`."""
    if not isinstance(given, dict):
        return media.video(text(given, f"{place}.url"), f"{place}.url")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in ("url", "fps", "times", "detail"):
            raise RefusedError(
                f"{place}.{quoted(name)} is not known here, and a run samples and scales all videos alike "
                "(model.vlm.video): leave it out",
                param=place,
            )
    fps = number(given, "fps", 1e-3, 1e6) if "fps" in given else None
    times = None
    if "times" in given:
        stamps = [{"times": each} for each in items(given["times"], f"{place}.times")]
        times = tuple(number(each, "times", 0.0, 1e6) for each in stamps)
    return media.video(text(given.get("url"), f"{place}.url"), f"{place}.url", fps=fps, times=times)


def _calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    calls = []
    for index, each in enumerate(items(value, f"{place}.tool_calls")):
        param = f"{place}.tool_calls[{index}]"
        given = mapping(each, param)
        function = mapping(given.get("function"), f"{param}.function")
        calls.append(
            ToolCall(
                name=text(function.get("name"), f"{param}.function.name"),
                arguments=_arguments(function.get("arguments"), f"{param}.function.arguments"),
                id=text(given.get("id") or "", f"{param}.id"),
            )
        )
    return tuple(calls)


def _arguments(value: Any, param: str) -> dict[str, Any]:
    """The arguments of a call: a JSON object in a string, or the object itself."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value or "{}")
        except orjson.JSONDecodeError as error:
            raise RefusedError(f"{param} is no JSON: {error}", param=param) from None
    return mapping(value if value is not None else {}, param)
