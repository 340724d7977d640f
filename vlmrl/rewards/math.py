"""`reward=math`: whether math-verify says that the answer equals the reference.

    attempt ─▶ a free worker process ─▶ 1.0 | 0.0 | None          worker dies or hangs ─▶ 0.0, counted, replaced

math-verify limits its own time with a signal, which works on a process's main thread alone and cannot interrupt sympy
in a long step such as `9**9**9`. Here each answer is compared in a worker process (`math_worker.py`) that can be
killed. A worker is a new Python without vlmrl and torch, never a fork of the run: a fork would keep the locks of the
run's threads, but not the threads. It starts in about half a second, and a number takes it about 4 ms of its time.

A worker sees no environment variables that look like secrets, has 2 GiB of memory, and ends when the run does: its
input is closed, and while it is busy, its timer ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vlmrl.config.reward import MathTerm
from vlmrl.config.secrets import is_secret_name, is_secret_value
from vlmrl.errors import UserFault, fenced
from vlmrl.rewards.base import Attempt, RewardError, RunBlocking, Score, Scored
from vlmrl.rewards.references import references_of
from vlmrl.rewards.slots import Slots

PROGRAM = Path(__file__).with_name("math_worker.py")

LONGEST_ANSWER = 10_000
"""Characters of an answer that are compared, from its end. math-verify's patterns take quadratic time."""

START_TIMEOUT_S = 120.0
"""Seconds for a worker to start: half a second, and more on a machine whose disk is cold or whose cores are busy."""

SLOWEST = 5.0
"""Wall-clock time over processor time of a worker on a busy machine. A worker that takes longer is ended too."""

GRACE_S = 2.0
"""Seconds that are added to that time, and seconds after which a worker that its timers did not end is killed from
outside: a stopped process receives no signal but SIGKILL."""


TIMERS = (signal.SIGPROF, signal.SIGALRM)
"""What ends a worker that takes too long."""


class WorkerDiedError(Exception):
    """The worker ended without a reply."""

    def __init__(self, *, is_timeout: bool) -> None:
        super().__init__()
        self.is_timeout = is_timeout


class MathReward:
    """The reward term, with a pool of workers that start when they are needed."""

    def __init__(self, term: MathTerm, run_blocking: RunBlocking) -> None:
        self._term = term
        self._run_blocking = run_blocking
        self._idle: list[_Worker] = []
        self._slots = Slots(term.workers)
        weakref.finalize(self, _end_all, self._idle)

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        """1.0 or 0.0 per attempt; None, so the term abstains, where no reference can be read."""
        return await asyncio.gather(*(self._score(attempt) for attempt in attempts))

    async def _score(self, attempt: Attempt) -> Score:
        references = [text for text in references_of(attempt) if text.strip()]
        if not references:
            return None
        if attempt.answer is None:
            return Scored(0.0, _metrics())
        answer = attempt.answer[-LONGEST_ANSWER:]
        async with self._slots.mine():
            return await self._run_blocking(lambda: self._compare(references, answer))

    def _compare(self, references: list[str], answer: str) -> Score:
        """Runs in a thread; at most `workers` at a time. List operations are atomic, so `_idle` needs no lock."""
        try:
            with fenced("the math worker", RewardError):
                worker = self._idle.pop() if self._idle else _Worker()
        except UserFault as fault:
            return fault
        try:
            value = worker.ask(references, answer, self._term.timeout_s)
        except WorkerDiedError as death:
            return Scored(0.0, _metrics(death))
        self._idle.append(worker)
        return Scored(value, _metrics())


def _metrics(death: WorkerDiedError | None = None) -> Mapping[str, float]:
    """The shares of answers that took too long, and that ended their worker in another way."""
    return {
        "timeouts": float(death is not None and death.is_timeout),
        "crashes": float(death is not None and not death.is_timeout),
    }


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


class _Worker:
    """One worker process. Raises RuntimeError where it does not start."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: the folder of the program, with files such as math.py and number.py, is no place to import from
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not is_secret_name(k) and not is_secret_value(v)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        if self._reply(time.monotonic() + START_TIMEOUT_S) != b"ready\n":
            self._process.kill()
            words = self._stderr.read().decode(errors="replace").strip()
            self.end()
            raise RuntimeError(f"did not start: {words.splitlines()[-1] if words else 'it printed nothing'}")

    def ask(self, references: list[str], answer: str, timeout_s: float) -> float | None:
        """Raises `WorkerDiedError`; the worker has then ended."""
        seconds = SLOWEST * timeout_s + GRACE_S
        deadline = time.monotonic() + seconds + GRACE_S
        with suppress(BrokenPipeError):
            self._stdin.write(json.dumps([timeout_s, seconds, references, answer]).encode() + b"\n")
            self._stdin.flush()
        reply = self._reply(deadline)
        if not reply.endswith(b"\n"):
            is_late = time.monotonic() >= deadline
            self.end()
            raise WorkerDiedError(is_timeout=is_late or -self._process.returncode in TIMERS)
        value = json.loads(reply)
        return None if value is None else float(value)

    def end(self) -> None:
        """End the process and release its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._stdin, self._stdout, self._stderr):
            with suppress(BrokenPipeError):  # closing flushes what the dead process has not read
                pipe.close()

    def _reply(self, deadline: float) -> bytes:
        """One line; without its end where the worker died or the deadline passed."""
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    break
                if not (read := os.read(self._stdout.fileno(), 4096)):
                    break
                line += read
        return line
