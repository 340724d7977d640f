"""Runs a program and ends everything that it started: `python -I -S guard.py <fd> <command> …`.

    run ── lifeline (a pipe) ──▶ guard ──▶ program ──▶ its children, also those that detached themselves

The guard is the subreaper of the program: a process whose parent ends becomes a child of the guard, whatever session
or process group it has moved to. The guard kills all of them when the program ends, and when the lifeline closes. The
run closes the lifeline to stop the program; it also closes when the run dies, even of SIGKILL. Standard input, output
and error are the program's own. The guard ends with the program's exit status (128 + the signal's number where a
signal ended it), after the last process is gone, so the streams are closed when it is.

The file is started by its path, so it imports the standard library only. Linux alone has subreapers; elsewhere the
process group is killed, which a program that detaches itself escapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

GRACE_S = 1.0
"""Seconds between SIGTERM and SIGKILL for a program that the run stops."""

CANNOT_START = 127
"""Exit status where the command cannot be started, as a shell gives it."""

FOR_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a batch system sends to every process. The run decides when its programs end."""


def main(lifeline: int, command: list[str]) -> int:
    """Run `command` until it ends or `lifeline` (a file descriptor) closes; returns its exit status."""
    os.set_inheritable(lifeline, False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in FOR_THE_RUN:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the program would inherit
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        program = subprocess.Popen(command, preexec_fn=end_with_guard, start_new_session=True)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return CANNOT_START
    for stream in (0, 1, 2):  # only the program's processes hold the pipes now
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    try:
        stops = wait(program, lifeline, wake)
        if stops:
            signal_group(program.pid, signal.SIGTERM)
            wait_at_most(program, GRACE_S)
    finally:
        kill_descendants(program)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def wait(program: subprocess.Popen[bytes], lifeline: int, wake: int) -> bool:
    """Wait until the program ends (False) or the lifeline closes (True)."""
    while program.poll() is None:
        ready, _, _ = select.select([lifeline, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        elif not os.read(lifeline, 1):
            return True
        reap(program.pid)
    return False


def wait_at_most(program: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(seconds)


def reap(program: int) -> None:
    """Collect adopted processes that have ended. The program itself is collected by `Popen`, which needs its status."""
    for pid in children():
        if pid != program:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def kill_descendants(program: subprocess.Popen[bytes]) -> None:
    """Kill the program's group and every process that is left below the guard, until none is."""
    signal_group(program.pid, signal.SIGKILL)
    while left := list(children()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.poll()
        reap(program.pid)
        time.sleep(0.001)
    program.wait()


def children() -> Iterator[int]:
    """The direct children of this process; those of a killed child become its children in turn."""
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        yield from map(int, file.read().split())


def signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def end_with_guard() -> None:
    """In the new process: end when the guard itself is killed."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
