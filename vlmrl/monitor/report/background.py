"""Write report.html during a run, by `python -m vlmrl mode=report run=<dir>` in a separate process.

A page takes about half a second of Python, which a thread would take from the training step. During the run, the
process has the lowest priority, so that it uses only idle processor time; at the end, the run waits for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from vlmrl.monitor.report.page import temporary_of
from vlmrl.record.files import disk_errors
from vlmrl.record.run_dir import RunDir

LOWEST_PRIORITY = 19
REPORT_TIMEOUT_S = 120.0
"""Seconds that the last page may take before the run ends without it."""

REPORT_POLL_S = 0.2
"""Seconds after which a signal is noticed while the run waits for its last page."""


class ReportWriter:
    """Starts the process that writes the page, one at a time."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Write the page in the background, unless it is being written. Returns False if the page before it failed.

        Raises VlmrlError where the log cannot be written.
        """
        if self._process is not None and self._process.poll() is None:
            return True
        succeeded = self._process is None or self._process.returncode == 0
        self._process = self._begin()
        os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
        return succeeded

    def finish(self, hurries: Callable[[], bool] = lambda: False) -> bool:
        """Write the page of the whole run and wait for it, unless `hurries` returns True meanwhile. Returns False if
        there is no page of the whole run."""
        if self._process is not None:
            self._end(self._process)  # its page would be outdated
        self._process = self._begin()
        until = time.monotonic() + REPORT_TIMEOUT_S
        while not hurries() and time.monotonic() < until:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(REPORT_POLL_S) == 0
        self._end(self._process)
        return False

    def _begin(self) -> subprocess.Popen[bytes]:
        with disk_errors(self._run_dir.report_log):
            self._run_dir.logs.mkdir(exist_ok=True)  # somebody may have deleted it
            log = self._run_dir.report_log.open("wb")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "vlmrl", "mode=report", f"run={self._run_dir.path}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A process group of its own, so that Ctrl-C reaches only the run. Not a session of its own: Linux
                # divides processor time among sessions first, so the priority would have no effect.
                process_group=0,
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        temporary_of(self._run_dir.report, process.pid).unlink(missing_ok=True)
