"""report.html beside a run: `python -m vlmrl mode=report run=<dir>` in a process of its own.

Not a thread: a page takes about half a second of Python, which a thread would take out of the training step. While the
run goes on, the process has the lowest priority and takes what nobody else wants; at the end the run waits for it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from vlmrl.monitor.report.page import temporary_of
from vlmrl.record.files import disk_errors
from vlmrl.record.run_dir import RunDir

LOWEST_PRIORITY = 19
PATIENCE_S = 120.0
"""Seconds that a page may take before the run ends without it."""


class ReportWriter:
    """Starts the process and looks after it; one at a time."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Write the page in the background, unless that is being done. False where the last time went wrong.

        Raises VlmrlError where the disk does not take the log.
        """
        if self._process is not None and self._process.poll() is None:
            return True
        went_well = self._process is None or self._process.returncode == 0
        self._process = self._begin()
        os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
        return went_well

    def finish(self) -> bool:
        """Write the page of the whole run and return when it is there; False where it is not."""
        if self._process is not None:
            self._end(self._process)  # its page would be an old one
        self._process = self._begin()
        try:
            return self._process.wait(PATIENCE_S) == 0
        except subprocess.TimeoutExpired:
            self._end(self._process)
            return False

    def _begin(self) -> subprocess.Popen[bytes]:
        with disk_errors(self._run_dir.report_log), self._run_dir.report_log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "vlmrl", "mode=report", f"run={self._run_dir.path}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is the run's. Not a session of its own: Linux shares processors among sessions first, and the
                # priority would count for nothing.
                process_group=0,
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        temporary_of(self._run_dir.report, process.pid).unlink(missing_ok=True)
