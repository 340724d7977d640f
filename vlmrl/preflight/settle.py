"""What a configuration leaves open until the checkpoint is known, decided before config.yaml is written.

So config.yaml says what really ran. `model=auto` will fill its open fields here too.
"""

from __future__ import annotations

import dataclasses

from vlmrl.config.inference import Batching, EmbeddedConfig
from vlmrl.config.run import RunConfig


def settle(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` as it will run on this machine, and one line for the user about each value that was changed.

    Reads the checkpoint's config.json; call it after `check(config, Stage.here)`.
    """
    from vlmrl.monitor.wandb_logger import settle_wandb

    monitor = dataclasses.replace(config.monitor, wandb=settle_wandb(config.monitor.wandb))
    config, notes = _settle_compile(dataclasses.replace(config, monitor=monitor))
    return config, [*notes, *_of_batching(config)]


COMPILES_NOTHING = "trainer.compile=null compiles no layer here, because the model is on a CPU, where it takes minutes"
"""The note of a run, and of a plan, whose layers would be compiled on a GPU."""


NOTHING_ENTERS = "inference.batching=rolling has no effect here, because the model is on a CPU, where no request enters"
"""The note of a run whose requests would enter running batches on a GPU."""


def _of_batching(config: RunConfig) -> list[str]:
    if not isinstance(config.inference, EmbeddedConfig) or config.inference.batching is Batching.together:
        return []
    from vlmrl.models.checkpoints.load import resolve_device

    return [] if resolve_device(config.model).type != "cpu" else [NOTHING_ENTERS]


def _settle_compile(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`trainer.compile=null` is true where the model is on a GPU."""
    if config.trainer.compile is not None:
        return config, []
    from vlmrl.models.checkpoints.load import resolve_device

    on_gpu = resolve_device(config.model).type != "cpu"
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, compile=on_gpu))
    return config, [] if on_gpu else [COMPILES_NOTHING]
