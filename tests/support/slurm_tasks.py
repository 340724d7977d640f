"""The environment that Slurm gives the tasks of a job step."""

from __future__ import annotations


def step(task: int, tasks: int = 3, **more: str) -> dict[str, str]:
    """The environment of task number `task` of a step."""
    number = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "here"}
    return number | {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} | more
