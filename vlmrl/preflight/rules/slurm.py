"""The tasks of a Slurm job are enough for the servers and the trainer, and all of them reach the weights."""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site, tasks_that_serve


def servers_have_tasks(config: RunConfig, site: Site) -> None:
    """A launcher without tasks of its own cannot start servers for each job of a sweep."""
    serving = tasks_that_serve(config)
    if serving and site.submission is not None and site.submission.tasks_per_node is None:
        raise ConfigError(
            f"inference.slurm_tasks={serving} needs Slurm tasks of its own for each job of a sweep, because the "
            "servers of the first job would keep running through all others: set hydra/launcher=slurm"
        )


def some_task_trains(config: RunConfig, site: Site) -> None:
    """At least one task of the job is left for the trainer."""
    serving, submission = tasks_that_serve(config), site.submission
    if not serving or submission is None or submission.tasks_per_node is None or site.ranks >= 1:
        return
    raise ConfigError(
        f"inference.slurm_tasks={serving} takes every task of hydra.launcher.nodes={submission.nodes} × "
        f"hydra.launcher.tasks_per_node={submission.tasks_per_node}, so no task would train: set "
        f"hydra.launcher.tasks_per_node={-(-(serving + 1) // submission.nodes)}"
    )


def weights_cross_nodes(config: RunConfig, site: Site) -> None:
    """Servers on every node see the folder that weights go through."""
    sync = config.weight_sync
    if site.nodes == 1 or not isinstance(config.inference, VllmConfig) or config.inference.slurm_tasks == 0:
        return
    if isinstance(sync, FolderSyncConfig) and sync.root.startswith(("/dev/shm", "/tmp")):
        raise ConfigError(
            f"weight_sync.root={sync.root} exists on one node only, so servers on the others of {site.nodes} nodes "
            "would never see the weights: set weight_sync.root to a folder that every node sees, or weight_sync=nccl"
        )
