"""The run that starts where the command line names no task, no model and no experiment.

Defaults of conf/ fit any task, so none of them makes a good run of color_codeword by itself. The recipe does:
`conf/experiment/color_codeword_tiny.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vlmrl.config.conf_folder import CONF

RECIPE = "experiment=color_codeword_tiny"
"""The override that the command line adds."""

CHOICES = ("task", "model", "experiment")
"""Groups that say what the run is; a command line that names one of them gets no recipe."""

OTHER_FLAGS = ("--config-name", "-cn", "--shell-completion", "-sc")
"""Flags with which Hydra composes another root, or nothing."""


def with_recipe(arguments: list[str]) -> list[str]:
    """Add the recipe unless the arguments, or the sweep they name, choose a task, a model or an experiment.

    >>> with_recipe(["seed=1"])
    ['seed=1', 'experiment=color_codeword_tiny']
    >>> with_recipe(["task=color_codeword"]), with_recipe(["~experiment"]), with_recipe(["experiment=[]"])
    (['task=color_codeword'], ['~experiment'], ['experiment=[]'])
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if flags & set(OTHER_FLAGS) or set(CHOICES) & {*_groups_in(arguments), *_groups_of_sweeps(arguments)}:
        return arguments
    return [*arguments, RECIPE]


def _groups_in(overrides: list[str]) -> Iterator[str]:
    """The keys that overrides set or remove, without `+`, `++`, `~` and `@package`."""
    for override in overrides:
        if "=" in override or override.startswith("~"):
            yield re.split("[=@]", override.lstrip("+~"))[0]


def _groups_of_sweeps(arguments: list[str]) -> Iterator[str]:
    """The groups that the sweeps on the command line (`+sweep=<name>`) choose or sweep over."""
    names = [name for argument in arguments for name in re.findall(r"^\+{0,2}sweep=(\w+)$", argument)]
    for name in names:
        for folder in (CONF, *_config_dirs(arguments)):
            path = folder / "sweep" / f"{name}.yaml"
            tree = OmegaConf.load(path) if path.is_file() else None
            if isinstance(tree, DictConfig):
                for entry in tree.get("defaults") or []:
                    if isinstance(entry, DictConfig):
                        yield from (str(key).removeprefix("override ").strip("/").partition("@")[0] for key in entry)
                yield from map(str, OmegaConf.select(tree, "hydra.sweeper.params") or {})


def _config_dirs(arguments: list[str]) -> Iterator[Path]:
    """The folders of `--config-dir`."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            yield Path(value or following)
