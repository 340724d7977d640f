"""Documentation of config fields, read from the sources: type, default, choices and the string below a field.

Python does not keep the strings below fields, so they are read from the syntax tree. A field that is added to a
dataclass of the config is explained without further work (`python -m vlmrl explain`, conf/REFERENCE.md).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import Setting, setting_of


@dataclass(frozen=True)
class FieldDoc:
    """One field of a schema."""

    name: str
    type_text: str
    """The type in words: `int`, `float or null`, `one of tree, varlen, none`, `group`."""
    default: Any
    """The schema's default; `MISSING` where a YAML file or the command line has to set the value."""
    doc: str
    """The string below the field, on one line."""
    choices: dict[str, str]
    """Name → its meaning ("" where the name says enough); empty where the field is not a choice."""
    schema: type | None
    """The dataclass of a group, or of each group of a dictionary; None for a field with a value."""
    by_name: bool
    """Whether the field is a dictionary of groups, whose names the user chooses."""
    setting: Setting | None
    """Its metadata; None for a group."""

    @property
    def is_number(self) -> bool:
        return re.fullmatch(r"(list of (\d+ )?)?(int|float)( or null)?", self.type_text) is not None


@functools.cache
def fields_of(schema: type) -> tuple[FieldDoc, ...]:
    """The fields of a dataclass, in order, including inherited ones.

    >>> from vlmrl.config.trainer import TrainerConfig
    >>> field = next(field for field in fields_of(TrainerConfig) if field.name == "decay")
    >>> field.type_text, field.doc
    ('one of constant, linear, cosine, wsd', 'How the learning rate falls from there to `max_steps`.')
    """
    return tuple(_fields_of(schema))


def _fields_of(schema: type) -> Iterator[FieldDoc]:
    hints = typing.get_type_hints(schema)
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= below_names(base)
    for field in dataclasses.fields(schema):
        alternatives = [one for one in alternatives_of(hints[field.name]) if one is not types.NoneType]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        items = [one for dictionary in alternatives if _is_dict(dictionary) for one in typing.get_args(dictionary)[1:]]
        nested = next((one for one in (*alternatives, *items) if _is_group(one)), None)
        setting = setting_of(field)
        named = setting.choices if setting is not None else None
        enum = named or next((one for one in alternatives if _is_enum(one)), None)
        choices = below_names(enum) if enum else {}
        yield FieldDoc(
            name=field.name,
            type_text=in_words(hints[field.name], tuple(choices), open_ended=named is not None),
            default=MISSING if default is dataclasses.MISSING else default,
            doc=docs.get(field.name, ""),
            choices=choices,
            schema=nested,
            by_name=nested in items,
            setting=setting,
        )


UNITS = (
    *("optimizer steps", "tokens", "turns", "problems", "rollouts", "conversations", "evaluations", "checkpoints"),
    "blind controls",
    "pairs",
    *(
        "images",
        "frames",
        "start states",
        "squares",
        "codewords",
        "rows",
        "pixels",
        "servers",
        "engines",
        "GPUs",
        "nodes",
        "processes",
        "threads",
    ),
    *("seconds", "minutes", "GiB", "bytes", "share", "shares", "probability", "ratios", "nats", "norm", "reward"),
    *("layers", "heads", "width", "rank", "merges", "positions", "times", "standard deviation", "seed", "step size"),
    *(
        "passes",
        "pass rate",
        "weight",
        "divisor",
        "units of the reference",
        "score of the judge",
        "the gradient's unit",
        "port",
    ),
)
"""Units of numbers, in the words of the docstrings; the docstring of every number names one of them."""


def unit_of(field: FieldDoc) -> str:
    """The unit of a number: the first word of `UNITS` in its docstring; "" for a field that is not a number.

    >>> from vlmrl.config.trainer import TrainerConfig
    >>> [unit_of(field) for field in fields_of(TrainerConfig)][:2]
    ['optimizer steps', 'passes']
    """
    if not field.is_number:
        return ""
    found = {
        match.start(): unit
        for unit in sorted(UNITS, key=len)
        if (match := re.search(rf"\b{re.escape(unit)}\b", field.doc, re.IGNORECASE))
    }
    return found[min(found)] if found else ""


def summary_of(schema: type) -> str:
    """The docstring of a dataclass, on one line."""
    return " ".join((schema.__doc__ or "").split())


def alternatives_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def in_words(hint: Any, choices: tuple[str, ...] = (), *, open_ended: bool = False) -> str:
    """A type in words.

    >>> in_words(float | None), in_words(list[str]), in_words(tuple[float, float])
    ('float or null', 'list of str', 'list of 2 float')
    """
    if hint is Any:  # OmegaConf has no type for it
        return "str or list of str"
    alternatives = alternatives_of(hint)
    if len(alternatives) > 1:
        return " or ".join("null" if one is types.NoneType else in_words(one, choices) for one in alternatives)
    if choices:
        return f"one of {', '.join(choices)}" + (", or an import path" if open_ended else "")
    if dataclasses.is_dataclass(hint):
        return "group"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {in_words(arguments[0])}"
    if origin is dict:
        return "groups by name" if _is_group(arguments[1]) else "dict"
    return str(hint.__name__)


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_dict(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def below_names(owner: type) -> dict[str, str]:
    """Field or enum member → the string below it, on one line; "" where there is none. Inherited ones are left out.

    >>> from vlmrl.config.trainer import Packing
    >>> below_names(Packing)["none"]
    'One sample per forward pass; the reference.'
    """
    found: dict[str, str] = {}
    body = _classes(owner.__module__)[owner.__name__].body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        match statement:
            case (
                ast.AnnAssign(target=ast.Name(id=name))
                | ast.Assign(targets=[ast.Name(id=name)])
                | ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))])  # vars()["return"] = …
            ):
                match following:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.split())
                    case _:
                        found[name] = ""
    return found
