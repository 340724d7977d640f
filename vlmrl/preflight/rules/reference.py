"""The reference is there for what asks for it, and what it says reaches the loss."""

from __future__ import annotations

from pathlib import Path

from vlmrl.config.algorithm import Advantage, FilterMode
from vlmrl.config.reference import CopyConfig, FolderReferenceConfig
from vlmrl.config.run import BY_REWARD, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site


def reference_is_there(config: RunConfig) -> None:
    """What costs distance to a reference has one."""
    algorithm = config.algorithm
    asked = {
        "kl.loss": algorithm.kl.loss,
        "kl.reward": algorithm.kl.reward,
        "kl.advantage": algorithm.kl.advantage,
        "distill.weight": algorithm.distill.weight,
        "distill.top_k": algorithm.distill.top_k,
    }
    key = next((key for key, value in asked.items() if value), None)
    if config.mode in BY_REWARD and key is not None and not isinstance(config.reference, CopyConfig):
        raise ConfigError(
            f"algorithm.{key}={asked[key]} needs a second model, and reference=none is none: set "
            f"reference=initial (the policy as it was), or algorithm.{key}=0"
        )


def distributions_are_reported(config: RunConfig) -> None:
    """What compares whole distributions has them."""
    distill = config.algorithm.distill
    if config.mode in BY_REWARD and distill.weight and not distill.top_k:
        raise ConfigError(
            f"algorithm.distill.weight={distill.weight} compares the policy with the most likely tokens of the "
            "reference, and algorithm.distill.top_k=0 reports none: set algorithm.distill.top_k=32, or "
            "algorithm.distill.weight=0"
        )


def something_is_learned(config: RunConfig) -> None:
    """Where rewards teach nothing, the reference does, and its tokens are not left out as those of equal rewards."""
    algorithm = config.algorithm
    if config.mode not in BY_REWARD:
        return
    kl, distill = algorithm.kl, algorithm.distill
    if algorithm.advantage == Advantage.none and not kl.advantage and not distill.weight:
        raise ConfigError(
            "algorithm.advantage=none with algorithm.kl.advantage=0 gives no token an advantage, and "
            "algorithm.distill.weight=0 nothing else, so nothing would be learned: set algorithm.kl.advantage=1, or "
            f"algorithm.advantage={Advantage.group_normalized.value}"
        )
    if not kl.advantage and not distill.weight:
        return
    teacher = f"kl.advantage={kl.advantage}" if kl.advantage else f"distill.weight={distill.weight}"
    for key, drops in (
        ("algorithm.filters.zero_advantage=drop", algorithm.filters.zero_advantage is FilterMode.drop),
        (f"algorithm.refill.budget={algorithm.refill.budget}", algorithm.refill.is_on),
    ):
        if drops:
            raise ConfigError(
                f"{key} drops groups whose rewards are equal, but with algorithm.{teacher} their tokens have a "
                "gradient too: set algorithm.filters.zero_advantage=none and "
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
