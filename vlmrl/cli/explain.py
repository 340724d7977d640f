"""`python -m vlmrl explain [key or group …] [override …]`: the meaning of a key and the origin of its value.

    python -m vlmrl explain                                        the groups, their options, what is chosen
    python -m vlmrl explain trainer model=qwen3vl                  every key of a group under these choices
    python -m vlmrl explain trainer.learning_rate learning_rate    one key; all keys of that name
    python -m vlmrl explain algorithm                              the loss as an equation, then the group's keys

A value comes from one of three places; a later one wins: the schema's default, the YAML files in the order of Hydra's
defaults list, and the overrides on the command line. The documentation is read from the schemas (config/field_docs.py).
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from vlmrl.cli.arguments import groups as option_folders
from vlmrl.cli.equation import Minimized, equation
from vlmrl.config.field_docs import FieldDoc, fields_of, summary_of, unit_of
from vlmrl.config.keys import groups_at, unknown_key
from vlmrl.config.ranges import range_text
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError

WIDTH = 100
"""Width of the output in characters."""


@dataclass(frozen=True)
class Setting:
    """One place that sets a key."""

    where: str
    """`trainer/finetune.yaml`, `override`."""
    value: str
    """As written there; `${…}` is the value of another key."""


@dataclass(frozen=True)
class Composition:
    """A composed config with the origin of its values."""

    config: DictConfig
    choices: Mapping[str, str]
    """Group → chosen option."""
    options: Mapping[str, Sequence[str]]
    """Group → all its options, the user's own included."""
    settings: Mapping[str, Sequence[Setting]]
    """Key → the places that set it, the winning one last. Keys that only the schema sets are missing."""


def explanation(arguments: Sequence[str], conf: Path) -> str:
    """The text to print. Words without `=` are keys or groups, the others are overrides.

    Raises ConfigError for an unknown key, and Hydra's errors for overrides that do not compose.
    """
    parser = argparse.ArgumentParser(prog="python -m vlmrl explain", description=__doc__, add_help=False)
    parser.add_argument("--config-dir", "-cd")
    options, words = parser.parse_known_args(list(arguments))
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    composition = composed(overrides, conf, options.config_dir)
    keys = [word for word in words if word not in overrides]
    return "\n".join(line for key in keys or [""] for line in explained(key, composition))


def composed(overrides: list[str], conf: Path, config_dir: str | None) -> Composition:
    """Compose `overrides` as a run would, and find the origin of each value."""
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: there is no folder {folder}: correct the path")
        overrides = [*overrides, f"hydra.searchpath=[file://{folder}]"]
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        choices = {group: option for group, option in config.hydra.runtime.choices.items() if option is not None}
        groups = [group for group in choices if not group.startswith("hydra/")]
        folders = [group for group in option_folders() if not group.startswith("hydra/")]
        return Composition(
            config=config,
            choices={group: choices[group] for group in groups},
            options={group: loader.get_group_options(group) for group in {*folders, *groups}},
            settings=settings_of(loader, overrides, config.hydra.searchpath),
        )


def settings_of(loader: ConfigLoader, overrides: list[str], folders: Sequence[str]) -> dict[str, list[Setting]]:
    """Key → the places that set it, in the order in which Hydra merges them.

    `folders` (`file://…`) are searched after vlmrl's own conf/.
    """
    settings: dict[str, list[Setting]] = {}
    defaults = loader.compute_defaults_list("config", overrides, RunMode.RUN)
    for default in defaults.defaults:
        assert default.config_path is not None
        where, tree = _file(loader, default.config_path, folders)
        for key, value in leaves(tree, f"{default.package}." if default.package else ""):
            settings.setdefault(key, []).append(Setting(where, value))
    for override in defaults.config_overrides:
        for key, value in _overridden(override):
            settings.setdefault(key, []).append(Setting("override", value))
    return settings


def _file(loader: ConfigLoader, path: str, folders: Sequence[str]) -> tuple[str, DictConfig]:
    """Name and content of a config's YAML file, from the first folder on the search path that has it.

    A schema has no file, so its name and content are empty.
    """
    for source in loader.get_sources():
        if source.provider == "main" and source.is_config(path):
            return f"{path}.yaml", _tree(source.load_config(path).config)
    for folder in folders:
        file = Path(folder.removeprefix("file://"), f"{path}.yaml")
        if file.is_file():
            return str(file), _tree(OmegaConf.load(file))
    return "", OmegaConf.create()


def _tree(config: object) -> DictConfig:
    assert isinstance(config, DictConfig)
    return config


def leaves(tree: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted key and value of every value in a file, except its defaults list."""
    for name, value in tree.items_ex(resolve=False):
        key = f"{prefix}{name!s}"
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            yield from leaves(value, f"{key}.")
        elif not (name == "defaults" and isinstance(value, ListConfig)):
            yield key, _text(tree, str(name))


def _overridden(override: Override) -> Iterator[tuple[str, str]]:
    if override.is_delete():
        return
    value = override.value()
    if isinstance(value, dict):
        yield from leaves(OmegaConf.create(value), f"{override.key_or_group}.")
    else:
        yield override.key_or_group, override.get_value_element_as_str()


def _text(tree: DictConfig, name: str) -> str:
    """A value as the YAML file has it; interpolations are not resolved."""
    if OmegaConf.is_missing(tree, name):
        return "not set"
    value = OmegaConf.to_container(OmegaConf.create({name: tree._get_node(name)}), enum_to_str=True)[name]  # type: ignore[index,call-overload]
    return text_of(value)


def text_of(value: object) -> str:
    """A value as the command line writes it.

    >>> text_of(None), text_of(True), text_of([1, 2]), text_of(1e-6)
    ('null', 'true', '[1,2]', '1e-06')
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(map(text_of, value))}]"
        case dict():
            return "{" + ",".join(f"{key}:{text_of(item)}" for key, item in value.items()) + "}"
        case _:
            return str(getattr(value, "name", value))


# ── the text ────────────────────────────────────────────────────────────────────────────────────────────────


def explained(key: str, composition: Composition) -> Iterator[str]:
    """The lines about one key, about one group (`model`, `model/vlm`; "" is the root), or about all keys of one name.

    Raises ConfigError for an unknown key.
    """
    if key.replace(".", "/") in composition.options and not groups_at(key.replace("/", ".")):
        yield key  # its options set keys of other groups
        yield from _wrapped(f"options: {', '.join(composition.options[key.replace('.', '/')])}", "  ")
        return
    key = key.replace("/", ".")
    found = dict(every_key(composition.config))
    if key == "" or (key in found and found[key].schema is not None):
        yield from _group(key, composition, found)
        return
    named = [name for name in found if name == key or name.rpartition(".")[2] == key]
    free = [name for name in found if found[name].type_text == "dict" and key.startswith(f"{name}.")]
    if not named and not free:
        raise ConfigError(f"{key}: {unknown_key(key)}")
    for name in named or free:
        yield from _value(name, found[name], composition)
        yield ""


def every_key(config: DictConfig) -> Iterator[tuple[str, FieldDoc]]:
    """Dotted key and documentation of everything in `config`, including groups, also those that are null."""
    yield from _keys_below(config, RunConfig, "")


def _keys_below(node: DictConfig | None, schema: type, prefix: str) -> Iterator[tuple[str, FieldDoc]]:
    for field in fields_of(schema):
        key = prefix + field.name
        if field.schema is None:
            yield key, field
            continue
        there = node is not None and not OmegaConf.is_missing(node, field.name)
        child = node[field.name] if there and node is not None else None
        if field.by_name:
            yield key, field
            for name, entry in child.items() if child is not None else ():
                yield from _group_below(entry, replace(field, name=str(name), by_name=False), f"{key}.{name}")
        else:
            yield from _group_below(child, field, key)


def _group_below(child: DictConfig | None, field: FieldDoc, key: str) -> Iterator[tuple[str, FieldDoc]]:
    chosen = OmegaConf.get_type(child) if isinstance(child, DictConfig) else field.schema
    field = replace(field, schema=chosen)
    yield key, field
    yield from _keys_below(child, chosen or RunConfig, f"{key}.")


def _group(key: str, composition: Composition, found: Mapping[str, FieldDoc]) -> Iterator[str]:
    """The lines about a group: a heading, then its keys."""
    group = key.replace(".", "/")
    if key:
        chosen = f"={composition.choices[group]}" if group in composition.choices else ""
        yield f"{group}{chosen}"
        yield from _wrapped(summary_of(found[key].schema or RunConfig), "  ")
        if group in composition.options:
            yield from _wrapped(f"options: {', '.join(composition.options[group])}", "  ")
        yield ""
        if group == "algorithm":
            yield from equation(Minimized.of(composition.config))
            yield ""
    prefix = f"{key}." if key else ""
    for name, field in found.items():
        if name.startswith(prefix) and name.count(".") == prefix.count(".") and name != key:
            if field.schema is None:
                yield from _value(name, field, composition)
            else:
                below = name.replace(".", "/")
                chosen = f"={composition.choices[below]}" if below in composition.choices else ""
                yield f"{name}{chosen}"
                yield from _wrapped(f"{field.doc} More: python -m vlmrl explain {below}", "    ")
                if below in composition.options:
                    yield from _wrapped(f"options: {', '.join(composition.options[below])}", "    ")
            yield ""


def _value(key: str, field: FieldDoc, composition: Composition) -> Iterator[str]:
    """The lines about a value: the value, type, unit and range, documentation, and where the value comes from."""
    about = [field.type_text, unit_of(field), range_text(key)]
    yield f"{key} = {_now(key, composition)}"
    yield from _wrapped("; ".join(part for part in about if part), "    ")
    yield from _wrapped(field.doc, "    ")
    for name, meaning in field.choices.items():
        if meaning:
            yield from _wrapped(f"{name}: {meaning}", "      ")
    default = "not set" if field.default == "???" else text_of(field.default)
    places = [f"schema {default}"]
    for name, settings in composition.settings.items():
        if name == key or name.startswith(f"{key}."):
            below = f"{name.removeprefix(f'{key}.')}=" if name != key else ""
            places += [f"{setting.where} {below}{setting.value}" for setting in settings]
    yield from _wrapped(f"from {' → '.join(places)}", "    ")


def _now(key: str, composition: Composition) -> str:
    node: Any = composition.config
    *groups, name = key.split(".")
    for group in groups:
        if OmegaConf.is_missing(node, group):
            return "not set"
        node = node[group]
        if node is None:
            return f"not set: {key.rpartition('.')[0]} is null under these choices"
    if OmegaConf.is_missing(node, name):
        return "not set"
    value = node[name]
    return text_of(OmegaConf.to_container(value, enum_to_str=True) if OmegaConf.is_config(value) else value)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
