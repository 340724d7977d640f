"""Configs as `hydra.compose` makes them, composed once for each choice of groups.

Composing takes a third of a second of processor time, and thousands of tests do it. Nearly all of that goes into the
groups; the values of single keys are put into a copy, by the function of Hydra that does it in `compose` too.
"""

from __future__ import annotations

import copy
from functools import lru_cache

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF


def compose_as_hydra(*overrides: str) -> DictConfig:
    """`compose("config", overrides)`; raises the same errors."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(override.is_sweep_override() or override.key_or_group.startswith("hydra") for override in parsed):
        return compose_groups(overrides)
    config = copy.deepcopy(compose_groups(tuple(str(each.input_line) for each in parsed if chooses(each))))
    try:
        ConfigLoaderImpl._apply_overrides_to_config([each for each in parsed if not chooses(each)], config)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException(str(error)) from error
    return config


def chooses(override: Override) -> bool:
    """Whether the override chooses or removes an option of a group; every other one sets or removes a key."""
    is_group = override.package is not None or (CONF / override.key_or_group).is_dir()
    return is_group and not isinstance(override.value(), dict)


@lru_cache(maxsize=256)
def compose_groups(overrides: tuple[str, ...]) -> DictConfig:
    """`compose("config", overrides)`; not to be changed."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))
