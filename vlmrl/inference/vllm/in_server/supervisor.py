"""Ends a server with its run: `python -m vlmrl.inference.vllm.in_server.supervisor <command of the server>`.

    run ──stdin──▶ supervisor ──▶ API server ──▶ engine ──▶ workers

If the API server is killed, vLLM's engine and workers keep running. If the run is killed, all of them do. So the
supervisor is the ancestor and subreaper of the server's processes: a process that loses its parent becomes its child.
The run holds the other end of stdin. When stdin closes (the run has stopped the server, or has died, even of SIGKILL)
or the API server has ended, the supervisor sends SIGTERM and then SIGKILL to all processes below it.

Each line on stdin is the path of a folder that the run keeps in shared memory for the server. The supervisor removes it
if the run has died.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL. vLLM takes a few seconds to exit; then it leaves no shared memory behind."""

POLL_S = 0.2
"""Seconds between two checks whether the API server still runs."""


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or the run does; returns its exit status (negative: the signal that ended it)."""
    run = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Ctrl-C concerns the run only. So do the signals by which Slurm requests a checkpoint, though it sends them to all
    # processes.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # vLLM inherits this
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    leftovers: list[Path] = []
    try:
        # PDEATHSIG: if this process itself is killed, so is the API server.
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
        _watch(server, run, leftovers)
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
        return server.poll() or 0
    finally:
        _end_descendants()
        if os.getppid() != run:
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)


def _watch(server: subprocess.Popen[bytes], run: int, leftovers: list[Path]) -> None:
    """Return when the API server has ended, the run has died, or the run has closed stdin."""
    received = b""
    while server.poll() is None and os.getppid() == run:
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        chunk = os.read(0, 4096)
        if not chunk:
            return
        *lines, received = (received + chunk).split(b"\n")
        leftovers.extend(Path(os.fsdecode(line)) for line in lines)


def _end_descendants() -> None:
    """Send SIGTERM to all descendants, then SIGKILL to those that remain, until none remains."""
    _, alive = psutil.wait_procs(_signal_descendants(signal.SIGTERM), GRACE_S)
    while alive:
        _, alive = psutil.wait_procs(_signal_descendants(signal.SIGKILL), GRACE_S)


def _signal_descendants(number: signal.Signals) -> list[psutil.Process]:
    descendants: list[psutil.Process] = psutil.Process().children(recursive=True)
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return descendants


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
