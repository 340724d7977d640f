"""A run inside a Slurm job: its folder, its signals, its way back into the queue, its servers. Imports no torch.

    sbatch ─▶ srun python -m vlmrl … ─▶ outputs/slurm/<job>.<step>_…
              SIGUSR1, SIGUSR2 (#SBATCH --signal=USR2@120: the time limit is near) ─▶ save ─▶ scontrol requeue ─┐
              SIGTERM (scancel, scontrol requeue, preemption)                      ─▶ save ─▶ end               │
    the job again, SLURM_RESTART_COUNT=1 ─▶ the same folder ─▶ the rest of the run (cli/sweep/again.py) ◀───────┘

Under hydra/launcher=slurm, submitit installs its own handlers for these signals first, and decides about requeueing.

The last tasks of a job step may run vLLM servers instead of training (inference.slurm_tasks):

    task 0 ─ holding_servers ──── one connection to each server task, which closes ─▶ run_is_over ─ task n
                                  when task 0 ends
       VllmEngine ◀── <run>/servers/<task>.json: its URL and key (inference/vllm/slurm_servers.py) ── its vLLM server
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
from vlmrl.ranks.environment import number, text
from vlmrl.ranks.handshake import HANDSHAKE_TIMEOUT_S, MAX_EXAMINED, limited

QUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that mean: save, and continue later. `#SBATCH --signal` chooses one; submitit uses SIGUSR2."""

SCONTROL_TIMEOUT_S = 60.0
"""Seconds that a busy Slurm controller may take to answer."""


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task that srun started (a batch script outside srun is none)."""
    return "SLURM_STEP_ID" in environment


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether its job was requeued and now runs again."""
    return in_step(environment) and number(environment, "SLURM_RESTART_COUNT", default=0) > 0


def check_step(environment: Mapping[str, str] = os.environ) -> None:
    """Raises `ConfigError` where the variables of a step are there in part, or are no numbers. It is called first, so
    that what is read later, in the middle of composing a config, is sound."""
    if in_step(environment):
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
            number(environment, name)
        is_restarted(environment)
        number(environment, "SLURM_PROCID", below=tasks_of_step(environment))
        nodes(environment)
    elif tasks_of_step(environment) > 1:
        text(environment, "SLURM_STEP_ID")


def step_number(environment: Mapping[str, str] = os.environ) -> int:
    """A number that is the same for all tasks of a step, and most likely another in other steps."""
    return 31 * number(environment, "SLURM_JOB_ID") + number(environment, "SLURM_STEP_ID")


def in_step_of_batch_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task of a batch job, whose run keeps its folder after a requeue."""
    return in_step(environment) and environment.get("ENVIRONMENT") == "BATCH"


def run_folder_prefix(environment: Mapping[str, str] = os.environ) -> str:
    """How the name of a run's folder begins: the time, `2026-03-01/12-00-00`. In a step of a batch job: the job and the
    step, which are the same for all of its tasks and after a requeue.

    >>> run_folder_prefix({"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0"})
    'slurm/1234.0'
    """
    if in_step_of_batch_job(environment):
        return f"slurm/{number(environment, 'SLURM_JOB_ID')}.{number(environment, 'SLURM_STEP_ID')}"
    return f"{datetime.now():%Y-%m-%d/%H-%M-%S}"


def requeue(number: int, handler_before: object) -> None:
    """Put this job, whose run is saved, back into the queue after signal `number`.

    `handler_before` is the handler that the signal had before the run installed its own. If it is callable it is
    submitit's, which requeues the job and ends the process. Raises VlmrlError where the job is not requeued.
    """
    if callable(handler_before):
        try:
            handler_before(number, None)
        except RuntimeError as error:  # submitit's UncompletedJobError: the job was requeued as often as allowed
            raise VlmrlError(f"{error} Continue the run by hand with the same command.") from error
        return
    job = text(os.environ, "SLURM_JOB_ID")
    command = ["scontrol", "requeue", job]
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=SCONTROL_TIMEOUT_S
    )
    if answer.returncode != 0:
        raise VlmrlError(
            f"job {job} was not put back into the queue ({answer.stderr.strip()}): submit it with sbatch --requeue, or "
            "continue the run by hand with resume=."
        )


# ── tasks that serve ────────────────────────────────────────────────────────────────────────────────────────

FIRST_PORT, PORT_COUNT = 10_000, 10_000
"""The ports on which task 0 accepts server tasks. Job and step number choose one of them; all are below the ports that
Linux assigns by itself."""

ARRIVAL_TIMEOUT_S = 30.0
"""Seconds that task 0 waits at its end for server tasks that have not connected yet."""
CONNECT_TIMEOUT_S = 120.0
"""Seconds that a server task tries to connect to task 0."""


def serving_tasks_in(arguments: Sequence[str]) -> int:
    """The value of `inference.slurm_tasks` on a command line; 0 where it is not there.

    >>> serving_tasks_in(["inference=vllm", "inference.slurm_tasks=2"]), serving_tasks_in(["seed=1"])
    (2, 0)
    """
    values = [text.partition("=")[2] for text in arguments if text.startswith("inference.slurm_tasks=")]
    return int(values[-1]) if values and values[-1].isdigit() else 0


_serving: int | None = None
"""How many tasks of this step run servers; None before `divide_tasks`."""


def divide_tasks(count: int) -> None:
    """Let the last `count` tasks of this step run servers. Raises `ConfigError` where another number was given before,
    or where no task would be left for training."""
    global _serving
    if not in_step():
        if count:
            raise ConfigError(
                f"inference.slurm_tasks={count} runs servers in tasks of a Slurm job step, but this process is not in "
                "a step, so no server would start: start the run with srun or hydra/launcher=slurm, or set "
                "inference.replicas instead."
            )
        return
    if _serving not in (None, count):
        raise ConfigError(
            f"inference.slurm_tasks={count} is not on the command line, by which the tasks of this step were divided "
            f"({_serving} run servers), so tasks would disagree about their roles: add inference.slurm_tasks={count} "
            "to the command line."
        )
    if count >= (tasks := tasks_of_step()):
        raise ConfigError(
            f"inference.slurm_tasks={count} takes all {tasks} tasks of this step, so none would train: start srun with "
            f"--ntasks={count + 1} or more."
        )
    _serving = count


def tasks_of_step(environment: Mapping[str, str] = os.environ) -> int:
    """How many tasks srun started in this step, including this one; 1 outside Slurm."""
    return number(environment, "SLURM_STEP_NUM_TASKS", least=1, default=1)


def serving_tasks() -> int:
    """How many tasks of this step run servers."""
    return _serving or 0


def server_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """The index of the server that this task runs; None for a task that trains."""
    if not in_step(environment) or serving_tasks() == 0:
        return None
    tasks = tasks_of_step(environment)
    index = number(environment, "SLURM_PROCID", below=tasks) - tasks + serving_tasks()
    return index if index >= 0 else None


def first_gpu(count: int, training: int, environment: Mapping[str, str] = os.environ) -> int:
    """The first of the `count` GPUs of this task's server, on a node where every task sees all GPUs. Before it come one
    GPU for each of the step's `training` tasks on this node, and the GPUs of the servers before it.

    Two nodes, servers with two GPUs each: tasks 0 and 1 train on the first node, where task 2 serves; tasks 3 and 4
    serve on the second.

    >>> servers = [{"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, {"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}]
    >>> [first_gpu(2, 2, server) for server in [*servers, {"SLURM_PROCID": "4", "SLURM_LOCALID": "1"}]]
    [2, 0, 2]
    """
    local, task = number(environment, "SLURM_LOCALID"), number(environment, "SLURM_PROCID")
    training_here = max(0, training - (task - local))
    return training_here + (local - training_here) * count


def nodes(environment: Mapping[str, str] = os.environ) -> int:
    """How many hosts this step's tasks run on; 1 outside Slurm."""
    return number(environment, "SLURM_STEP_NUM_NODES", least=1, default=1)


def step_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name for this execution of this step. It changes with every requeue, so files of an earlier execution have
    another name."""
    job, step = (number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"{job}.{step}.{number(environment, 'SLURM_RESTART_COUNT', default=0)}"


_is_held = False


@contextmanager
def holding_servers() -> Iterator[None]:
    """On task 0: keep the server tasks running during the block. They end with this process, however it ends."""
    global _is_held
    count = serving_tasks()
    if count == 0 or _is_held or number(os.environ, "SLURM_PROCID") != 0:
        yield
        return
    _, port = _meeting_point()
    with _listen(port, count) as listener:
        servers = _Servers(listener)
        _is_held = True
        try:
            yield
        finally:
            _is_held = False
            servers.close(count)


def _listen(port: int, count: int) -> socket.socket:
    """The socket on which task 0 accepts `count` server tasks. Raises VlmrlError."""
    try:
        return socket.create_server(("127.0.0.1" if nodes() == 1 else "", port), backlog=max(count, MAX_EXAMINED))
    except OSError as error:
        raise VlmrlError(
            f"port {port}, on which this step's server tasks meet task 0, cannot be used ({error}), so no server would "
            "serve this run: submit the job again, which chooses another port, or end the program that has this one."
        ) from error


class _Servers:
    """The connections of task 0 to the server tasks. Whoever connects and does not say that it is one is sent away."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._held: list[socket.socket] = []
        self._arrived = threading.Condition()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self, count: int) -> None:
        """Close the connections when `count` tasks have arrived, or after `ARRIVAL_TIMEOUT_S`."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._held) >= count, ARRIVAL_TIMEOUT_S)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._accepting.join()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        examined = threading.BoundedSemaphore(MAX_EXAMINED)
        while True:
            examined.acquire()
            try:
                incoming, _ = self._listener.accept()
            except OSError:  # `close`
                return
            threading.Thread(target=self._examine, args=(incoming, examined), daemon=True).start()

    def _examine(self, incoming: socket.socket, examined: threading.BoundedSemaphore) -> None:
        hello, found = _hello(), b""
        with suppress(OSError), limited(incoming):
            while len(found) < len(hello) and (more := incoming.recv(len(hello) - len(found))):
                found += more
            if found == hello:
                incoming.sendall(hello)
        examined.release()
        if found != hello:
            incoming.close()
            return
        with self._arrived:
            self._held.append(incoming)
            self._arrived.notify()


def _hello() -> bytes:
    """What a server task says to task 0 of its step."""
    return f"vlmrl server of step {step_name()}\n".encode()


async def run_is_over() -> None:
    """On a server task: wait until task 0 has ended. Raises VlmrlError where task 0 never answered."""
    address, port = _meeting_point()
    give_up = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            reader, writer = await _greet(address, port)
            break
        except OSError as error:
            if time.monotonic() > give_up:
                raise VlmrlError(
                    f"task 0 of this step did not answer at {address}:{port} within {CONNECT_TIMEOUT_S:.0f} s "
                    f"({error}), so this server has no run to serve: see the output of task 0."
                ) from error
            await asyncio.sleep(0.5)
    try:
        with suppress(ConnectionError):
            await reader.read()
    finally:
        writer.close()


async def _greet(address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to task 0. Raises OSError where it does not answer, or another program does."""
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(_hello())
    try:
        answer = await asyncio.wait_for(reader.read(len(_hello())), HANDSHAKE_TIMEOUT_S)
        if answer != _hello():
            raise ConnectionError("another program answers")
    except BaseException:
        writer.close()
        raise
    return reader, writer


def _meeting_point() -> tuple[str, int]:
    """The address and port on which task 0 accepts server tasks."""
    address = "127.0.0.1" if nodes() == 1 else first_host(text(os.environ, "SLURM_STEP_NODELIST"))
    return address, FIRST_PORT + step_number() % PORT_COUNT


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> [first_host(nodes) for nodes in ("gpu[07-09,12],login", "a,b", "rack1-node3", "r[2-3]n[01-16]")]
    ['gpu07', 'a', 'rack1-node3', 'r2n01']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes!r} names no host, so the tasks of this step cannot find each other: start the "
            "run with srun, or unset the SLURM_ variables."
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
