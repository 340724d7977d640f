"""How Hydra reads conf/ and `--config-dir`: their YAML files, and options that are import paths.

    task=my_module:MyTask          the option `imported` of task, with target: my_module:MyTask
    reward=[math,my_module:fn]     the option `imported` of reward as the term reward.terms.fn
    - override /reward: [my:fn]    the same in a YAML file

Templates, patterns and prompts (`Form.raw`) are taken from a YAML file as they stand: `${…}` in them is part of the
text and no reference.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from vlmrl.config.import_paths import absolute, is_import_path
from vlmrl.config.keys import all_settings
from vlmrl.config.parse import escaped
from vlmrl.errors import ConfigError

OF_IMPORTS = ("task", "reward", "tool")
"""Groups whose options may be import paths."""

OF_SEVERAL = ("reward", "tool", "monitor/logger", "experiment")
"""Groups that take several options, `group=[a,b]`."""

ENTRIES = {"reward": "reward.terms", "tool": "tool"}
"""Group whose options are entries of a dictionary → the key of the dictionary."""

FREE_FORM = ("args", "extra_args", "hydra")
"""Keys of a YAML file below which no key is one of ours."""


def read_conf_files() -> None:
    """Let Hydra read every folder of YAML files through `ConfFiles`."""
    Plugins.instance()  # registers Hydra's own reader, which is replaced here
    SourcesRegistry.instance().types[ConfFiles.scheme()] = ConfFiles


class ConfFiles(FileConfigSource):
    """A folder of YAML files, in which every import path is an option of `OF_IMPORTS`."""

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a file, or the option is an import path."""
        return bool(super().is_config(config_path)) or imported_option(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file, or make the option of an import path."""
        if not super().is_config(config_path) and (option := imported_option(config_path)) is not None:
            group, target, name = option
            content = {"defaults": [f"/schema/{group}/imported@_here_", "_self_"], "target": escaped(target)}
            package = f"{ENTRIES[group]}.{name}" if group in ENTRIES else None
            return ConfigResult(self.provider, self.full_path(), OmegaConf.create(content), {"package": package})
        file = f"{self.path}/{self._normalize_file_name(config_path)}"
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        tree = yaml.load(text, Loader=get_yaml_loader())  # a loader of plain values
        if not isinstance(tree, dict):
            return super().load_config(config_path)
        if isinstance(tree.get("defaults"), list):
            tree["defaults"] = [_with_distinct_options(entry, file) for entry in tree["defaults"]]
        config = OmegaConf.create(with_raw_texts(tree))
        return ConfigResult(self.provider, self.full_path(), config, self._get_header_dict(text[:512]))


ConfFiles.__name__ = FileConfigSource.__name__
"""Hydra registers its own reader once more in each job of joblib, and takes another name for a clash."""


def imported_option(config_path: str) -> tuple[str, str, str] | None:
    """Group, import path and name of an option that is an import path; None for any other option.

    >>> imported_option("task/my_module:MyTask"), imported_option("reward//home/me/rewards.py:fn@fn_2")
    (('task', 'my_module:MyTask', 'MyTask'), ('reward', '/home/me/rewards.py:fn', 'fn_2'))
    >>> imported_option("task/dataset"), imported_option("trainer/my_module:MyTask")
    (None, None)
    """
    group, _, option = config_path.partition("/")
    target, _, name = option.partition("@") if re.search(r":\w+@\w+$", option) else (option, "", "")
    if group not in OF_IMPORTS or not is_import_path(target):
        return None
    return group, target, name or target.rpartition(":")[2]


def distinct(group: str, given: str, options: Sequence[str]) -> list[str]:
    """The options of a list, of which no two have one name: an import path whose name another option has is called
    differently. Raises ConfigError for two equal options; `given` is the list as it was written.

    >>> distinct("reward", "", ["exact", "a:fn", "b:fn", "c.py:fn"])
    ['exact', 'a:fn', 'b:fn@fn_2', 'c.py:fn@fn_3']
    """
    names: list[str] = []
    targets: list[str] = []
    found: list[str] = []
    for option in options:
        target = absolute(option)
        name = option.rpartition(":")[2] if is_import_path(option) else option
        if name in names and is_import_path(option) and target not in targets:
            name = next(f"{name}_{count}" for count in itertools.count(2) if f"{name}_{count}" not in names)
            option = f"{option}@{name}"
        elif name in names:
            second = f"write one of them, or +{group}@{ENTRIES.get(group)}.second={option} for a second one"
            raise ConfigError(
                f"{given} names {option} twice, and equal names would be one: "
                + (second if group in ENTRIES else "write it once")
            )
        names.append(name)
        targets.append(target)
        found.append(option)
    return found


def _with_distinct_options(entry: Any, file: str) -> Any:
    """An entry of a defaults list, in whose list of options no two have one name. Raises ConfigError."""
    if not isinstance(entry, dict):
        return entry
    changed = dict(entry)
    for key, value in entry.items():
        group = str(key).removeprefix("override ").strip().lstrip("/").partition("@")[0]
        if isinstance(value, list) and group in OF_SEVERAL and all(isinstance(option, str) for option in value):
            changed[key] = distinct(group, f"{file}: {key}: [{', '.join(value)}]", value)
    return changed


@functools.cache
def raw_names() -> frozenset[str]:
    """The names of the keys whose texts are taken as they stand.

    >>> sorted(raw_names() & {"template", "pattern", "name"})
    ['pattern', 'template']
    """
    return frozenset(key.rpartition(".")[2] for key, setting in all_settings() if setting.form.raw)


def with_raw_texts(tree: Any, name: str = "") -> Any:
    r"""The content of a YAML file, in which no raw text holds a reference.

    >>> with_raw_texts({"task": {"template": "${{ price }}", "path": "${oc.env:DATA}", "args": {"pattern": "${seed}"}}})
    {'task': {'template': '\\${{ price }}', 'path': '${oc.env:DATA}', 'args': {'pattern': '${seed}'}}}
    """
    if isinstance(tree, dict):
        return {key: value if key in FREE_FORM else with_raw_texts(value, str(key)) for key, value in tree.items()}
    return escaped(tree) if isinstance(tree, str) and name in raw_names() else tree
