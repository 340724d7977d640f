"""The reference is there for what asks for it, and what it says reaches the loss."""

from __future__ import annotations

from pathlib import Path

from vlmrl.config.algorithm import Advantage, FilterMode
from vlmrl.config.reference import CopyConfig, FolderReferenceConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site


def reference_is_there(config: RunConfig) -> None:
    """What costs distance to a reference has one."""
    kl = config.algorithm.kl
    if config.mode is Mode.rl and kl.is_on and not isinstance(config.reference, CopyConfig):
        name = next(name for name in ("loss", "reward", "advantage") if getattr(kl, name))
        raise ConfigError(
            f"algorithm.kl.{name}={getattr(kl, name)} needs a second model, and reference=none is none: set "
            f"reference=initial (the policy as it was), or algorithm.kl.{name}=0"
        )


def something_is_learned(config: RunConfig) -> None:
    """Where rewards teach nothing, the reference does, and its tokens are not left out as those of equal rewards."""
    algorithm = config.algorithm
    if config.mode is not Mode.rl:
        return
    if algorithm.advantage == Advantage.none and not algorithm.kl.advantage:
        raise ConfigError(
            "algorithm.advantage=none with algorithm.kl.advantage=0 gives no token an advantage, so nothing would be "
            f"learned: set algorithm.kl.advantage=1, or algorithm.advantage={Advantage.group_normalized.value}"
        )
    if not algorithm.kl.advantage:
        return
    for key, drops in (
        ("algorithm.filters.zero_advantage=drop", algorithm.filters.zero_advantage is FilterMode.drop),
        (f"algorithm.refill.budget={algorithm.refill.budget}", algorithm.refill.is_on),
    ):
        if drops:
            raise ConfigError(
                f"{key} drops groups whose rewards are equal, but with algorithm.kl.advantage={algorithm.kl.advantage} "
                "their tokens have a gradient too: set algorithm.filters.zero_advantage=none and "
                "algorithm.refill.budget=1"
            )


def reference_folder_is_there(config: RunConfig, site: Site) -> None:
    """The folder of the reference is a checkpoint."""
    chosen = config.reference
    if isinstance(chosen, FolderReferenceConfig) and not (Path(chosen.folder) / "config.json").is_file():
        raise ConfigError(
            f"reference.folder={chosen.folder} holds no config.json, so no reference can be loaded from it: set "
            "reference.folder to a folder that mode=export or transformers has written"
        )
