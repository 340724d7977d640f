"""What a worker process runs: it makes the task, and calls the envs that the run asks for, one call at a time.

    pipe ─▶ [Request, …] ─▶ OpenEnv ─▶ Answer ─▶ pipe          pixels: shared_pixels.py

The process is forked from a server that has imported this module and no user's code (`multiprocessing`'s forkserver),
so it starts in milliseconds, and has none of the run's threads, locks and GPU memory. It does nothing at the signals
that a terminal or a batch system sends to every process (`FOR_THE_RUN`): the run decides when its envs are closed. The
process ends when the run closes the pipe, or a few seconds after the run has died.
"""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, Literal

from vlmrl.config.task import TaskConfig
from vlmrl.errors import UserFault, describe, fenced, format_error
from vlmrl.orchestrator.envs.shared_pixels import SharedPixels, put_pixels
from vlmrl.rendering.images import ImageError
from vlmrl.tasks.base import StepInfo, Task
from vlmrl.tasks.border import TaskCodeError
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.open_env import OpenEnv, finished

FOR_THE_RUN = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
"""Signals that ask a run to stop. The server that workers are forked from is started with them blocked."""

ORPHAN_PATIENCE_S = 5.0
"""Seconds that a worker may live after its run has died, in which it closes its envs."""


@dataclass(frozen=True)
class Request:
    """A call of one env."""

    env: int
    """The env's number, which the run gives it."""
    method: Literal["reset", "step", "close"]
    problem: bytes = b""
    """The pickled problem, for `reset`."""
    text: str = ""
    """The completion, for `step`."""
    info: StepInfo | None = None
    """What `step` may know of it."""


@dataclass(frozen=True)
class Answer:
    """The outcome of a call: a value, a fault of the user's, or a bug of ours."""

    value: Any = None
    """The pickled messages or the pickled Reply, with `InShared` in place of pixels; None after `close`."""
    fault: tuple[type[UserFault], str, str | None] | None = None
    """Its type, text and traceback."""
    bug: str | None = None
    """The traceback."""
    seconds: float = 0.0
    """How long the call took in the worker."""


READY = "ready"
"""What a worker sends once it has made the task; any other text says why it could not."""


def work(pipe: connection.Connection, pixels: SharedPixels, config: TaskConfig, seed: int, log: Path | None) -> None:
    """Answer requests until the pipe is closed."""
    for number in FOR_THE_RUN:
        # A handler and not SIG_IGN, which programs that an env starts would inherit: terminate() would not end them.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_RUN)
    if log is not None:
        write_to(log)
    faulthandler.enable()
    threading.Thread(target=end_with_the_run, daemon=True).start()
    try:
        with fenced("making the task"):
            task = load_task(config, seed=seed)
    except UserFault as fault:
        pipe.send(fault.text)
        return
    pipe.send(READY)
    envs: dict[int, OpenEnv] = {}
    try:
        while True:
            requests = pipe.recv()
            pixels.clear()
            for request in requests:
                pipe.send(answer(task, envs, request, pixels))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the run has ended
        for env in envs.values():
            caught(lambda env=env: finished(env.close()))  # type: ignore[misc]


def answer(task: Task, envs: dict[int, OpenEnv], request: Request, pixels: SharedPixels) -> Answer:
    """Carry out one request."""
    started = time.monotonic()

    def call() -> Any:
        if request.method == "close":
            env = envs.pop(request.env, None)  # none where `task.env` raised
            return None if env is None else finished(env.close())
        if request.method == "reset":
            with fenced("the problem", TaskCodeError):
                problem = pickle.loads(request.problem)
            envs[request.env] = OpenEnv(task, problem)
            value: Any = finished(envs[request.env].reset())
        else:
            assert request.info is not None
            value = finished(envs[request.env].step(request.text, request.info))
        return pickle.dumps(put_pixels(value, pixels))

    outcome = caught(call)
    return Answer(outcome.value, outcome.fault, outcome.bug, time.monotonic() - started)


def caught(call: Callable[[], Any]) -> Answer:
    """What `call` returned or raised."""
    try:
        return Answer(value=call())
    except UserFault as fault:
        kind = type(fault) if isinstance(fault, TaskCodeError | ImageError) else TaskCodeError
        return Answer(fault=(kind, fault.text, fault.traceback))
    except Exception as error:  # noqa: BLE001 — the run raises it: no fence took it, so it is a bug of ours
        return Answer(bug=f"{describe(error)}\n{format_error(error)}")


def write_to(log: Path) -> None:
    """Let this process, and what it starts, write into a file: the screen is the run's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for screen in (1, 2):
        os.dup2(file, screen)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def end_with_the_run() -> None:
    """Wait until the run is gone; then end this process, also where an env hangs."""
    run = parent_process()
    assert run is not None
    connection.wait([run.sentinel])
    time.sleep(ORPHAN_PATIENCE_S)
    os._exit(1)
