"""`python -m vlmrl`, and the command `vlmrl`."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

from vlmrl.cli.main import main

EXIT_PATIENCE_S = 10.0
"""Seconds that threads of a task may take to end after the run has ended."""


def run() -> NoReturn:
    """Run the command and end the process with its exit code, also if a task's code has left threads that never end:
    Python itself would wait for them."""
    code = main()
    left = [
        thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
    if left:
        threading.Thread(target=_end, args=(code, left), daemon=True).start()
    sys.exit(code)


def _end(code: int, left: list[str]) -> None:
    time.sleep(EXIT_PATIENCE_S)
    names = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
    print(
        f"warning: {len(left)} threads of the task's code have not ended ({names}), so the process ends without them",
        file=sys.stderr,
        flush=True,
    )
    os._exit(code)


if __name__ == "__main__":
    run()
