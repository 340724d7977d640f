"""From what Hydra composed, or a run's config.yaml, to a RunConfig.

    DictConfig ─▶ refuse keys without a value and keys that no schema has ─▶ RunConfig

Whether a well-typed config can run is checked afterwards by `vlmrl.preflight.check.check`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from vlmrl.config.field_docs import alternatives_of, fields_of
from vlmrl.config.fields import setting_of
from vlmrl.config.import_paths import absolute
from vlmrl.config.keys import unknown_key
from vlmrl.config.run import SCHEMAS, RunConfig, schemas_of
from vlmrl.errors import ConfigError


def parse(config: DictConfig) -> RunConfig:
    """Turn a composed config into a RunConfig. Only types are checked. Raises ConfigError."""
    try:
        for key in _missing_keys(config):
            raise ConfigError(f"{key} has no value, so the run cannot start: set {key}=…")
        for key in _stray_keys(config, ""):
            raise ConfigError(f"{key}: {unknown_key(key)}")
        run_config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(summary(error)) from error
    assert isinstance(run_config, RunConfig)
    _make_absolute(run_config)
    for key, value in _wrong_references(run_config, ""):
        raise ConfigError(
            f"{key} is {value!r} after references (${{…}}) were followed, which has another type, so the run cannot "
            f"read it: refer to a key of the same kind, or set {key} itself"
        )
    return run_config


def _make_absolute(config: Any) -> None:
    """Make the import paths of files absolute, in place: a run is resumed from any folder."""
    for field in dataclasses.fields(config):
        value, setting = getattr(config, field.name), setting_of(field)
        if setting is not None and setting.imports and isinstance(value, str):
            setattr(config, field.name, absolute(value))
        for each in value.values() if isinstance(value, dict) else (value,):
            if dataclasses.is_dataclass(each):
                _make_absolute(each)


def _wrong_references(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Groups, lists and dictionaries that are something else. OmegaConf checks the types of single values only, where
    `${…}` stands for another key."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        key, value, kinds = prefix + field.name, getattr(config, field.name), alternatives_of(hints[field.name])
        origins = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if dataclasses.is_dataclass(value) and isinstance(value, origins):
            yield from _wrong_references(value, f"{key}.")
        elif tuple in origins:
            if not isinstance(value, list | tuple):
                yield key, value
        elif any(origin in (list, dict) or dataclasses.is_dataclass(origin) for origin in origins):
            items = typing.get_args(kinds[0]) if list in origins else ()
            if not isinstance(value, origins) or (items and not all(isinstance(item, items) for item in value)):
                yield key, value
            elif isinstance(value, dict):
                yield from _wrong_entries(value, typing.get_args(kinds[0])[1], key)


def _wrong_entries(entries: dict[str, Any], kind: type, key: str) -> Iterator[tuple[str, Any]]:
    """What is wrong in a dictionary of groups."""
    if dataclasses.is_dataclass(kind):
        for name, entry in entries.items():
            if isinstance(entry, kind):
                yield from _wrong_references(entry, f"{key}.{name}.")
            else:
                yield f"{key}.{name}", entry


def typed(tree: DictConfig) -> DictConfig:
    """Give the tree of a run's config.yaml its types back. Raises ConfigError where it does not fit the schema.

    The schema of a mixed group is found by its `kind`. Keys that an older version did not write get the values that
    reproduce its behavior.
    """
    tree = _upgraded(tree)
    try:
        merged = OmegaConf.merge(_defaults(_kinds(RunConfig, tree, "")), tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"config.yaml does not fit the schema ({summary(error)}), so this version of vlmrl did not write it: "
            "continue the run with the version that its `environment` names"
        ) from error
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)
    return merged


class _Kinds(NamedTuple):
    """Which schema a group of a tree has, and which ones the groups and the entries of dictionaries in it."""

    schema: type
    below: tuple[tuple[str, str | None, _Kinds], ...]
    """Field, name of its entry (None: the field is a group itself), and what it has."""


def _kinds(schema: type, tree: DictConfig, prefix: str) -> _Kinds:
    """The schemas that each `kind` in the tree names. Raises ConfigError for one that there is not."""
    below: list[tuple[str, str | None, _Kinds]] = []
    for field in fields_of(schema):
        group = tree.get(field.name)
        if field.schema is None or not OmegaConf.is_dict(group):
            continue
        if not field.by_name:
            below.append((field.name, None, _of_kind(field.schema, group, prefix + field.name)))
            continue
        for name, entry in group.items():
            if OmegaConf.is_dict(entry):
                below.append((field.name, name, _of_kind(field.schema, entry, f"{prefix}{field.name}.{name}")))
    return _Kinds(schema, tuple(below))


def _of_kind(base: type, tree: DictConfig, key: str) -> _Kinds:
    schemas, kind = schemas_of(base), tree.get("kind")
    if schemas and kind is not None and kind not in schemas:
        raise ConfigError(
            f"config.yaml has {key}.kind={kind}, and this version of vlmrl knows only {', '.join(schemas)}: "
            "continue the run with the version that its `environment` names."
        )
    return _kinds(schemas.get(kind, base), tree, f"{key}.")


@functools.lru_cache(maxsize=64)
def _defaults(kinds: _Kinds) -> DictConfig:
    """The schemas with their own values, not to be changed. Making them takes longer than reading the file, and runs
    that are compared mostly have the same kinds."""
    config = OmegaConf.structured(kinds.schema)
    assert isinstance(config, DictConfig)
    for field, name, found in kinds.below:
        if name is None:
            config[field] = _defaults(found)
        else:
            config[field][name] = _defaults(found)
    return config


def tree_of(config: RunConfig) -> dict[str, Any]:
    """The values of a config for config.yaml. `${` in a text is escaped, so that reading it gives the same text."""
    tree = _mapped(dataclasses.asdict(config), escaped)
    assert isinstance(tree, dict)
    return tree


def without_references(tree: Any) -> Any:
    r"""A tree that was read from config.yaml, with every `${…}` in it as text.

    A run writes resolved values, so a reference there was put in by hand. A config.yaml may come from someone else, and
    `${oc.env:…}` would read this machine's environment.

    >>> without_references({"a": "${oc.env:HOME}", "b": [r"\${name} is", "plain"]})
    {'a': '\\${oc.env:HOME}', 'b': ['\\${name} is', 'plain']}
    """
    return _mapped(tree, lambda text: text if REFERENCE.search(text) is None else escaped(text))


def literal(config: DictConfig | ListConfig) -> Any:
    r"""The values of a config.yaml as plain containers, with every text as it is.

    >>> literal(OmegaConf.create({"a": r"\${name} is", "b": "${oc.env:HOME}"}))
    {'a': '${name} is', 'b': '${oc.env:HOME}'}
    """
    return OmegaConf.to_container(OmegaConf.create(without_references(OmegaConf.to_container(config))), resolve=True)


REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
"""`${` that OmegaConf resolves: an even number of backslashes stands before it."""


def escaped(text: str) -> str:
    r"""A text as OmegaConf has to read it to give that text.

    >>> escaped("${name} is"), escaped("plain $5 {x}")
    ('\\${name} is', 'plain $5 {x}')
    """
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def _mapped(tree: Any, of_text: Callable[[str], str]) -> Any:
    """A copy of a tree in which each text is replaced, each enum is its name, and each tuple a list."""
    match tree:
        case dict():
            return {name: _mapped(value, of_text) for name, value in tree.items()}
        case list() | tuple():
            return [_mapped(value, of_text) for value in tree]
        case Enum():
            return tree.name
        case str():
            return of_text(tree)
    return tree


def _upgraded(tree: DictConfig) -> DictConfig:
    """A copy of an older config.yaml with the keys of today.

    The first version had no `task.kind`, whose value follows from the task's keys, and no `task.credit`: the credit
    was `algorithm.credit` alone. Before `algorithm.truncated`, a cut answer was paid 0 per turn and in full per
    episode. `model.vlm.flat_mm_kwargs` told vLLM what its own processor says now.
    """
    if OmegaConf.select(tree, "model.vlm.flat_mm_kwargs") is not None:
        tree = copy.deepcopy(tree)
        with open_dict(tree):
            del tree.model.vlm.flat_mm_kwargs
    if (credit := OmegaConf.select(tree, "algorithm.credit")) is not None and "truncated" not in tree.algorithm:
        tree = copy.deepcopy(tree)
        with open_dict(tree):
            tree.algorithm.truncated = "zero" if credit == "turn" else "keep"
    if not OmegaConf.is_dict(tree.get("task")) or "kind" in tree.task:
        return tree
    tree = copy.deepcopy(tree)
    with open_dict(tree):
        known = {kind: {field.name for field in dataclasses.fields(schema)} for kind, schema in SCHEMAS["task"].items()}
        kind = next((kind for kind, names in known.items() if names.issuperset(tree.task)), None)
        if kind is not None:
            tree.task.kind = kind
        if credit is not None:
            tree.task.credit = credit
    return tree


def summary(error: OmegaConfBaseException) -> str:
    """The key and the first line of an OmegaConf error."""
    text = str(error).splitlines()[0]
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        text += (
            ", so the value cannot be read: correct what stands between ${ and }, or write \\${ where the text itself "
            "holds ${"
        )
    return f"{error.full_key}: {text}" if error.full_key else text


def _stray_keys(config: DictConfig, prefix: str) -> Iterator[str]:
    """Keys that `+key=value` added to a node whose schema does not have them."""
    schema = OmegaConf.get_type(config)
    fields = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set(config)
    for name in config:
        assert isinstance(name, str)
        if name not in fields:
            yield prefix + name
        elif not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            yield from _stray_keys(config[name], f"{prefix}{name}.")


def _missing_keys(config: DictConfig) -> Iterator[str]:
    # Groups first: values of others may be interpolated from them.
    yield from (field.name for field in dataclasses.fields(RunConfig) if OmegaConf.is_missing(config, field.name))
    yield from sorted(OmegaConf.missing_keys(config))
