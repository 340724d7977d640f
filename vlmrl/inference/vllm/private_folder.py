"""Folders of a run outside its run directory: sockets and temporary files of a server, weights on their way to it.

Only the user can open them (mode 0700), so no other user of the machine can listen on a socket in them. A run removes
its folders when it ends. If every process that could do so has been killed, the next run of the user on the same
machine removes them: each folder has a lock file, and the kernel releases the lock with the last process that holds it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import weakref
from pathlib import Path

PREFIX = "vlmrl-"

LOCK = "alive"
"""Name of the lock file. It contains the host's name, because locks of another host may not be visible here."""

SOCKET_PATH_LIMIT = 107
"""Longest path of a Unix socket, in bytes (`sun_path` in <sys/un.h>, without its final NUL)."""

LONGEST_NAME = len("/vlmrl-server-12345678/01234567-89ab-cdef-0123-456789abcdef")
"""Length of the longest socket name below a root: vLLM names its own sockets by UUID."""


class PrivateFolder:
    """A new folder `<root>/vlmrl-<kind>-<random>` of mode 0700 that exists until `remove`."""

    def __init__(self, kind: str, root: Path) -> None:
        """Also removes abandoned folders of the same kind below `root`. Raises `OSError`."""
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=root))
        lock = _lock(self.path)
        self._remove = weakref.finalize(self, _remove, self.path, lock)
        _remove_abandoned(root, kind)

    def remove(self) -> None:
        """Remove the folder with everything in it. May be called twice; the interpreter calls it when it exits."""
        self._remove()


def socket_root() -> Path:
    """The folder for temporary files, or another one if its name is too long for the sockets in it."""
    candidates = [tempfile.gettempdir(), "/tmp", "/dev/shm"]
    for candidate in candidates:
        is_short = len(os.fsencode(candidate)) + LONGEST_NAME <= SOCKET_PATH_LIMIT
        if is_short and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    raise OSError(f"none of {', '.join(candidates)} is writable and short enough for a Unix socket: set TMPDIR")


def _lock(folder: Path) -> int | None:
    """Make the lock file of a new folder and lock it → its descriptor; None where the disk has no locks."""
    # The file appears under its name when it is locked, so nobody finds it unlocked while its owner is alive.
    new = folder / f"{LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return None
    os.write(descriptor, socket.gethostname().encode())
    new.rename(folder / LOCK)
    return descriptor


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _remove_abandoned(root: Path, kind: str) -> None:
    """Remove the user's folders below `root` whose owner has died."""
    for folder in root.glob(f"{PREFIX}{kind}-*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid():
                continue
            if is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # its owner removes it at this moment


def is_abandoned(folder: Path) -> bool:
    """Whether no process of this host holds the folder's lock any more. Raises `OSError`."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # its owner is making it, or the disk has no locks
    try:
        if os.read(descriptor, 256).decode(errors="replace") != socket.gethostname():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
