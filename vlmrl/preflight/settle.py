"""What a configuration leaves open until the checkpoint is known, decided before config.yaml is written.

So config.yaml says what really ran. `model=auto` will fill its open fields here too.
"""

from __future__ import annotations

import dataclasses

from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing


def settle(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` as it will run on this machine, and one line for the user about each value that was changed.

    Reads the checkpoint's config.json; call it after `check(config, Stage.here)`.
    """
    from vlmrl.monitor.wandb_logger import settle_wandb

    monitor = dataclasses.replace(config.monitor, wandb=settle_wandb(config.monitor.wandb))
    return _settle_packing(dataclasses.replace(config, monitor=monitor))


def _settle_packing(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Samples of a model whose layers carry a state can neither share a prefix nor stand side by side."""
    if config.trainer.packing is Packing.none:
        return config, []
    from vlmrl.models.checkpoints.layers import stateful_layers

    layers = stateful_layers(config.model)
    if not layers:
        return config, []
    note = (
        f"trainer.packing={config.trainer.packing.value} is changed to none: {config.model.name} has layers of "
        f"{', '.join(layers)}, which carry a state from token to token, so its samples are trained one by one"
    )
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, packing=Packing.none)), [note]
