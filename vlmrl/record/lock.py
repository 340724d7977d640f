"""One writer per run folder: a lock that names its holder.

    with RunLock(folder, "rl"):   <folder>/.lock: {"pid": 4711, "host": "gpu07", "mode": "rl", "since": "2026-03-01 …"}
        …                         a second writer, on any path to the folder, gets a ConfigError that quotes this

The lock is `flock` on the file `.lock`, so the kernel releases it when the process dies, however it dies. The file is
removed where the run ends by itself; a file that a killed process left behind locks nothing. Reading a run needs no
lock: mode=report, mode=compare and the reading side of mode=replay and mode=eval work while a run writes.

On NFS, Linux turns `flock` into a lock of the NFS server, which other hosts see. A server without locks, or a mount
with `nolock` or `local_lock=flock`, excludes processes of the same host only, and logs/main.log says that the folder is
on a network file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from vlmrl.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"

LOCK_PATIENCE_S = 1.0
"""Seconds to keep trying, because a process that only asks whether the folder is locked holds the lock for a moment."""

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "lustre", "beegfs", "gpfs", "ceph", "9p", "afs")
"""How the types of file systems begin whose locks may not reach other hosts."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file names it."""

    pid: int
    host: str
    mode: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (mode={self.mode}, since {self.since})"


_held: dict[Path, int] = {}
"""Folders that this process has locked → the open lock file."""


def _forget_in_child() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


# A forked child shares the lock and would keep it after the run has died.
os.register_at_fork(after_in_child=_forget_in_child)


class RunLock:
    """A context manager that holds a folder's lock. Inside a block that already holds it, a second one does nothing."""

    def __init__(self, folder: Path, mode: str) -> None:
        """`folder` exists. `mode` is what the process does there, for the message of the process that is refused."""
        self._folder = folder.resolve()
        self._mode = mode
        self._is_outer = False

    def __enter__(self) -> RunLock:
        """Raises ConfigError while another process holds the lock, OSError where the lock file cannot be made."""
        if self._folder in _held:
            return self
        descriptor = _locked_file(self._folder)
        _held[self._folder] = descriptor
        self._is_outer = True
        own = Holder(os.getpid(), socket.gethostname(), self._mode, time.strftime("%Y-%m-%d %H:%M:%S"))
        with contextlib.suppress(OSError):  # a full disk: the folder is locked without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(own)).encode() + b"\n", 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_outer:
            return
        descriptor = _held.pop(self._folder)
        with contextlib.suppress(OSError):  # the folder was moved or deleted
            (self._folder / LOCK_FILE).unlink()
        os.close(descriptor)


def holder_of(folder: Path) -> Holder | None:
    """The process that holds the folder's lock now; None where the folder is free or this process holds it itself."""
    if folder.resolve() in _held:
        return None
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try(descriptor, fcntl.LOCK_SH) else _named(descriptor)
    finally:
        os.close(descriptor)


def network_file_system(folder: Path) -> str | None:
    """The type of the file system of `folder`, e.g. "nfs4", where its locks may not reach other hosts; else None."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    kind, longest = "", -1
    for line in mounts:
        own, _, source = line.partition(" - ")
        place = own.split(" ")[4].replace("\\040", " ")
        if len(place) > longest and folder.resolve().is_relative_to(place):
            kind, longest = source.split(" ")[0], len(place)
    return kind if kind.startswith(NETWORK_FILE_SYSTEMS) else None


def _locked_file(folder: Path) -> int:
    """Open the lock file and lock it. Raises ConfigError, OSError."""
    until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if _try(descriptor, fcntl.LOCK_EX):
            if _is_named(descriptor, folder / LOCK_FILE):
                return descriptor
            os.close(descriptor)  # the holder before has just removed the file; another process may have the new one
            continue
        holder = _named(descriptor)
        os.close(descriptor)
        if time.monotonic() > until:
            raise ConfigError(
                f"{folder} is in use by {holder}, and a second process would destroy its record: wait until that "
                "process ends, stop it, or choose another folder"
            )
        time.sleep(0.05)


def _try(descriptor: int, operation: int) -> bool:
    """Whether the lock was free, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("this file system has no locks (%s), so a second process in this folder goes unnoticed", error)
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _named(descriptor: int) -> Holder:
    """What the lock file says; a placeholder where its holder has not written it yet."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(int(content["pid"]), str(content["host"]), str(content["mode"]), str(content["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder(0, "an unknown host", "unknown", "an unknown time")
