"""The types of columns that have no schema, from the values of some rows; and one type for the same column of files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlmrl.tasks.dataset.rows import ColumnType, Kind

_NULL = ColumnType("null")
_KINDS: tuple[tuple[type, Kind], ...] = (
    (bool, "boolean"),  # before int, which it is as well
    (str, "text"),
    (int, "integer"),
    (float, "number"),
    (bytes, "bytes"),
)


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, ColumnType]:
    """Column → type, in the order in which the columns appear.

    >>> types = column_types([{"q": "a", "n": 1}, {"q": None, "n": 0.5, "images": ["a.png"]}])
    >>> {name: str(kind) for name, kind in types.items()}
    {'q': 'text', 'n': 'number', 'images': 'list of text'}
    """
    types: dict[str, ColumnType] = {}
    for row in rows:
        for name, value in row.items():
            types[name] = merged(types.get(name, _NULL), type_of(value))
    return types


def type_of(value: Any) -> ColumnType:
    """The type of one value."""
    for kind, name in _KINDS:
        if isinstance(value, kind):
            return ColumnType(name)
    if isinstance(value, list):
        item = _NULL
        for element in value:
            item = merged(item, type_of(element))
        return ColumnType("list", item=item)
    if isinstance(value, dict):
        return ColumnType("struct", fields={name: type_of(field) for name, field in value.items()})
    return _NULL if value is None else ColumnType("mixed")


def merged(one: ColumnType, other: ColumnType) -> ColumnType:
    """A type for values of both: `mixed` where they have nothing in common.

    >>> str(merged(ColumnType("integer"), ColumnType("text")))
    'mixed'
    """
    if one == other or other.kind == "null":
        return one
    if one.kind == "null":
        return other
    if {one.kind, other.kind} == {"integer", "number"}:
        return ColumnType("number")
    if one.kind != other.kind:
        return ColumnType("mixed")
    is_image, is_video = one.is_image or other.is_image, one.is_video or other.is_video
    if one.kind == "list":
        return ColumnType("list", item=merged(one.item or _NULL, other.item or _NULL))
    if one.kind == "struct":
        names = {**one.fields, **other.fields}
        fields = {name: merged(one.fields.get(name, _NULL), other.fields.get(name, _NULL)) for name in names}
        return ColumnType("struct", fields=fields, is_image=is_image, is_video=is_video)
    return ColumnType(one.kind, is_image=is_image, is_video=is_video, labels=one.labels or other.labels)
