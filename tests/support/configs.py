"""Configs of runs for tests."""

from __future__ import annotations

from omegaconf import DictConfig

from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.preflight.auto_model import fill_model
from vlmrl.preflight.check import Stage, check


def checked(config: DictConfig) -> RunConfig:
    """Type a composed config, fill it from its checkpoint and check it, as the command line does. Raises
    ConfigError."""
    run_config, _ = fill_model(parse(config))
    check(run_config, Stage.composed)
    return run_config
