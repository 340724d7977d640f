"""Which rank of how many this process is, from the variables of the launcher that started it. Imports no torch.

    python -m vlmrl …                               one process, rank 0 of 1
    torchrun --nproc-per-node=2 -m vlmrl …          RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun --ntasks=2 python -m vlmrl …               SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, …; the last
                                                    tasks may run servers instead (vlmrl/ranks/slurm.py)

Only the variables of a Slurm step count: a batch script that runs `python -m vlmrl` without srun is one process, even
where SLURM_NTASKS is larger.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vlmrl.errors import ConfigError
from vlmrl.ranks.slurm import first_host, serving_tasks, tasks_of_step

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

FIRST_PORT, PORT_COUNT = 20_000, 20_000
"""The ports on which the ranks of a Slurm step meet. Job and step number choose one of them; all are below the ports
that Linux assigns by itself."""


@dataclass(frozen=True)
class Place:
    """The place of one process among all training processes of its run."""

    rank: int = 0
    """Rank 0 runs the orchestrator and trains; the other ranks only train."""
    size: int = 1
    local_rank: int = 0
    """Number among the ranks of the same host. Where every rank sees all GPUs, also the number of its GPU."""
    address: str = ""
    """Address of rank 0's host; empty in a run of one process."""
    port: int = 0
    """Port on that host where the ranks meet; 0 in a run of one process."""


_joined: Place | None = None


def remember_place(place: Place | None) -> None:
    """Set what `find_place` returns from now on: the place of this process in the rank group that it has joined, since
    joining removes the launcher's variables. None: the process has left the group."""
    global _joined
    _joined = place


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process. Raises `ConfigError` where some of the launcher's variables are missing.

    >>> find_place({})
    Place(rank=0, size=1, local_rank=0, address='', port=0)
    >>> find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"})
    Place(rank=3, size=4, local_rank=1, address='a', port=29500)
    """
    if _joined is not None and environment is os.environ:
        return _joined
    if "RANK" in environment and "WORLD_SIZE" in environment:
        missing = [name for name in TORCHRUN if name not in environment]
        if missing and environment["WORLD_SIZE"] != "1":
            raise ConfigError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} is set without {', '.join(missing)}, so the ranks cannot "
                "meet: start the run with torchrun or srun, or unset RANK and WORLD_SIZE."
            )
        rank, size, local_rank = (int(environment.get(name, 0)) for name in TORCHRUN[:3])
        return Place(rank, size, local_rank, environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT", 0)))
    size = tasks_of_step(environment) - serving_tasks()
    if size == 1:
        return Place()
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    one_host = environment.get("SLURM_STEP_NUM_NODES") == "1"
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        size=size,
        local_rank=int(environment["SLURM_LOCALID"]),
        address="127.0.0.1" if one_host else first_host(environment["SLURM_STEP_NODELIST"]),
        port=FIRST_PORT + (31 * job + step) % PORT_COUNT,
    )
