"""Thrift's compact protocol, in which Parquet writes its page headers and its footer: as much as is needed to read any
struct and to write a footer.

Specification: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
_TRUE, _FALSE, _BYTE, _I16, _DOUBLE, _SET, _MAP = 1, 2, 3, 4, 7, 10, 11

Fields: TypeAlias = Iterable[tuple[int, int, Any]]
"""A struct to be written: number, type and value of each field, numbers ascending. The value of a LIST is its bytes."""


class Truncated(Exception):  # noqa: N818 — not an error: more bytes are to be read
    """The bytes end inside the struct."""


def read_struct(data: bytes, place: int = 0, *, until: int = 1 << 15) -> tuple[dict[int, Any], int]:
    """Field number → value of the struct at `place`, and the place behind it; or the fields below `until`, and the
    place where the value of that field begins. Raises `Truncated` or, for bytes that are no struct, ValueError.

    >>> read_struct(bytes([0x15, 0x06, 0x25, 0x02, 0x00]))
    ({1: 3, 3: 1}, 5)
    """
    fields: dict[int, Any] = {}
    number = 0
    try:
        while head := data[place]:
            place += 1
            kind = head & 15
            if head >> 4:
                number += head >> 4
            else:
                value, place = _varint(data, place)
                number = _signed(value)
            if number >= until:
                return fields, place
            if kind in (_TRUE, _FALSE):
                fields[number] = kind == _TRUE
            else:
                fields[number], place = _read(data, place, kind)
    except IndexError:
        raise Truncated from None
    return fields, place + 1


def read_value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    """A value of this type, and the place behind it. Raises as `read_struct` does."""
    try:
        return _read(data, place, kind)
    except IndexError:
        raise Truncated from None


def write_struct(fields: Fields) -> bytes:
    """The bytes of a struct.

    >>> write_struct([(1, I32, 3), (3, I32, 1)]).hex(" ")
    '15 06 25 02 00'
    """
    written, last = bytearray(), 0
    for number, kind, value in fields:
        written.append((number - last) << 4 | kind)
        written += _written(kind, value)
        last = number
    return bytes(written) + b"\0"


def write_list(kind: int, items: Sequence[Any]) -> bytes:
    """The bytes of a list of values, or of structs that are written already."""
    written = bytearray([0xF0 | kind]) + _write_varint(len(items))
    for item in items:
        written += _written(kind, item)
    return bytes(written)


def _read(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE, _BYTE):  # inside a list; as a field, a truth value is its type
        return data[place], place + 1
    if kind in (_I16, I32, I64):
        value, place = _varint(data, place)
        return _signed(value), place
    if kind == BINARY:
        size, place = _varint(data, place)
        if place + size > len(data):
            raise IndexError
        return data[place : place + size], place + size
    if kind in (LIST, _SET):
        return _read_list(data, place)
    if kind == STRUCT:
        return read_struct(data, place)
    if kind == _DOUBLE:
        if place + 8 > len(data):
            raise IndexError
        return struct.unpack_from("<d", data, place)[0], place + 8
    raise ValueError(f"Parquet has no value of Thrift type {kind}")


def _read_list(data: bytes, place: int) -> tuple[list[Any], int]:
    size, kind = data[place] >> 4, data[place] & 15
    place += 1
    if size == 15:
        size, place = _varint(data, place)
    items = []
    for _ in range(size):
        item, place = _read(data, place, kind)
        items.append(item)
    return items, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _written(kind: int, value: Any) -> bytes:
    if kind in (I32, I64):
        return _write_varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return _write_varint(len(value)) + bytes(value)
    return bytes(value)


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
