"""The JSON schema of a function's parameters, and whether the arguments of a call fit it.

Only what type hints can say: types, lists, choices, null, defaults. A call is checked by the same words, so that its
reply names the argument and what it must be.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from vlmrl.errors import ConfigError
from vlmrl.tools.base import BadCallError, _quoted
from vlmrl.types import Image

IMAGE_TYPES = (Image, PILImage.Image, np.ndarray)
"""Types of a parameter that a call fills with the number of an image."""

IMAGE_SCHEMA = {"type": "integer", "description": "Number of an image; the first image shown is 1."}

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    dict: {"type": "object"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    Any: {},
}


def schema_of_hint(hint: Any) -> dict[str, Any] | None:
    """The JSON schema of a type hint; None for a type that JSON does not have.

    >>> schema_of_hint(list[int]), schema_of_hint(Literal["a", "b"])
    ({'type': 'array', 'items': {'type': 'integer'}}, {'enum': ['a', 'b']})
    >>> schema_of_hint(int | None), schema_of_hint(complex)
    ({'anyOf': [{'type': 'integer'}, {'type': 'null'}]}, None)
    """
    if hint in IMAGE_TYPES:
        return dict(IMAGE_SCHEMA)
    try:
        if hint in _PLAIN:
            return dict(_PLAIN[hint])
    except TypeError:  # not hashable
        return None
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        described = schema_of_hint(items[0])
        words = next((each for each in items[1:] if isinstance(each, str)), None)
        return described if described is None or words is None else {**described, "description": words}
    if origin is Literal:
        return {"enum": list(items)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [each.value for each in hint]}
    if origin in (typing.Union, types.UnionType):
        of_items = [schema_of_hint(item) for item in items]
        return None if None in of_items else {"anyOf": of_items}
    if origin is np.ndarray:
        return dict(IMAGE_SCHEMA)
    return _schema_of_container(origin, items)


def _schema_of_container(origin: Any, items: tuple[Any, ...]) -> dict[str, Any] | None:
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {"type": "object"}
    if origin is tuple and (len(items) < 2 or items[1] is not ...):
        of_items = [schema_of_hint(item) for item in items]
        if None in of_items:
            return None
        same = of_items[0] if all(each == of_items[0] for each in of_items) else {"anyOf": of_items}
        return {"type": "array", "items": same, "minItems": len(items), "maxItems": len(items)}
    if isinstance(origin, type) and issubclass(origin, typing.Sequence):
        item = schema_of_hint(items[0])
        return None if item is None else {"type": "array", "items": item}
    return None


def parameters_of(key: str, path: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of the parameters of a function, without those that are `given`. `key` is the setting that names
    it by `path`. Raises `ConfigError` for a parameter without a type hint, or of a type that JSON does not have."""
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(
            f"{key}={path} has no type hints that can be read ({error}), so the policy cannot be told its arguments: "
            "write a function with type hints"
        ) from error
    words = argument_words(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in signature.parameters.items():
        if name in given or parameter.kind is parameter.VAR_KEYWORD:
            continue
        schema = schema_of_hint(hints[name]) if name in hints else None
        if schema is None or parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            hint = "no type hint" if name not in hints else f"the type {hints[name]}"
            raise ConfigError(
                f"{key}={path} has the parameter {name} with {hint}, which a tool call cannot fill: give it a type of "
                "JSON (str, int, float, bool, list, dict, Literal, Optional) or an image type"
            )
        if name in words:
            schema["description"] = words[name]
        properties[name] = schema
        if parameter.default is parameter.empty:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def description_of(function: Callable[..., Any]) -> str:
    """The docstring before its `Args:`, as one paragraph."""
    doc = inspect.getdoc(function) or ""
    return " ".join(re.split(r"^\s*(?:Args|Arguments|Parameters|Returns|Raises):", doc, flags=re.MULTILINE)[0].split())


def argument_words(doc: str) -> dict[str, str]:
    """What the `Args:` of a docstring say of each argument.

    >>> argument_words('''Count.
    ...
    ... Args:
    ...     what: What is counted,
    ...         in one word.
    ...     image (int): Where.
    ... ''')
    {'what': 'What is counted, in one word.', 'image': 'Where.'}
    """
    found: dict[str, str] = {}
    inside, indent, name = False, 0, ""
    for line in doc.splitlines():
        text = line.strip()
        if re.fullmatch(r"(Args|Arguments|Parameters):", text):
            inside, indent, name = True, 0, ""
        elif inside and text:
            own = len(line) - len(line.lstrip())
            if own == 0:
                break
            indent = indent or own
            entry = re.match(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)", text)
            if own == indent and entry is not None:
                name = entry[1]
                found[name] = entry[2]
            elif name:
                found[name] = f"{found[name]} {text}".strip()
    return found


def check_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise `BadCallError` where the arguments of a call do not fit the schema of its tool."""
    properties = schema.get("properties", {})
    known = ", ".join(properties) or "none"
    for name in arguments:
        if name not in properties:
            raise BadCallError(f"{name} is no argument of this tool: it takes {known}.")
    for name in schema.get("required", ()):
        if name not in arguments:
            raise BadCallError(f"The argument {name} is missing: the tool takes {known}.")
    for name, value in arguments.items():
        if not fits(value, properties[name]):
            raise BadCallError(f"{name}={_quoted(value)} is wrong: it must be {in_words(properties[name])}.")


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value fits a schema of this file.

    >>> fits([1, 2], {"type": "array", "items": {"type": "integer"}, "minItems": 2}), fits(1.5, {"type": "integer"})
    (True, False)
    """
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    match schema.get("type"):
        case "string":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "object":
            return isinstance(value, dict)
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
                and all(fits(each, schema.get("items", {})) for each in value)
            )
    return True


def in_words(schema: Mapping[str, Any]) -> str:
    """What a value must be.

    >>> in_words({"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4})
    'a list of 4 values, each a whole number'
    """
    if "anyOf" in schema:
        return " or ".join(in_words(each) for each in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(_quoted(each) for each in schema["enum"])
    if schema.get("type") == "array":
        count = f"{schema['minItems']} values" if schema.get("minItems") == schema.get("maxItems", -1) else "values"
        return f"a list of {count}" + (f", each {in_words(schema['items'])}" if schema.get("items") else "")
    names = {
        "string": "a text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "object": "an object",
    }
    return names.get(str(schema.get("type")), "a value")


def example_of(schema: Mapping[str, Any]) -> Any:
    """A value that fits a schema.

    >>> example_of({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    {'n': 1}
    """
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: example_of(properties[name]) for name in schema.get("required", ())}
        case "array":
            return [example_of(schema.get("items", {}))] * max(1, schema.get("minItems", 1))
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
    return "a"
