"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from vlmrl.cli import CONF
from vlmrl.config import RunConfig, parse, register_schemas


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """`composed("model=qwen3vl", "seed=1")`: what Hydra makes of these overrides, `output_dir` filled in."""

    def compose_config(*overrides: str) -> DictConfig:
        register_schemas()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", list(overrides))
        config.output_dir = "outputs/test"
        return config

    return compose_config


@pytest.fixture
def run_config(composed: Callable[..., DictConfig]) -> Callable[..., RunConfig]:
    """`run_config("trainer.max_steps=2")`: the checked config of a run."""
    return lambda *overrides: parse(composed(*overrides))
