"""Run the command of a benchmark, and measure its processor time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def processor_seconds(overrides: Sequence[str], name: str, cwd: Path | None = None) -> float:
    """Run `python -m vlmrl` of this repository with `overrides` in `cwd`, without its output. Returns its processor
    seconds, in user and system mode. Raises RuntimeError, which calls the run `name`, where it fails."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmrl", *overrides],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime
