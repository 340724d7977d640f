"""Runs at the start of every process of a vLLM server, however vLLM starts it (spawn, fork, subprocess).

Two processes need the repairs of `broken_wheels`: the engine, which multiprocessing spawns, and the process in which
vLLM inspects a model's class. And every process ends itself when both supervisors (supervisor.py) have been killed: it
waits, in a thread, for the lock that they hold. Imports nothing heavy.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import sys
import threading
from importlib.machinery import PathFinder
from pathlib import Path

from vlmrl.models import broken_wheels

broken_wheels.install()


def _die_with(lock: str) -> None:
    """Kill this process when nobody holds the lock file any more, or when the file is gone."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # blocks as long as a supervisor lives
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_in_thread(lock: str) -> None:
    threading.Thread(target=_die_with, args=(lock,), name="dies-with-supervisor", daemon=True).start()


_lock = os.environ.get("VLMRL_SERVER_LOCK", "")  # LOCK_VARIABLE of supervisor.py, whose import would take a moment
# The resource tracker ends by itself after the others, and removes their semaphores before that. And the supervisors
# must not wait for their own lock.
_exempt = ("multiprocessing.resource_tracker", "vlmrl.inference.vllm.in_server.supervisor")
if _lock and not any(name in word for word in sys.orig_argv[:5] for name in _exempt):
    _wait_in_thread(_lock)
    os.register_at_fork(after_in_child=lambda: _wait_in_thread(_lock))

# Python imports only the first sitecustomize that it finds. Run the one that it would have found without this folder.
_here = Path(__file__).parent
_spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path).resolve() != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
