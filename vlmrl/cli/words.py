"""The words of a command about earlier runs: `mode=`, `resume=`, `run=`, `runs=`, `step=` and `rollout=`.

They are read from the command line before Hydra composes anything, because such a command uses the run's own
config.yaml. So every way to spell one of them is brought to `key=value` here:

    ++resume=outputs/a   +resume=outputs/a   'resume="outputs/a"'     resume=outputs/a
    mode=Mode.replay     'mode="replay"'                              mode=replay
    resume=null                                                       (nothing)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vlmrl.errors import ConfigError

WORDS = ("mode", "resume", "run", "runs", "step", "rollout")
"""Keys that are read before Hydra composes."""

WORD = re.compile(rf"\+{{0,2}}({'|'.join(WORDS)})\s*=(.*)", re.DOTALL)

QUOTED = re.compile(r"""\s*(["']).*\1\s*""", re.DOTALL)
"""A value in quotes."""


def plain_words(arguments: Sequence[str]) -> list[str]:
    """Bring each word to `key=value`, without `+`, quotes and spaces. Other arguments stay as they are.

    Raises ConfigError for a word without a value.

    >>> plain_words(["++resume=outputs/a", "mode=Mode.eval", 'run="a b"', "seed=1", "resume=null"])
    ['resume=outputs/a', 'mode=eval', 'run=a b', 'seed=1']
    """
    return [text for argument in arguments if (text := _plain(argument)) is not None]


def _plain(argument: str) -> str | None:
    found = WORD.fullmatch(argument)
    if found is None:
        return argument
    key, value = found[1], found[2]
    if key == "runs":
        return f"{key}={value}"
    if QUOTED.fullmatch(value) and isinstance(text := parsed(f"{key}={value}"), str):
        value = text
    value = value.strip()
    if value in ("", "null"):
        if value == "null" and key != "mode":
            return None
        raise ConfigError(f"{argument} sets {key} to nothing, so it cannot be read: write {key}=<value> or remove it")
    return f"{key}={value.removeprefix('Mode.') if key == 'mode' else value}"


def parsed(override: str) -> Any:
    """The value of an override by Hydra's grammar; `...` where it does not parse or lists values to sweep over.

    >>> parsed("seed=[1,a b,'c,d']"), parsed("seed=[1"), parsed("seed=1,2")
    ([1, 'a b', 'c,d'], Ellipsis, Ellipsis)
    """
    try:
        found = OverridesParser.create().parse_override(override)
        return ... if found.is_sweep_override() else found.value()
    except (HydraException, ValueError, RecursionError):
        return ...


def parses(override: str) -> bool:
    """Whether Hydra's grammar has this override.

    >>> parses("seed=1,2"), parses("seed=a=b")
    (True, False)
    """
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return False
    return True


def folders_in(value: str) -> list[str]:
    """The folders that `runs=` names, with or without brackets. A name in quotes may hold commas and brackets, and the
    name of a folder that exists stands for it, whatever is in the name. Raises ConfigError.

    >>> folders_in("outputs/a"), folders_in("outputs/a,outputs/b"), folders_in("['a, b',outputs/2026=1]")
    (['outputs/a'], ['outputs/a', 'outputs/b'], ['a, b', 'outputs/2026=1'])
    """
    text = value.strip()
    if _is_folder(text):
        return [text]
    found = parsed(f"runs={text if text.startswith('[') else f'[{text}]'}")
    if isinstance(found, list) and any(isinstance(each, list | dict) or each is None for each in found):
        raise ConfigError(
            f"runs={value} holds something else than names of folders, so it is not known what to compare: write "
            "runs=outputs/multirun/<name> or 'runs=[outputs/a,outputs/b]'"
        )
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):  # also a folder called 007
        parts = re.findall(r"""\s*(?:"[^"]*"|'[^']*'|[^,]+)""", text.removeprefix("[").removesuffix("]"))
        found = [_unquoted(each.strip()) for each in parts if each.strip()]
    return [os.path.expanduser(each) for each in found]


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # no name of a folder at all
        return False


def _unquoted(text: str) -> str:
    return text[1:-1] if QUOTED.fullmatch(text) and len(text) > 1 else text
