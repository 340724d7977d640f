"""Ends a server with its run: `python -m vlmrl.inference.vllm.in_server.supervisor <command of the server>`.

    run ──stdin──▶ guard ──▶ supervisor ──▶ API server ──▶ engine ──▶ workers
                                                      └──▶ resource tracker

If the API server is killed, vLLM's engine and workers keep running. If the run is killed, all of them do. So guard and
supervisor are ancestors and subreapers of the server's processes: a process that loses its parent becomes the child of
the nearest of the two. The run holds the other end of stdin. When stdin closes (the run has stopped the server), the
run dies (even of SIGKILL), the guard dies or the API server ends, the supervisor sends SIGTERM and then SIGKILL to all
processes below it. When the supervisor is killed, the guard does so.

Both hold a lock on the file `LOCK_VARIABLE`. It becomes free when both are dead, and then every Python process of the
server kills itself (site/sitecustomize.py). The run also waits for it, and kills whatever is left in their session
(server.py).

Each line on stdin is the path of a folder that the run keeps for the server. The supervisor removes it if the run has
died.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

LOCK_VARIABLE = "VLMRL_SERVER_LOCK"
"""Environment variable with the path of the lock file of this launch."""

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL. vLLM takes a few seconds to exit; then it leaves no shared memory behind."""

POLL_S = 0.2
"""Seconds between two checks whether the other processes still run."""

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_POLL_S = 10.0


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or the run does; returns its exit status (negative: the signal that ended it)."""
    run = psutil.Process(os.getppid())
    lock = os.open(os.environ[LOCK_VARIABLE], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the supervisor inherits it; the server does not
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Ctrl-C concerns the run only. So do the signals by which Slurm requests a checkpoint, though it sends them to all
    # processes.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # vLLM inherits this
    supervisor = os.fork()
    if supervisor == 0:
        os._exit(_supervise(command, run) & 0xFF)
    return _guard(supervisor, run)


def _guard(supervisor: int, run: psutil.Process) -> int:
    """Wait for the supervisor → its exit status, and end what it has left behind."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(supervisor, signal.SIGTERM))
    shared = SharedMemory()
    while True:
        shared.look_sometimes()
        ended, status = os.waitpid(supervisor, os.WNOHANG)
        if ended:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends as soon as the others have
            break
        if not is_alive(run) and psutil.Process(supervisor).status() == psutil.STATUS_STOPPED:
            os.kill(supervisor, signal.SIGKILL)
        time.sleep(POLL_S)
    _end_descendants(shared)
    return os.waitstatus_to_exitcode(status)


def _supervise(command: Sequence[str], run: psutil.Process) -> int:
    guard = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # a fork does not inherit it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    leftovers: list[Path] = []
    shared = SharedMemory()
    status = 1
    try:
        # PDEATHSIG: if this process itself is killed, so is the API server.
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
        _watch(server, run, guard, leftovers, shared)
        if server.poll() is None:
            server.terminate()
            server.send_signal(signal.SIGCONT)  # a stopped process does not see SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
        status = server.poll() or 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    finally:
        _end_descendants(shared)
        if not is_alive(run):
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)
            if os.getppid() == guard:
                os.kill(guard, signal.SIGKILL)  # it may be stopped, and has nothing to do any more
    return status


def _watch(
    server: subprocess.Popen[bytes], run: psutil.Process, guard: int, leftovers: list[Path], shared: SharedMemory
) -> None:
    """Return when the API server has ended, the run or the guard has died, or the run has closed stdin; by then, all
    that the run has written is read."""
    received = b""
    while True:
        is_over = server.poll() is not None or os.getppid() != guard or not is_alive(run)
        shared.look_sometimes()
        if not select.select([0], [], [], 0.0 if is_over else POLL_S)[0]:
            if is_over:
                return
            continue
        chunk = os.read(0, 4096)
        if not chunk:
            return
        *lines, received = (received + chunk).split(b"\n")
        leftovers.extend(Path(os.fsdecode(line)) for line in lines)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs or is stopped; False for a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class SharedMemory:
    """The server's files in /dev/shm: semaphores and the like. Python's resource tracker removes those of processes
    that have been killed, unless it has been killed too, as it is with an engine that takes long to end."""

    def __init__(self) -> None:
        self._inodes: set[int] = set()
        self._looked = 0.0

    def look_sometimes(self) -> None:
        """Look about every `SHARED_MEMORY_POLL_S` seconds: reading a process's memory map takes milliseconds."""
        if time.monotonic() - self._looked > SHARED_MEMORY_POLL_S:
            self.look()
            self._looked = time.monotonic()

    def look(self) -> None:
        """Remember which files the descendants have mapped."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError):
                for line in (
                    Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
                ):
                    # The path may be that of a temporary file which was linked to its name later, so it says nothing.
                    if str(SHARED_MEMORY) in line:
                        self._inodes.add(int(line.split()[4]))

    def remove(self) -> None:
        """Remove the files that are still there."""
        with contextlib.suppress(OSError):
            for path in SHARED_MEMORY.iterdir():
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    if path.is_file() and status.st_ino in self._inodes and status.st_uid == os.geteuid():
                        path.unlink()


def _end_descendants(shared: SharedMemory) -> None:
    """Send SIGTERM to all descendants, then SIGKILL to those that remain, until none remains. Then remove the shared
    memory that they have left behind."""
    shared.look()
    _, alive = psutil.wait_procs(_signal_descendants(signal.SIGTERM, signal.SIGCONT), GRACE_S)
    while alive:
        _, alive = psutil.wait_procs(_signal_descendants(signal.SIGKILL), GRACE_S)
    shared.remove()


def _signal_descendants(*numbers: signal.Signals) -> list[psutil.Process]:
    descendants: list[psutil.Process] = psutil.Process().children(recursive=True)
    for process in descendants:
        for number in numbers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    return descendants


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
