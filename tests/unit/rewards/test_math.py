"""The reward of mathematics: math-verify's own verdicts, and workers that hang, die and outlive nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import psutil
import pytest

from support.reward_cases import attempt, attempt_of, cases
from vlmrl.config.reward import MathTerm
from vlmrl.rewards.base import Score, Scored
from vlmrl.rewards.math import MathReward
from vlmrl.rewards.math_worker import delimited

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Awaitable[T]:
    return asyncio.to_thread(call)


def values(scores: list[Score]) -> list[float | None]:
    return [score.value if isinstance(score, Scored) else score for score in scores]  # type: ignore[misc]


def score(reward: MathReward, *pairs: tuple[Any, str | None]) -> list[Score]:
    return list(asyncio.run(reward.score([attempt(reference, answer) for reference, answer in pairs])))


def worker_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "math_worker" in " ".join(each.cmdline())]


@pytest.fixture
def reward() -> Iterator[MathReward]:
    made = MathReward(MathTerm(timeout_s=2.0, workers=1), in_thread)
    yield made
    del made
    gc.collect()


def test_table() -> None:
    table = cases("math")
    reward = MathReward(MathTerm(timeout_s=60.0), in_thread)
    found = values(list(asyncio.run(reward.score([attempt_of(case) for case in table]))))
    assert [(case, value) for case, value in zip(table, found, strict=True) if value != case["expected"]] == []


def test_table_is_what_the_library_says() -> None:
    """The library is called directly, in this process, on the texts as `delimited` hands them over."""
    import math_verify

    for case in cases("math"):
        if isinstance(case["reference"], str) and case["expected"] is not None:
            wanted, found = (math_verify.parse(delimited(text)) for text in (case["reference"], case["answer"]))
            assert float(math_verify.verify(wanted, found)) == case["expected"], case


def test_a_long_computation_is_killed_and_the_next_answer_checked(reward: MathReward) -> None:
    began = time.monotonic()
    scores = score(reward, ("7", BOMB), ("7", "7"), ("7", "9**9**9"), ("7", "8"))
    assert values(scores) == [0.0, 1.0, 0.0, 0.0]
    assert [each.metrics["timeouts"] for each in scores if isinstance(each, Scored)] == [1.0, 0.0, 0.0, 0.0]
    assert time.monotonic() - began < 60


BOMB = "$9^{9^{9}}$"
"""Never ends where it is compared with a number."""

SLOW = "7 " * 5 + "$" + "(" * 40 + "x" + "+1)^{99}" * 40 + "$"


def test_a_timeout_is_counted_and_bounded() -> None:
    reward = MathReward(MathTerm(timeout_s=0.3, workers=1), in_thread)
    score(reward, ("7", "7"))  # the worker has started
    began = time.monotonic()
    (late,) = score(reward, (SLOW, SLOW))
    assert late == Scored(0.0, {"timeouts": 1.0, "crashes": 0.0})
    assert time.monotonic() - began < 60
    assert values(score(reward, ("7", "7"))) == [1.0]


def test_a_stopped_worker_is_killed_from_outside() -> None:
    reward = MathReward(MathTerm(timeout_s=0.3, workers=1), in_thread)
    score(reward, ("7", "7"))
    (worker,) = worker_processes()
    worker.suspend()
    assert score(reward, ("7", "7")) == [Scored(0.0, {"timeouts": 1.0, "crashes": 0.0})]
    assert values(score(reward, ("7", "7"))) == [1.0]


def test_a_worker_that_dies_costs_one_answer(reward: MathReward) -> None:
    score(reward, ("7", "7"))
    (worker,) = worker_processes()
    worker.kill()
    worker.wait(10)
    assert score(reward, ("7", "7")) == [Scored(0.0, {"timeouts": 0.0, "crashes": 1.0})]
    assert values(score(reward, ("7", "7"))) == [1.0]


def test_memory_is_bounded(reward: MathReward) -> None:
    score(reward, ("7", "7"))
    (worker,) = worker_processes()
    soft, hard = worker.rlimit(psutil.RLIMIT_AS)
    assert soft == hard == 2 * 2**30


def test_workers_start_when_needed_and_end_with_the_reward() -> None:
    reward = MathReward(MathTerm(workers=2), in_thread)
    assert worker_processes() == []
    assert values(score(reward, *[("1/2", "0.5")] * 10)) == [1.0] * 10
    workers = worker_processes()
    assert 1 <= len(workers) <= 2
    del reward
    gc.collect()
    assert worker_processes() == []


def test_a_worker_is_a_clean_interpreter(reward: MathReward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "hunter2")
    monkeypatch.setenv("HARMLESS", "1")
    score(reward, ("7", "7"))
    (worker,) = worker_processes()
    assert not any("torch" in each.path for each in worker.memory_maps())
    assert "JUDGE_API_KEY" not in worker.environ()
    assert worker.environ()["HARMLESS"] == "1"


PARENT = """
import asyncio, sys, time
from support.reward_cases import attempt
from vlmrl.config.reward import MathTerm
from vlmrl.rewards.math import MathReward
reward = MathReward(MathTerm(timeout_s=1, workers=2), asyncio.to_thread)
async def main():
    await reward.score([attempt("7", "7")])
    busy = asyncio.ensure_future(reward.score([attempt("7", sys.argv[1])] * 2))
    await asyncio.sleep(0.3)
    print("busy", flush=True)
    await busy
asyncio.run(main())
"""


def test_nothing_outlives_a_run_that_is_killed() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", PARENT, BOMB], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        workers = psutil.Process(parent.pid).children()
        assert workers
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def test_the_event_loop_goes_on_meanwhile(reward: MathReward) -> None:
    async def count_while_scoring() -> int:
        ticks = 0
        scoring = asyncio.ensure_future(reward.score([attempt(SLOW, SLOW)]))
        while not scoring.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(count_while_scoring()) > 50


def test_long_and_odd_answers() -> None:
    reward = MathReward(MathTerm(timeout_s=0.3), in_thread)
    odd = ["x" * 10**6, "\ud800", "\x00", "$" * 1000, "\\frac{" * 3000, "(" * 5000, "\n" * 1000, "{" * 9999, "7\n7"]
    assert set(values(score(reward, *[("7", text) for text in odd]))) <= {0.0, 1.0}


def test_a_worker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("sys.executable", "/bin/false")
    reward = MathReward(MathTerm(), in_thread)
    (fault,) = score(reward, ("7", "7"))
    assert "did not start" in str(fault)
