"""`support.composing` composes what Hydra composes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from support.composing import compose_as_hydra
from support.refused_configs import MIXTURE
from vlmrl.cli.recipe import RECIPE
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF


def hydras_own(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (RECIPE, "trainer.max_steps=2", "seed=3"),
        ("trainer.max_steps=2", RECIPE),  # a value stays above the experiment in either order
        ("model=qwen3vl", "~model/vlm", "~algorithm.discount", "model.name='a b'"),
        ("task=my_module:MyTask", "+task.args.depth=3", "++task.args.depth=4", "reward=[exact,format]"),
        (*MIXTURE, "++task.weights.a=0.5"),
        ("task={name: x}",),
        ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "trainer.max_steps=2"),
        ("trainer.max_steps=1,2",),
        ("trainer.max_stepz=2",),
        ("trainer=nothing", "seed=1"),
        ("trainer.max_steps=many",),
        ("trainer.max_steps=[", "seed=1"),
        ("~trainer.nothing",),
    ],
)
def test_it_is_hydras_own(overrides: tuple[str, ...]) -> None:
    for _ in range(2):  # the second time, the choice of groups is known
        assert outcome(compose_as_hydra, overrides) == outcome(hydras_own, overrides)


def outcome(compose_config: Callable[..., DictConfig], overrides: tuple[str, ...]) -> object:
    """The config with its flags and the type of each of its nodes; of an error the type."""
    try:
        config = compose_config(*overrides)
    except HydraException as error:
        return type(error)
    return OmegaConf.to_yaml(config), OmegaConf.is_struct(config), types(config)


def types(config: DictConfig) -> dict[str, object]:
    """Key → the schema of each group below it."""
    found: dict[str, object] = {}
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found[str(key)] = OmegaConf.get_type(node), types(node)
    return found
