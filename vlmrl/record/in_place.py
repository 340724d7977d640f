"""Notice files and folders that are removed or replaced while a run writes to them.

A file that is open can be written to after it was removed, without any error: its content is lost when the run ends.
So the monitor checks after each step that every file is still the one that it writes to. Folders are made again,
because the rest of the run has a place there; a file whose earlier lines are gone ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vlmrl.errors import VlmrlError
from vlmrl.record.files import disk_errors


def check_in_place(path: Path, written: os.stat_result, size: int) -> None:
    """Raise VlmrlError unless `path` is the file that was `written` and has its `size` in bytes."""
    try:
        found: os.stat_result | None = os.stat(path)
    except OSError:
        found = None
    if found is None or not os.path.samestat(found, written) or found.st_size != size:
        raise VlmrlError(
            f"{path} was removed, replaced or changed while the run wrote to it, so the run would end without its "
            "earlier lines: put the file back from a copy, if there is one, and continue the run with resume="
        )


class Folders:
    """Watches folders: each is held open, so that a new folder of the same name is told apart."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises VlmrlError where one cannot be opened."""
        self._open: dict[Path, int] = {}
        for folder in folders:
            self._hold(folder)

    def make_again(self) -> list[Path]:
        """Make those folders again that are gone; returns them, and those that another folder has replaced. Raises
        VlmrlError where one cannot be made."""
        gone = [folder for folder, descriptor in self._open.items() if not _is_at(folder, descriptor)]
        for folder in gone:
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            os.close(self._open.pop(folder))
            self._hold(folder)
        return gone

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _hold(self, folder: Path) -> None:
        with disk_errors(folder):
            self._open[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_at(folder: Path, descriptor: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    return False
