"""Configs and splits of a folder of data files: of the hub, or on this machine.

The rules are those of Hugging Face `datasets`
(https://huggingface.co/docs/hub/datasets-file-names-and-splits), so that a repository has the same splits here:

1. `configs` in the header of README.md names the files of each split, where it does.
2. Otherwise the names of files and folders tell: a split is a word of its own (`train`, `dev`, `test`, …) in the file's
   name or in a folder's, or what stands before `-00000-of-00002`. Files that tell nothing are for training.

Of files in several formats the most frequent format is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources.reader import SUFFIXES, is_data_file, suffix_of

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*?)-\d{5}-of-\d{5}")
_NOTES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
"""JSON files that describe a data set and hold no rows."""

Splits = Mapping[str, Sequence[str]]
"""Split → its files, in order."""


@dataclass(frozen=True)
class Chosen:
    """The files of one split."""

    files: tuple[str, ...]
    config: str
    """`default` where the repository has no names for configs."""
    split: str
    left_out: tuple[str, ...] = ()
    """Data files of the split in another format."""
    other_splits: tuple[str, ...] = ()
    """The names of the other splits."""


def choose(files: Sequence[str], readme: str, *, config: str | None, split: str | None, where: str) -> Chosen:
    """The data files of a config and a split. `files` are the paths of all files, relative, with slashes; `where` names
    the repository in messages. Raises `ConfigError`, which lists the configs or splits there are."""
    configs, default = _configs([file for file in files if may_hold_rows(file)], readme, where)
    if not configs:
        raise ConfigError(
            f"task.path={where} has no data files, so there are no rows: vlmrl reads files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    name = choose_name("task.name", "config", config, list(configs), default, where)
    splits = configs[name]
    chosen = choose_name("task.split", "split", split, list(splits), "train", where)
    if not splits[chosen]:
        raise ConfigError(
            f"task.split={chosen}: the README.md of {where} names files of this split that do not exist, so there are "
            "no rows: choose another split"
        )
    formats = Counter(suffix_of(file) for file in splits[chosen])
    most = max(formats.values())
    first = next(suffix for suffix in (".parquet", ".arrow", *SUFFIXES) if formats[suffix] == most)
    read = tuple(file for file in splits[chosen] if suffix_of(file) == first)
    left_out = tuple(file for file in splits[chosen] if suffix_of(file) != first)
    return Chosen(read, name, chosen, left_out, tuple(split for split in splits if split != chosen))


def split_of(file: str) -> str | None:
    """The split that the name of a file or of one of its folders tells; None if none does.

    >>> [split_of(file) for file in ("data/train-00000-of-00002.parquet", "val/rows.csv", "my_dev.jsonl", "rows.json")]
    ['train', 'validation', 'validation', None]
    >>> split_of("data/testmini-00000-of-00001.parquet"), split_of("contest.json")
    ('testmini', None)
    """
    for part in reversed(file.lower().split("/")):
        for split, words in _WORDS.items():
            if re.search(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?:[^a-z]|$)", part):
                return split
    shard = _SHARD.match(file.rpartition("/")[2])
    return shard.group(1) if shard and "/" in file and file.split("/")[-2] == "data" else None


def by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Split → files, by their names."""
    splits: dict[str, list[str]] = {}
    for file in sorted(files):
        splits.setdefault(split_of(file) or "train", []).append(file)
    return splits


def may_hold_rows(file: str) -> bool:
    """Whether a file of a repository is a data file, and not one that describes the repository."""
    parts = file.split("/")
    hidden = any(part.startswith((".", "__")) for part in parts)
    return is_data_file(file) and not hidden and parts[-1] not in _NOTES


def choose_name(key: str, noun: str, wanted: str | None, names: list[str], usual: str, where: str) -> str:
    """One of `names`: the wanted one, else the only one or the usual one. Raises `ConfigError`."""
    if wanted is not None:
        if wanted in names:
            return wanted
        raise ConfigError(
            f"{key}={wanted}: {where} has no {noun} of this name, so there are no rows: choose one of "
            f"{', '.join(names)}"
        )
    if len(names) == 1:
        return names[0]
    if usual in names:
        return usual
    raise ConfigError(
        f"task.path={where} has {len(names)} {noun}s and {key} is not set, so it is unclear which to read: set it to "
        f"one of {', '.join(names)}"
    )


# ── README.md ───────────────────────────────────────────────────────────────────────────────────────────────


def _configs(files: Sequence[str], readme: str, where: str) -> tuple[dict[str, Splits], str]:
    """Config → its splits, and the name of the default config."""
    noted = _header(readme, where).get("configs")
    if not isinstance(noted, list) or not noted:
        return {"default": by_split(files)} if files else {}, "default"
    configs: dict[str, Splits] = {}
    default = "default"
    for config in noted:
        if not isinstance(config, dict) or not isinstance(config.get("config_name"), str):
            raise ConfigError(f"task.path={where}: `configs` in its README.md names no config, so it cannot be read")
        folder = str(config.get("data_dir") or "").strip("/")
        below = [file for file in files if not folder or file.startswith(f"{folder}/")]
        configs[config["config_name"]] = _splits(below, folder, config.get("data_files"))
        if config.get("default") is True:
            default = config["config_name"]
    return configs, default


def _splits(files: Sequence[str], folder: str, patterns: Any) -> Splits:
    """The splits that `data_files` of a config names: patterns, or patterns by split."""
    if patterns is None:
        return by_split(files)
    if isinstance(patterns, list) and all(isinstance(entry, dict) for entry in patterns):
        pairs = [(str(entry.get("split", "train")), entry.get("path")) for entry in patterns]
    elif isinstance(patterns, dict):
        pairs = [(str(split), paths) for split, paths in patterns.items()]
    else:
        return by_split(list(_matching(files, folder, patterns)))
    return {split: list(_matching(files, folder, paths)) for split, paths in pairs}


def _matching(files: Sequence[str], folder: str, patterns: Any) -> Iterator[str]:
    """The files that one pattern or a list of them names, without repetition."""
    expressions = []
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        text = str(pattern).removeprefix("./").strip("/")
        expressions.append(_expression(f"{folder}/{text}" if folder else text))
    return (file for file in sorted(files) if any(expression.fullmatch(file) for expression in expressions))


def _expression(pattern: str) -> re.Pattern[str]:
    """A glob of the hub as a regular expression; the name of a folder stands for all that is in it.

    >>> [bool(_expression("data/**/t*.json").fullmatch(file)) for file in ("data/t1.json", "data/a/b/t.json", "t.json")]
    [True, True, False]
    """
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    made = "".join(parts.get(token, token if token.startswith("[") else re.escape(token)) for token in tokens)
    return re.compile(rf"{made}(?:/.*)?")


def _header(readme: str, where: str) -> dict[str, Any]:
    """The YAML between the two lines of dashes at the front of a README.md; empty where there is none."""
    import yaml

    match = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", readme, re.DOTALL)
    if match is None:
        return {}
    try:
        header = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise ConfigError(
            f"task.path={where}: the header of its README.md is no YAML ({line}), so its splits are unknown: name the "
            "files themselves"
        ) from None
    return header if isinstance(header, dict) else {}
