"""Envs in threads: opened equals closed after every end of an episode, time limits, and coroutines."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.counted_envs import KINDS, counts
from support.played_envs import counted, play, played, runner_of
from vlmrl import StepInfo
from vlmrl.errors import EngineError, TaskError
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.task_threads import TASK_THREADS

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def no_warnings() -> Any:
    """A coroutine that is never awaited is a warning at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def env_threads(folder: Path, *kinds: str, timeout_s: float | None = None) -> ThreadEnvs:
    return ThreadEnvs(counted(folder, *kinds), timeout_s)


# ── opened equals closed ────────────────────────────────────────────────────────────────────────────────────


def test_opened_equals_closed_after_every_end_of_an_episode(tmp_path: Path) -> None:
    rollouts = play(env_threads(tmp_path), range(len(KINDS)))
    ends = dict(zip(KINDS, [rollout.stop_reason.value for rollout in rollouts[::2]], strict=True))
    assert ends == {
        "done": "terminated",
        "cut": "max_new_tokens",
        "full": "context_full",
        "max_turns": "max_turns",
        "raises": "task_error",
        "raises in reset": "task_error",
        "bad reward": "bad_reward",
        "bad image": "image_error",
        "async": "terminated",
        "async raises": "task_error",
    }
    opened, closed = counts(tmp_path)
    assert len(opened) == 2 * len(KINDS)
    assert closed == opened == Counter(dict.fromkeys(opened, 1))


def test_a_failing_engine_closes_the_envs_of_its_rollouts(tmp_path: Path) -> None:
    def fails(rollout_id: str, prompt: str) -> str:
        raise EngineError("HTTP 500") if rollout_id.endswith("/01") else AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        play(env_threads(tmp_path, "done", "async"), (0, 1), policy=fails)
    opened, closed = counts(tmp_path)
    assert len(opened) == 4
    assert closed == opened


def test_a_run_that_is_interrupted_closes_an_env_once_its_step_returns(tmp_path: Path) -> None:
    async def main() -> None:
        playing = asyncio.create_task(played(runner_of(env_threads(tmp_path, "slow", "async hangs")), (0, 1)))
        async with asyncio.timeout(30):
            while len(list(tmp_path.glob("stepping*"))) < 2:
                await asyncio.sleep(0.01)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing

    asyncio.run(main())
    opened, closed = counts(tmp_path)
    assert len(opened) == 4
    assert closed == opened


def test_a_close_that_fails_costs_nothing_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = counted(tmp_path, "done")
    make = task.env

    def env(problem: Any) -> Any:
        made = make(problem)
        made.close = lambda: 1 // 0  # type: ignore[method-assign, assignment]
        return made

    task.env = env  # type: ignore[method-assign]
    assert [rollout.reward for rollout in play(ThreadEnvs(task), [0])] == [1.0, 1.0]
    assert "close() raised ZeroDivisionError" in caplog.text


# ── what step is told ───────────────────────────────────────────────────────────────────────────────────────


def test_step_is_told_tokens_cut_and_turn(tmp_path: Path) -> None:
    task = counted(tmp_path, "done", "cut")
    made: list[Any] = []
    make = task.env
    task.env = lambda problem: made.append(make(problem)) or made[-1]  # type: ignore[method-assign, func-returns-value]
    play(ThreadEnvs(task), (0, 1), group_size=1)
    infos = {env.kind: env.infos for env in made}
    assert infos["done"] == [StepInfo(1, 4, is_cut=False), StepInfo(2, 4, is_cut=False)]  # three letters and the end
    assert infos["cut"] == [StepInfo(1, 8, is_cut=True)]


# ── time limits ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["hangs", "hangs in reset", "async hangs"])
def test_a_call_that_takes_too_long_ends_its_rollout_alone(tmp_path: Path, kind: str) -> None:
    rollouts = play(env_threads(tmp_path, "done", kind, timeout_s=0.3), (0, 0, 1, 0), group_size=1)
    ends = [rollout.stop_reason.value for rollout in rollouts]
    # The first two were taken by the thread whose next call hangs.
    assert ends == ["terminated", "terminated", "task_timeout", "terminated"]
    called = "reset()" if kind == "hangs in reset" else "step()"
    assert str(rollouts[2].error).startswith(f"{called} did not return within task.timeout_s=0.3, so")
    opened, closed = counts(tmp_path)
    hung = [name for name in opened if name.startswith(kind)]
    assert sorted(opened - closed) == ([] if kind == "async hangs" else hung), "it is closed when its call returns"


def test_a_call_that_waits_for_a_thread_is_not_late(tmp_path: Path) -> None:
    envs = env_threads(tmp_path, "slow in reset", timeout_s=0.9)

    async def main() -> Sequence[Any]:
        handles = [envs.new(envs.task.problem("train", 0)) for _ in range(3 * TASK_THREADS)]
        return await asyncio.gather(*(handle.reset() for handle in handles))

    assert len(asyncio.run(main())) == 3 * TASK_THREADS  # the last ones waited for a second


def test_a_run_whose_threads_are_all_lost_stops_with_the_remedy(tmp_path: Path) -> None:
    envs = env_threads(tmp_path, "hangs", "done", timeout_s=0.2)
    with pytest.raises(TaskError, match=r"32 calls .* within task.timeout_s, .* set task.workers=process"):
        play(envs, [0] * (TASK_THREADS + 8), group_size=1)


def test_a_thread_whose_call_returns_late_is_used_again(tmp_path: Path) -> None:
    envs = env_threads(tmp_path, "slow", timeout_s=0.1)

    async def main() -> list[str]:
        runner = runner_of(envs)
        ends = []
        for _ in range(2):  # each loses all threads for half a second
            groups = await played(runner, [0] * TASK_THREADS, group_size=1)
            ends += [rollout.stop_reason.value for group in groups for rollout in group.rollouts]
            while envs.threads._lost:
                await asyncio.sleep(0.02)
        return ends

    assert asyncio.run(main()) == ["task_timeout"] * 2 * TASK_THREADS
    opened, closed = counts(tmp_path)
    assert len(opened) == 2 * TASK_THREADS
    assert sum((closed - opened).values()) == 0


# ── where the time goes ─────────────────────────────────────────────────────────────────────────────────────


def test_the_time_of_calls_is_measured_apart_from_waiting(tmp_path: Path) -> None:
    rollouts = play(env_threads(tmp_path, "slow"), [0] * 2 * TASK_THREADS, group_size=1)
    times = [rollout.env_time for rollout in rollouts]
    assert {(time.resets, time.steps) for time in times} == {(1, 2)}
    assert all(1.0 <= time.step_s < 20 for time in times)
    waited = np.array([time.queue_s for time in times])
    assert waited.max() >= 0.4, "half of them waited for a thread"
