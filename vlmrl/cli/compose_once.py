"""Composes the config of a run once.

Hydra composes it twice: first to read `hydra.mode` in it, and again to run it. The second time takes 0.3 of the 1.9 s
of processor time of a start without a model.
"""

from __future__ import annotations

import hydra._internal.hydra as main_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

MODE = "hydra.mode=RUN"
"""What Hydra adds to the overrides of a run where nothing has set `hydra.mode`."""


def compose_once() -> None:
    """Let `hydra.main` compose a run once."""
    main_module.ConfigLoaderImpl = ComposesOnce  # type: ignore[attr-defined]  # Hydra imports it there to make one


class ComposesOnce(ConfigLoaderImpl):
    """Keeps what was composed for `hydra.mode` until the run asks for the same."""

    _kept: tuple[str | None, list[str], DictConfig] | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra's; raises the same errors."""
        compose = super().load_configuration
        if not validate_sweep_overrides:  # Hydra.get_mode, which only reads `hydra.mode`
            try:
                config = compose(config_name, overrides, RunMode.RUN, from_shell)
            except HydraException:  # a sweep, or a mistake: the run says so
                return compose(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
            self._kept = config_name, list(overrides), config
            return config
        kept, self._kept = self._kept, None
        if kept is None or run_mode is not RunMode.RUN:
            return compose(config_name, overrides, run_mode, from_shell)
        name, given, config = kept
        if name != config_name or overrides not in (given, [*given, MODE]):
            return compose(config_name, overrides, run_mode, from_shell)
        if overrides != given:
            config.hydra.mode = RunMode.RUN
            config.hydra.overrides.hydra.append(MODE)
        return config
