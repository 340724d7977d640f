"""Rows and column types of Arrow tables, with what `datasets` noted in the schema: images, videos and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from vlmrl.tasks.dataset.rows import ColumnType
from vlmrl.tasks.dataset.sources.reader import UnreadableRow, refuse_doubled


def schema_types(path: Path, schema: Any) -> dict[str, ColumnType]:
    """Column → type of a `pyarrow.Schema`. Raises `ConfigError` where two columns have one name."""
    refuse_doubled(path, schema.names)
    features = _features(schema)
    return {field.name: _with_feature(_type(field.type), features.get(field.name)) for field in schema}


def row_of(table: Any, place: int) -> dict[str, Any]:
    """One row of a `pyarrow.Table` or `RecordBatch`. Raises `UnreadableRow`."""
    if place >= table.num_rows:
        raise UnreadableRow("the file is damaged (it has fewer rows than it says): copy it again")
    try:
        row: dict[str, Any] = table.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise UnreadableRow("a text of the row is not UTF-8: write the file again") from None
    except (ValueError, OverflowError) as error:  # a time that Python has no value for
        raise UnreadableRow(f"a value of the row cannot be read: {error}") from None
    return row


def _type(kind: Any) -> ColumnType:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return ColumnType("text")
    if types.is_boolean(kind):
        return ColumnType("boolean")
    if types.is_integer(kind):
        return ColumnType("integer")
    if types.is_floating(kind) or types.is_decimal(kind):
        return ColumnType("number")
    if types.is_null(kind):
        return ColumnType("null")
    if types.is_temporal(kind):
        return ColumnType("time")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return ColumnType("list", item=_type(kind.value_type))
    if types.is_struct(kind):
        return ColumnType("struct", fields={field.name: _type(field.type) for field in kind})
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return ColumnType("bytes")
    return ColumnType("mixed")


def is_map_or_dotted(field: Any) -> bool:
    """Whether a `pyarrow.Field` is a map, has a dot in its name, or holds such a field: no leaf of it can be named."""
    from pyarrow import types

    kind = field.type
    inner = [kind.field(number) for number in range(kind.num_fields)]
    return "." in field.name or types.is_map(kind) or any(is_map_or_dotted(part) for part in inner)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` noted of each column: {"image": {"_type": "Image"}}; empty where it noted nothing readable."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        features = orjson.loads(noted or b"{}")["info"]["features"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _with_feature(kind: ColumnType, feature: Any) -> ColumnType:
    """`kind` with what `datasets` noted of it."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict):
        return kind
    name = feature.get("_type")
    if name == "Video":
        return ColumnType(kind.kind, fields=kind.fields, is_video=True)
    if name == "Image":
        return ColumnType(kind.kind, fields=kind.fields, is_image=True)
    if name == "ClassLabel" and isinstance(labels := feature.get("names"), list):
        return ColumnType(kind.kind, labels=tuple(str(label) for label in labels))
    if name in ("List", "LargeList", "Sequence") and kind.item is not None:
        return ColumnType("list", item=_with_feature(kind.item, feature.get("feature")))
    if name is None and kind.kind == "struct":
        fields = {part: _with_feature(inner, feature.get(part)) for part, inner in kind.fields.items()}
        return ColumnType("struct", fields=fields)
    return kind
