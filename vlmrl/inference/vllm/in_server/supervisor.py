"""Keeps a server from outliving its run: `python -m vlmrl.inference.vllm.in_server.supervisor <command of the server>`.

    run ──stdin──▶ supervisor ──▶ API server ──▶ engine ──▶ workers

vLLM's engine and workers stay behind when the API server is killed, and nothing at all would stop when the run is. So
the server's processes hang below this one, which is their subreaper: whoever loses its parent becomes its child. The
run holds the other end of stdin. When it closes (the run has stopped the server, or died, of SIGKILL too), or when the
API server has ended, all that is left below is ended, first asked and then killed.

A line on stdin names a folder that the run keeps in shared memory for the server: removed here when the run has died.
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
"""Seconds between asking and killing. vLLM takes a few to end by itself, and then leaves no shared memory behind."""

POLL_S = 0.2
"""Seconds between two looks at whether the API server runs."""


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or the run does; returns its exit status (negative: the signal that ended it)."""
    run = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Ctrl-C is for the run, and so are the signals by which Slurm, which sends them to all processes, asks it to save.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # vLLM inherits that
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    leftovers: list[Path] = []
    try:
        # If this process is killed itself, the API server goes with it.
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
    """Return when the API server has ended or the run has let go of stdin."""
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
    """SIGTERM to all that is below, then SIGKILL to what is left, until nothing is."""
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
