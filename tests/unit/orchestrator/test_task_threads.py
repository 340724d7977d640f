"""Threads for the task's code. test_rollout.py tests how errors of a task end a rollout."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from vlmrl.orchestrator.task_threads import TASK_THREADS, TaskThreads


def test_many_calls_of_one_round_share_few_threads_and_get_their_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    start, hops = threading.Thread.start, list[str]()

    def counting(thread: threading.Thread) -> None:
        hops.append(thread.name)
        start(thread)

    async def main() -> list[Any]:
        threads = TaskThreads()
        calls = [threads.run(lambda i=i: 1 // (i % 7)) for i in range(1000)]  # type: ignore[misc]
        return await asyncio.gather(*calls, return_exceptions=True)

    monkeypatch.setattr(threading.Thread, "start", counting)
    for i, outcome in enumerate(asyncio.run(main())):
        assert "ZeroDivisionError" in str(outcome) if i % 7 == 0 else outcome == 1 // (i % 7)
    assert 1 <= len(hops) <= TASK_THREADS


def test_code_that_hangs_keeps_no_process() -> None:
    """A hanging task must not keep an interrupted run from ending."""
    code = """
import asyncio, time
from vlmrl.orchestrator.task_threads import TaskThreads

async def main():
    TaskThreads().run(lambda: time.sleep(60))
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=50)
    assert ended.stderr == b""
    assert time.monotonic() - started < 50
