"""A run inside a Slurm job: where its folder is, what signals ask of it, how it goes back into the queue. No torch.

    sbatch ─▶ srun python -m vlmrl … ─▶ outputs/slurm/<job>.<step>_…
              SIGUSR1, SIGUSR2 (#SBATCH --signal=USR2@120: the time limit is near) ─▶ save ─▶ scontrol requeue ─┐
              SIGTERM (scancel, scontrol requeue, preemption)                      ─▶ save ─▶ end               │
    the job again, SLURM_RESTART_COUNT=1 ─▶ the same folder ─▶ what is left of the run (sweep/again.py) ◀───────┘

Under hydra/launcher=slurm submitit holds these signals first, and has the last word about the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from datetime import datetime

from vlmrl.errors import VlmrlError

QUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Ask to save and to go on later. Slurm sends what `--signal` says; submitit asks for SIGUSR2."""

SCONTROL_S = 60.0
"""Seconds for a busy controller to answer."""


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task that srun started."""
    return "SLURM_STEP_ID" in environment


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether its job was in the queue before."""
    return in_step(environment) and int(environment.get("SLURM_RESTART_COUNT", 0)) > 0


def started(environment: Mapping[str, str] = os.environ) -> str:
    """How the folder of a run begins: `2026-03-01/12-00-00`; of a step of a batch job, what its tasks and its later
    lives have in common.

    >>> started({"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0"})
    'slurm/1234.0'
    """
    if in_step(environment) and environment.get("ENVIRONMENT") == "BATCH":
        return f"slurm/{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    return f"{datetime.now():%Y-%m-%d/%H-%M-%S}"


def requeue(number: int, handler_before: object) -> None:
    """Put this job, whose run is saved, back into the queue, as signal `number` asked.

    `handler_before` is who held the signal before the run: submitit, which ends the process then, or nobody. Raises
    VlmrlError where the job is not put back.
    """
    if callable(handler_before):
        try:
            handler_before(number, None)
        except RuntimeError as error:  # submitit's UncompletedJobError: it was put back often enough
            raise VlmrlError(f"{error} Continue it by hand with the same command") from error
        return
    job = os.environ["SLURM_JOB_ID"]
    said = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_S)
    if said.returncode != 0:
        raise VlmrlError(
            f"job {job} is not put back into the queue ({said.stderr.strip()}): submit it with sbatch --requeue, or "
            "continue it by hand with resume="
        )
