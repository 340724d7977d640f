"""Several ranks can do what the config asks: known where a job is submitted, where a run composes, where ranks meet."""

from __future__ import annotations

from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.trainer import Sharding
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site


def ranks_work_together(config: RunConfig, site: Site) -> None:
    """The mode, the engine, the device and the batch allow as many ranks as the site has."""
    count = site.ranks
    if count == 1:
        return
    ranks = f"{count} ranks"
    if config.mode in (Mode.doctor, Mode.replay, Mode.export):
        raise ConfigError(
            f"mode={config.mode.name} requires one process, else {ranks} do what one does: start it without torchrun "
            "or srun"
        )
    if config.inference.kind == "embedded" and config.trainer.sharding is not Sharding.none:
        raise ConfigError(
            f"inference=embedded requires trainer.sharding=none with {ranks}, else rank 0, which samples from the "
            "trainer's own weights, has a slice of them only: set trainer.sharding=none, or inference=vllm"
        )
    if config.model.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"model.device={config.model.device} requires one process, else {ranks} share that GPU: set "
            "model.device=auto, where each rank has its own, and choose them by CUDA_VISIBLE_DEVICES"
        )
    rollouts = config.orchestrator.groups_per_step * config.orchestrator.group_size
    if config.mode is Mode.rl and rollouts < count:
        raise ConfigError(
            f"{ranks} require at least as many rollouts per step, else some learn from nothing, and "
            f"orchestrator.groups_per_step={config.orchestrator.groups_per_step} × orchestrator.group_size="
            f"{config.orchestrator.group_size} are {rollouts}: raise one of them, or start fewer ranks"
        )
