"""Threads for the task's code. test_rollout.py tests how errors of a task end a rollout."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
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
        assert isinstance(outcome, ZeroDivisionError) if i % 7 == 0 else outcome == 1 // (i % 7)
    assert 1 <= len(hops) <= TASK_THREADS


async def run_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results or exceptions of the calls. A call that is never answered ends the test."""
    threads = TaskThreads()
    async with asyncio.timeout(30):
        return await asyncio.gather(*map(threads.run, calls), return_exceptions=True)


@pytest.mark.parametrize("error", [AssertionError("slip"), StopIteration(3), KeyError("x"), MemoryError()])
def test_an_exception_that_no_fence_took_is_raised_where_the_result_is_awaited(error: Exception) -> None:
    def slip() -> None:
        raise error

    failed, sound = asyncio.run(run_all([slip, lambda: 5]))
    assert sound == 5
    if isinstance(error, StopIteration):  # asyncio refuses it
        assert (type(failed), str(failed)) == (RuntimeError, "StopIteration(3)")
    else:
        assert failed is error


def test_a_thread_that_is_killed_answers_all_calls_that_it_took() -> None:
    """An exception that is set from outside may hit a thread anywhere, also between two calls."""

    def killed() -> int:
        kill = ctypes.pythonapi.PyThreadState_SetAsyncExc
        kill(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(KeyError))
        return 1

    first, second = asyncio.run(run_all([killed, lambda: 2]))
    assert first == 1 or isinstance(first, (RuntimeError, KeyError))
    assert second == 2 or isinstance(second, (RuntimeError, KeyError))


@pytest.mark.parametrize("working", [0, 1])
def test_a_system_without_room_for_a_thread_is_an_error_and_no_hang(
    monkeypatch: pytest.MonkeyPatch, working: int
) -> None:
    start, started = threading.Thread.start, [0]

    def refusing(thread: threading.Thread) -> None:
        if thread.name == "task":
            started[0] += 1
            if started[0] > working:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    outcomes = asyncio.run(run_all([lambda: time.sleep(0.03)] * 4))
    assert len(outcomes) == 4
    assert [outcome is None for outcome in outcomes].count(True) == working, "the thread that did start has answered"
    assert all(outcome is None or "can't start" in str(outcome) for outcome in outcomes)


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
