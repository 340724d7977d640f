"""A run inside a Slurm job: where its folder is, what signals ask of it, how it goes back into the queue. No torch.

    sbatch ─▶ srun python -m vlmrl … ─▶ outputs/slurm/<job>.<step>_…
              SIGUSR1, SIGUSR2 (#SBATCH --signal=USR2@120: the time limit is near) ─▶ save ─▶ scontrol requeue ─┐
              SIGTERM (scancel, scontrol requeue, preemption)                      ─▶ save ─▶ end               │
    the job again, SLURM_RESTART_COUNT=1 ─▶ the same folder ─▶ what is left of the run (sweep/again.py) ◀───────┘

Under hydra/launcher=slurm submitit holds these signals first, and has the last word about the queue.

The last tasks of a step may serve instead of training (inference.slurm_tasks):

    task 0 ─ holding_servers ──── a connection to each, closed with the process ────▶ run_is_over ─ task n
       VllmEngine ◀── <run>/servers/<task>.json: its URL and key (inference/slurm_servers.py) ── its vLLM server
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime

from vlmrl.errors import ConfigError, VlmrlError

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


# ── tasks that serve ────────────────────────────────────────────────────────────────────────────────────────

FIRST_PORT, PORTS = 10_000, 10_000
"""Where task 0 holds those that serve: a port that the step's number gives, below those that Linux hands out."""

COME_S = 30.0
"""Seconds that task 0 waits at its end for tasks that have not come yet."""
CONNECT_S = 120.0
"""Seconds that a task which serves waits for task 0 to be there."""


def said_in(arguments: Sequence[str]) -> int:
    """`inference.slurm_tasks` of a command line.

    >>> said_in(["inference=vllm", "inference.slurm_tasks=2"]), said_in(["seed=1"])
    (2, 0)
    """
    values = [text.partition("=")[2] for text in arguments if text.startswith("inference.slurm_tasks=")]
    return int(values[-1]) if values and values[-1].isdigit() else 0


_serving: int | None = None
"""How many tasks of this step serve; None until `part` has said so."""


def part(count: int) -> None:
    """Let the last `count` tasks of this step serve. Raises `ConfigError` where that was said otherwise before, or
    there are not as many tasks."""
    global _serving
    if not in_step():
        if count:
            raise ConfigError(
                f"inference.slurm_tasks={count} requires a task of a Slurm job for each and one that trains, else "
                "nobody serves: start the run with srun or hydra/launcher=slurm, or set inference.replicas instead"
            )
        return
    if _serving not in (None, count):
        raise ConfigError(
            f"inference.slurm_tasks={count} requires to be said on the command line, else the tasks that srun has "
            f"started part otherwise ({_serving} serve): add inference.slurm_tasks={count}"
        )
    if count >= (tasks := tasks_of_step()):
        raise ConfigError(
            f"inference.slurm_tasks={count} requires more tasks than the {tasks} of this step, else none trains: start "
            f"srun with --ntasks={count + 1} or more"
        )
    _serving = count


def tasks_of_step(environment: Mapping[str, str] = os.environ) -> int:
    """How many tasks srun has started, this one among them; 1 outside Slurm."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def serving_tasks() -> int:
    """How many of them serve."""
    return _serving or 0


def server_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which server this task is; None for one that trains."""
    if not in_step(environment):
        return None
    index = int(environment["SLURM_PROCID"]) - tasks_of_step(environment) + serving_tasks()
    return index if index >= 0 else None


def first_gpu(count: int, training: int, environment: Mapping[str, str] = os.environ) -> int:
    """Where the `count` GPUs of this task's server begin, on a node whose tasks see all of its GPUs: after one for each
    of the step's `training` tasks that is there, and those of the servers before.

    Two nodes, and servers of two GPUs: tasks 0 and 1 train on the first, which serves too (2), as does the second.

    >>> servers = [{"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, {"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}]
    >>> [first_gpu(2, 2, server) for server in [*servers, {"SLURM_PROCID": "4", "SLURM_LOCALID": "1"}]]
    [2, 0, 2]
    """
    local, task = int(environment["SLURM_LOCALID"]), int(environment["SLURM_PROCID"])
    training_here = max(0, training - (task - local))
    return training_here + (local - training_here) * count


def nodes(environment: Mapping[str, str] = os.environ) -> int:
    """How many hosts this step's tasks are on; 1 outside Slurm."""
    return int(environment.get("SLURM_STEP_NUM_NODES", 1))


def step_name(environment: Mapping[str, str] = os.environ) -> str:
    """This life of this step: what an earlier one has left behind is called otherwise."""
    life = (environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"], environment.get("SLURM_RESTART_COUNT", "0"))
    return ".".join(life)


_is_held = False


@contextmanager
def holding_servers() -> Iterator[None]:
    """Task 0: the tasks that serve do so while the block runs, and end with this process, however it ends."""
    global _is_held
    count = serving_tasks()
    if count == 0 or _is_held or os.environ["SLURM_PROCID"] != "0":
        yield
        return
    _, port = _meeting()
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1" if nodes() == 1 else "", port), backlog=count) as listener:

        def hold() -> None:
            while len(held) < count:
                try:
                    held.append(listener.accept()[0])
                except OSError:  # closed: it is over
                    return

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        _is_held = True
        try:
            yield
        finally:
            _is_held = False
            holder.join(COME_S)
            for connection in held:
                connection.close()


async def run_is_over() -> None:
    """A task that serves: return when task 0 has ended. Raises VlmrlError where it was never there."""
    address, port = _meeting()
    give_up = time.monotonic() + CONNECT_S
    while True:
        try:
            reader, writer = await asyncio.open_connection(address, port)
            break
        except OSError as error:
            if time.monotonic() > give_up:
                raise VlmrlError(f"task 0 of this step is not at {address}:{port}: it says why") from error
            await asyncio.sleep(0.5)
    with suppress(ConnectionError):
        await reader.read()
    writer.close()


def _meeting() -> tuple[str, int]:
    """Address and port of task 0."""
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    address = "127.0.0.1" if nodes() == 1 else first_host(os.environ["SLURM_STEP_NODELIST"])
    return address, FIRST_PORT + (31 * job + step) % PORTS


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> [first_host(nodes) for nodes in ("gpu[07-09,12],login", "a,b", "rack1-node3", "r[2-3]n[01-16]")]
    ['gpu07', 'a', 'rack1-node3', 'r2n01']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
