"""The optional packages that the configuration needs are installed."""

from __future__ import annotations

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.installed import missing
from vlmrl.preflight.site import Site

SERVER_PACKAGES = ("vllm", "torchvision")
"""Packages that a Slurm task needs which runs a server and does not train."""


def packages_are_installed(config: RunConfig, site: Site) -> None:
    """Refuse the first package that is missing, with the line that installs it."""
    for need in missing(config):
        if not site.serves or need.package in SERVER_PACKAGES:
            raise ConfigError(need.message())
