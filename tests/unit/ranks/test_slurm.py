"""The role of a Slurm task, from its environment. tests/e2e/test_slurm.py runs a real Slurm."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from support.slurm_tasks import step
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.ranks import slurm
from vlmrl.ranks.place import Place, find_place

# ── who serves ──────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_are_those_that_do_not_serve(in_task: Callable[..., None]) -> None:
    in_task(0, serving=1)
    assert [slurm.server_index(step(task)) for task in range(3)] == [None, None, 0]
    places = [find_place(step(task)) for task in (0, 1)]
    assert [(place.rank, place.size) for place in places] == [(0, 2), (1, 2)]
    assert find_place(step(0, tasks=2)) == Place(), "a single training task is a run of one process"


def test_tasks_are_divided_once(in_task: Callable[..., None]) -> None:
    in_task(2)
    slurm.divide_tasks(1)
    assert slurm.server_index() == 0
    slurm.divide_tasks(1)
    with pytest.raises(ConfigError, match=r"inference\.slurm_tasks=2 is not on the command line.*\(1 run servers"):
        slurm.divide_tasks(2)


def test_one_task_must_train(in_task: Callable[..., None]) -> None:
    in_task(0)
    with pytest.raises(ConfigError, match="takes all 3 tasks of this step"):
        slurm.divide_tasks(3)


def test_no_task_serves_outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    slurm.divide_tasks(0)
    with pytest.raises(ConfigError, match="this process is not in a step"):
        slurm.divide_tasks(1)


# ── finding each other ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_servers_end_with_task_0(ends: str, in_task: Callable[..., None]) -> None:
    hold = (
        "import sys; from vlmrl.ranks import slurm\n"
        "slurm.divide_tasks(1)\n"
        "with slurm.holding_servers(): print('held', flush=True); sys.stdin.readline()"
    )
    number = os.getpid()  # tests of two sessions do not meet
    leader = {**os.environ, **step(0, tasks=2), "SLURM_JOB_ID": str(number)}
    in_task(1, tasks=2, serving=1, SLURM_JOB_ID=str(number))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], env=leader, **pipes) as task_0:  # type: ignore[call-overload]
        assert task_0.stdout.readline() == "held\n"

        async def serve() -> None:
            over = asyncio.create_task(slurm.run_is_over())
            done, _ = await asyncio.wait({over}, timeout=0.5)
            assert not done, "it serves for as long as the run lasts"
            if ends == "killed":
                task_0.send_signal(signal.SIGKILL)
            else:
                task_0.stdin.write("\n")
                task_0.stdin.flush()
            await asyncio.wait_for(over, 30.0)

        asyncio.run(serve())


def test_strangers_end_no_server_and_are_none(in_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port scan, and a connection that stays; the server task comes after them."""
    monkeypatch.setattr(slurm, "ARRIVAL_TIMEOUT_S", 5.0)
    in_task(0, tasks=2, serving=1, SLURM_JOB_ID=str(os.getpid()))
    with slurm.holding_servers():
        address, port = slurm._meeting_point()
        for _ in range(3):
            socket.create_connection((address, port)).close()
        with socket.create_connection((address, port)) as holder:

            async def serve() -> None:
                over = asyncio.create_task(slurm.run_is_over())
                done, _ = await asyncio.wait({over}, timeout=0.5)
                assert not done
                over.cancel()
                await asyncio.gather(over, return_exceptions=True)

            asyncio.run(serve())
            holder.sendall(b"GET / HTTP/1.0\r\n\r\n and more than a hello has")
            holder.settimeout(5)
            with suppress(ConnectionResetError):
                assert holder.recv(100) == b""


def test_a_port_that_another_program_has(in_task: Callable[..., None]) -> None:
    in_task(0, tasks=2, serving=1, SLURM_JOB_ID=str(os.getpid()))
    address, port = slurm._meeting_point()
    with (
        socket.create_server((address, port)),
        pytest.raises(VlmrlError, match=rf"port {port}, .* cannot be used"),
        slurm.holding_servers(),
    ):
        pass


def test_task_0_that_was_never_there(in_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    in_task(1, tasks=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(slurm, "FIRST_PORT", free.getsockname()[1])
    monkeypatch.setattr(slurm, "PORT_COUNT", 1)
    monkeypatch.setattr(slurm, "CONNECT_TIMEOUT_S", 0.0)
    with pytest.raises(VlmrlError, match="task 0 of this step did not answer at"):
        asyncio.run(slurm.run_is_over())


# ── back into the queue ─────────────────────────────────────────────────────────────────────────────────────


def test_submitit_has_the_last_word_about_the_queue() -> None:
    called: list[int] = []
    slurm.requeue(signal.SIGUSR2, lambda number, frame: called.append(number))
    assert called == [signal.SIGUSR2]

    def too_often(number: int, frame: object) -> None:
        raise RuntimeError("Job not requeued because: timed-out too many times.")

    with pytest.raises(VlmrlError, match="too many times"):
        slurm.requeue(signal.SIGUSR2, too_often)
