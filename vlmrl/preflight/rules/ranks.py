"""Several ranks can do what the configuration says."""

from __future__ import annotations

from vlmrl.config.run import BY_REWARD, Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site


def ranks_work_together(config: RunConfig, site: Site) -> None:
    """The mode, the engine, the device and the batch allow as many ranks as the site has."""
    if site.ranks <= 1:
        return
    ranks = f"{site.ranks} ranks"
    if config.mode in (Mode.doctor, Mode.replay, Mode.export):
        raise ConfigError(
            f"mode={config.mode.name} runs in one process, so {ranks} would all do the same work: start it without "
            "torchrun or srun"
        )
    if config.model.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"model.device={config.model.device} names one GPU, so {ranks} would share it: set model.device=auto, "
            "which gives each rank its own, and choose the GPUs by CUDA_VISIBLE_DEVICES"
        )
    rollouts = config.orchestrator.groups_per_step * config.orchestrator.group_size
    if config.mode in BY_REWARD and rollouts < site.ranks:
        raise ConfigError(
            f"orchestrator.groups_per_step={config.orchestrator.groups_per_step} × orchestrator.group_size="
            f"{config.orchestrator.group_size} are {rollouts} rollouts per step for {ranks}, so some ranks would have "
            "nothing to learn from: raise one of them, or start fewer ranks"
        )
