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

from vlmrl.ranks.environment import PORTS, number, text
from vlmrl.ranks.slurm import check_step, first_host, serving_tasks, step_number, tasks_of_step

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
    """The place of this process. Raises `ConfigError` where the launcher's variables are no numbers, contradict
    each other, or are there in part.

    >>> find_place({})
    Place(rank=0, size=1, local_rank=0, address='', port=0)
    >>> find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"})
    Place(rank=3, size=4, local_rank=1, address='a', port=29500)
    """
    if _joined is not None and environment is os.environ:
        return _joined
    check_step(environment)
    if "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1":
        size = number(environment, "WORLD_SIZE", least=1)
        alone = 0 if size == 1 else None  # one process needs no more than RANK and WORLD_SIZE
        return Place(
            rank=number(environment, "RANK", below=size),
            size=size,
            local_rank=number(environment, "LOCAL_RANK", default=alone),
            address=text(environment, "MASTER_ADDR") if alone is None else environment.get("MASTER_ADDR", ""),
            port=number(environment, "MASTER_PORT", below=PORTS, default=alone),
        )
    tasks = tasks_of_step(environment)
    size = tasks - serving_tasks()
    if size == 1:
        return Place()
    one_host = number(environment, "SLURM_STEP_NUM_NODES", least=1) == 1
    return Place(
        rank=number(environment, "SLURM_PROCID", below=tasks),
        size=size,
        local_rank=number(environment, "SLURM_LOCALID", below=tasks),
        address="127.0.0.1" if one_host else first_host(text(environment, "SLURM_STEP_NODELIST")),
        port=FIRST_PORT + step_number(environment) % PORT_COUNT,
    )
