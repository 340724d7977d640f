"""Other processes that hold the lock of a run folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from vlmrl.record.lock import RunLock
with RunLock(Path(sys.argv[1]), "rl"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `folder` until the block ends or it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
