"""Reads the tool calls of an answer, for the ways of writing them that chat templates of VLMs share.

    Hermes (Qwen2.5-VL, Qwen3-VL, …)    <tool_call>\\n{"name": "zoom", "arguments": {"image": 1}}\\n</tool_call>
    functions as XML (Qwen3.5, …)       <tool_call>\\n<function=zoom>\\n<parameter=image>\\n1\\n</parameter>\\n
                                        </function>\\n</tool_call>

Which one a template uses is found by letting it write a call. A template of another way has no grammar here, so tools
are refused with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from vlmrl.rendering.tool_calls import PROBE_CALL, answer_of, read_call
from vlmrl.types import Answer, BrokenCall, ToolCall, ToolSpec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, UNTHINK = "<think>", "</think>"

_NAME = PROBE_CALL.name
((_KEY, _VALUE),) = PROBE_CALL.arguments.items()
_HERMES = re.compile(rf'<tool_call>\s*\{{"name": "{_NAME}", "arguments": \{{"{_KEY}": ?"{_VALUE}"\}}\}}\s*</tool_call>')
_XML = re.compile(
    rf"<tool_call>\s*<function={_NAME}>\s*<parameter={_KEY}>\s*{_VALUE}\s*</parameter>\s*</function>\s*</tool_call>"
)
_FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*?)(</function>\s*)?$", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)


class ReadCall(Protocol):
    """Reads what stands between `<tool_call>` and `</tool_call>`."""

    def __call__(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall | BrokenCall: ...


def grammar_of(written: str) -> ReadCall | None:
    """The grammar of a template that writes `PROBE_CALL` as `written`; None for a way that is not known."""
    if _HERMES.search(written):
        return read_hermes
    return read_xml if _XML.search(written) else None


def parse_answer(text: str, read: ReadCall, tools: Sequence[ToolSpec], *, is_thinking: bool) -> Answer:
    """The parts of an answer. `is_thinking`: the prompt has opened `<think>` already.

    >>> parse_answer('<think>\\nsmall\\n</think>\\n\\nred', read_hermes, (), is_thinking=False)
    Answer(text='red', reasoning='small', calls=(), broken=())
    """
    reasoning, text = _split_reasoning(text, is_thinking)
    said, *pieces = text.split(OPEN)
    found: list[ToolCall | BrokenCall] = []
    for piece in pieces:
        body, closed, after = piece.partition(CLOSE)
        said += after
        whole = BrokenCall(OPEN + body, f"has no closing {CLOSE}")
        found.append(read(body, tools) if closed else whole)
    return answer_of(said.strip(), reasoning.strip(), found)


def _split_reasoning(text: str, is_thinking: bool) -> tuple[str, str]:
    """(reasoning, the rest). A tool call ends reasoning that has no end of its own."""
    begins = text.lstrip().startswith(THINK)
    if not begins and not is_thinking:
        return "", text
    inner = text.lstrip().removeprefix(THINK) if begins else text
    thought, closed, rest = inner.partition(UNTHINK)
    if closed:
        return thought, rest
    thought, call, rest = inner.partition(OPEN)
    return thought, call + rest


def read_hermes(body: str, tools: Sequence[ToolSpec] = ()) -> ToolCall | BrokenCall:
    """A call as a JSON object.

    >>> read_hermes('{"name": "zoom", "arguments": {"image": 1}}')
    ToolCall(name='zoom', arguments={'image': 1}, id='')
    >>> read_hermes('zoom').reason
    'is not valid JSON (Expecting value: line 1 column 1 (char 0))'
    """
    text = f"{OPEN}{body}{CLOSE}"
    try:
        call = json.loads(body.strip())
    except (ValueError, RecursionError) as error:
        return BrokenCall(text, f"is not valid JSON ({error})")
    if not isinstance(call, dict):
        return BrokenCall(text, "is not a JSON object with a name and arguments")
    return read_call(call.get("name"), call.get("arguments", {}), text)


def read_xml(body: str, tools: Sequence[ToolSpec] = ()) -> ToolCall | BrokenCall:
    """A call as tags. A value is a text where the tool's schema says so, and JSON elsewhere.

    >>> read_xml("<function=zoom><parameter=image>1</parameter></function>")
    ToolCall(name='zoom', arguments={'image': 1}, id='')
    """
    text = f"{OPEN}{body}{CLOSE}"
    function = _FUNCTION.match(body)
    if function is None or not function[3]:
        return BrokenCall(text, "has no <function=name> … </function>")
    name, inner = function[1].strip(), function[2]
    if _PARAMETER.sub("", inner).strip():
        return BrokenCall(text, "has text that is not inside of <parameter=name> … </parameter>")
    schema = next((tool.parameters for tool in tools if tool.name == name), {})
    properties = schema.get("properties", {})
    arguments = {key.strip(): _value(value, properties.get(key.strip())) for key, value in _PARAMETER.findall(inner)}
    return read_call(name, arguments, text)


def _value(text: str, schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
