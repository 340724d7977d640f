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
    read_names_as_utf8()
    code = main()
    left = [
        thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
    if left:
        threading.Thread(target=_end, args=(code, left), daemon=True).start()
    sys.exit(code)


def read_names_as_utf8() -> None:
    """Start this command again, in the same process, in Python's UTF-8 mode where the locale has another encoding.

    In such a locale (`LC_ALL=C PYTHONUTF8=0`) Python cannot name a file whose name has a letter outside of the locale,
    and hands such an argument over as code points that no file can hold. The screen keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":  # 1: started again already
        return
    arguments = sys.orig_argv[1:]
    if sys.argv[1:] != arguments[len(arguments) - len(sys.argv) + 1 :]:  # it was not started by a command line
        arguments = ["-m", "vlmrl", *sys.argv[1:]]
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:replace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *arguments])


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
