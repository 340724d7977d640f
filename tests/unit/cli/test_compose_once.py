"""A run gets the config that Hydra would give it, composed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra._internal.hydra as main_module
import pytest
from hydra import version
from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import vlmrl.cli.hydra_job  # noqa: F401  # its resolvers are in the config
from vlmrl.cli.compose_once import ComposesOnce
from vlmrl.cli.own_folder import started
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`jobs(loader, multirun, "seed=1")`: the config of each job and Hydra's own, and how often `loader` composed."""
    monkeypatch.chdir(tmp_path)
    OmegaConf.register_new_resolver("started", lambda *names: "then", replace=True)
    version.setbase("1.3")
    register_schemas()
    composed = 0
    compose = ConfigLoaderImpl._load_configuration_impl

    def counted(*args: Any, **kwargs: Any) -> DictConfig:
        nonlocal composed
        composed += 1
        return compose(*args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)

    def run(loader: type[ConfigLoaderImpl], multirun: bool, *overrides: str) -> tuple[list[Any], int]:
        nonlocal composed
        composed = 0
        found: list[Any] = []

        def job(config: DictConfig) -> None:
            of_hydra: Any = OmegaConf.to_container(OmegaConf.structured(HydraConfig.get()))
            found.append((OmegaConf.to_container(config), of_hydra))

        monkeypatch.setattr(main_module, "ConfigLoaderImpl", loader)
        search_path = utils.create_automatic_config_search_path(None, "vlmrl.cli.main", str(CONF))
        started = main_module.Hydra.create_main_hydra2("main", search_path)
        given = [*overrides, "~hydra.callbacks.check_first", f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
        try:
            mode = started.get_mode("config", given)
            utils._run_app(not multirun, multirun, mode, started, "config", job, given)
        finally:
            GlobalHydra.instance().clear()
        return found, composed

    yield run
    OmegaConf.register_new_resolver("started", started, use_cache=True, replace=True)


@pytest.mark.parametrize(
    ("multirun", "overrides", "count"),
    [
        (False, (), 1),
        (False, ("experiment=digits_tiny", "seed=3"), 1),
        (False, ("hydra.mode=RUN", "trainer.max_steps=2"), 1),
        (False, ("hydra.mode=MULTIRUN", "seed=1,2"), 2),
        (True, ("seed=1,2",), 2),
        (True, (), 1),
    ],
)
def test_a_job_gets_what_hydra_gives_it(multirun: bool, overrides: tuple[str, ...], count: int, jobs: Any) -> None:
    wanted, times = jobs(ConfigLoaderImpl, multirun, *overrides)
    found, fewer = jobs(ComposesOnce, multirun, *overrides)
    assert found == wanted
    assert len(found) == count
    if not multirun and count == 1:
        assert (times, fewer) == (2, 1)
