"""Start several ranks on this machine, as a launcher does."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support import TESTS, processes

TIMEOUT_S = 600.0
"""Seconds after which ranks count as hanging."""


@dataclass(frozen=True)
class EndedRank:
    """The exit code and the output of a rank."""

    code: int
    out: str
    err: str


def environments(size: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each of `size` ranks on one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        for rank in range(size)
    ]


def start(size: int, command: Sequence[str], *, leaving_out: int | None = None) -> list[processes.Process]:
    """Run `python <command>` as each of `size` ranks, or as all but one."""
    return [
        processes.start(*command, cwd=Path.cwd(), environment=environment)
        for rank, environment in enumerate(environments(size))
        if rank != leaving_out
    ]


def ended(started: Sequence[processes.Process]) -> list[EndedRank]:
    """Wait for all ranks to end. Raises `subprocess.TimeoutExpired` where they hang, and kills them."""
    try:
        found = [process.communicate(timeout=TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [EndedRank(process.returncode, out, err) for process, (out, err) in zip(started, found, strict=True)]
