"""One worker process, and the thread of the run that talks to it.

    event loop ─▶ Worker.begin ─▶ queue ─▶ thread ── [Request, …] ─▶ process
         ◀── future ────────────────────── thread ◀── Answer, … ─────┘

The thread may block on anything: a full pipe, a slow env, the start of a process. It sends what has been queued in
batches and hands each answer on when it comes. A process runs one call at a time, so where it ends or hangs, the call
that it was running is known. That rollout is charged (`TaskCodeError`, `TaskTimeoutError`). The process is replaced,
and the rollouts whose envs were in it are played again (`EnvLostError`); calls that had not begun go to the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vlmrl.config.task import TaskConfig
from vlmrl.errors import TaskError
from vlmrl.orchestrator.envs.base import CLOSE_PATIENCE_S, EnvLostError, timed_out
from vlmrl.orchestrator.envs.shared_pixels import SharedPixels, take_pixels
from vlmrl.orchestrator.envs.worker_program import FOR_THE_RUN, READY, Answer, Request, work
from vlmrl.tasks.border import TaskCodeError

START_TIMEOUT_S = 300.0
"""Seconds for a worker to make its task: it imports the task's modules, on a machine whose cores may be busy."""

BATCH = 16
"""Most requests that are sent at once; the pixels of so many answers are in shared memory at the same time."""


@dataclass(eq=False)
class WorkerCall:
    """A call of an env in a worker."""

    request: Request
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    queued: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when it was made."""
    waited: float = 0.0
    """Seconds that it took beyond its time in the worker."""
    seconds: float = 0.0
    """Seconds that it took in the worker."""
    is_abandoned: bool = False
    """Whether its rollout has ended, so that it need not begin any more."""


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a task has in common."""

    context: ForkServerContext
    config: TaskConfig
    seed: int
    log: Path | None
    """The file of what the task prints; None for the streams of the run."""


class Worker:
    """A worker process, which is started when it is needed and replaced when it ends or hangs."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.num_open = 0
        """Envs that were placed here and have not ended."""
        self._settings = settings
        self._pixels = SharedPixels()
        self._queue: queue.SimpleQueue[WorkerCall | None] = queue.SimpleQueue()
        self._process: BaseProcess | None = None
        self._pipe: connection.Connection | None = None
        self._envs: set[int] = set()  # those that the process holds
        self._charged: dict[int, str] = {}  # an env → why the process ended after its last call
        self._last = -1  # the env that was called last
        self._is_over = False
        self._sent: Sequence[WorkerCall] = ()  # the last batch
        self._thread = threading.Thread(target=self._serve, name="env worker", daemon=True)
        self._thread.start()

    def begin(self, request: Request) -> WorkerCall:
        """Queue a call. Its future raises as `EnvHandle` does."""
        loop = asyncio.get_running_loop()
        call = WorkerCall(request, loop.create_future(), loop)
        self._queue.put(call)
        return call

    def stop(self) -> None:
        """Let the process close its envs and end. Kill it where that takes longer than `CLOSE_PATIENCE_S`. Blocks."""
        self._queue.put(None)
        self._thread.join(CLOSE_PATIENCE_S)
        if self._thread.is_alive():
            self.kill()
            self._thread.join()

    def kill(self) -> None:
        """End the process now, and start no other."""
        self._is_over = True
        if (process := self._process) is not None:
            process.kill()

    def _serve(self) -> None:
        """Work until `stop`. A bug of ours becomes the outcome of every call, so it ends the run."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 — raised where the calls are awaited
            self.kill()
            for each in self._sent:
                answer(each, error)
            while (call := self._queue.get()) is not None:
                answer(call, error)

    def _work(self) -> None:
        """Send what is queued and hand on the answers, until `stop`."""
        left: list[WorkerCall] = []  # calls that the last process had not begun
        while True:
            batch = left or self._queued()
            if batch is None:
                break
            self._sent = batch
            self._notice_death()
            due = [call for call in batch if self._is_due(call)]
            left = self._exchange(due) if due else []
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join()
        self._pixels.close()

    def _queued(self) -> list[WorkerCall] | None:
        """Wait for a call, and take those behind it, too. None at the end."""
        batch: list[WorkerCall] = []
        call = self._queue.get()
        while call is not None:
            batch.append(call)
            if len(batch) == BATCH or self._queue.empty():
                return batch
            call = self._queue.get()
        self._queue.put(None)
        return batch or None

    def _notice_death(self) -> None:
        """Where the process ended between two calls, charge the env that it called last."""
        if self._process is not None and not self._process.is_alive():
            if self._last in self._envs:
                self._charged[self._last] = f"its worker process ended after its call, with {self._end_of_process()}"
            self._lose()

    def _is_due(self, call: WorkerCall) -> bool:
        """Whether the process can carry out a call; if not, it is answered here."""
        number = call.request.env
        why = self._charged.pop(number, None)
        if call.request.method == "reset":
            if call.is_abandoned:
                answer(call, EnvLostError("the rollout has ended"))
            return not call.is_abandoned
        if number in self._envs:
            return True
        if call.request.method == "close":  # it was lost with its process, or never made
            answer(call, None)
        else:
            answer(call, EnvLostError("its worker process was replaced") if why is None else TaskCodeError(why))
        return False

    def _exchange(self, calls: Sequence[WorkerCall]) -> list[WorkerCall]:
        """Send calls to the process and answer them. Returns those that must be sent again, because the process ended
        before it came to them."""
        try:
            self._start()
        except (TaskError, EnvLostError) as error:
            for call in calls:
                answer(call, error)
            return []
        assert self._pipe is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # noticed when its answer does not come
            self._pipe.send([call.request for call in calls])
        for position, call in enumerate(calls):
            number, method = call.request.env, call.request.method
            self._last = number
            if method == "reset":
                self._envs.add(number)
            try:
                found = self._answer_to(method)
            except TaskCodeError as fault:
                self._lose()
                answer(call, fault)
                return list(calls[position + 1 :])
            if method == "close":
                self._envs.discard(number)
            self._hand_on(call, found)
        return []

    def _answer_to(self, method: str) -> Answer:
        """Wait for the answer to a call. Raises `TaskCodeError` where the process ends or hangs; it has then ended."""
        assert self._process is not None
        assert self._pipe is not None
        limit = self._settings.config.timeout_s
        try:
            if not self._pipe.poll(limit):
                assert limit is not None
                self._process.kill()
                raise timed_out(f"{method}()", limit)
            found: Answer = self._pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise TaskCodeError(f"its worker process ended in {method}(), with {self._end_of_process()}") from None
        return found

    def _hand_on(self, call: WorkerCall, found: Answer) -> None:
        call.seconds = found.seconds
        call.waited = time.monotonic() - call.queued - found.seconds
        if found.bug is not None:
            answer(call, RuntimeError(f"in a worker process: {found.bug}"))
        elif found.fault is not None:
            kind, text, traceback = found.fault
            answer(call, kind(text, traceback))
        else:
            answer(call, None if found.value is None else take_pixels(pickle.loads(found.value), self._pixels))

    def _lose(self) -> None:
        """Forget the process, which has ended, and its envs."""
        self._envs.clear()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _end_of_process(self) -> str:
        """How the process ended, in words."""
        assert self._process is not None
        self._process.join()
        code, log = self._process.exitcode or 0, self._settings.log
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return how + ("" if log is None else f"; {log} has its last words")

    def _start(self) -> None:
        """Start a process unless one is running. Raises `TaskError` where it cannot make the task."""
        if self._is_over:
            raise EnvLostError("the run has ended")
        if self._process is not None:
            return
        settings = self._settings
        self._pipe, theirs = settings.context.Pipe()
        arguments = (theirs, self._pixels, settings.config, settings.seed, settings.log)
        self._process = settings.context.Process(target=work, args=arguments, name="vlmrl env worker")
        try:
            resource_tracker.ensure_running()  # it unblocks SIGINT and SIGTERM when it starts
            with blocked(FOR_THE_RUN):
                self._process.start()
        except OSError as error:
            self._process = None
            raise TaskError(
                f"task.workers=process: a worker process could not be started ({error}), so no env can be played: "
                "free memory and processes, or set task.num_workers to a lower number"
            ) from error
        theirs.close()
        why = f"it was not ready within {START_TIMEOUT_S:g} s"
        try:
            if self._pipe.poll(START_TIMEOUT_S):
                why = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            why = f"it ended with {self._end_of_process()}"
        if why != READY:
            self._process.kill()
            self._lose()
            raise TaskError(
                f"task.workers=process: a worker process could not make the task, so no env can be played: {why}: "
                "correct it, or set task.workers=thread"
            )


@contextlib.contextmanager
def blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread, and in a process that it starts in the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def answer(call: WorkerCall, outcome: Any) -> None:
    """Set the future of a call, from any thread."""

    def deliver() -> None:
        if call.future.done():
            return
        if isinstance(outcome, Exception):
            call.future.set_exception(outcome)
        else:
            call.future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # the event loop is closed: the run has ended
        call.loop.call_soon_threadsafe(deliver)
