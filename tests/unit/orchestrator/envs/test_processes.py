"""Envs in worker processes: the same rollouts as in threads, crashes, hanging workers, and how they end."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.counted_envs import KINDS, counts
from support.lockstep import Policy
from support.played_envs import answer, config_of, counted, play, played, runner_of
from vlmrl import Image, ImportedTaskConfig, Message, Reply, Video
from vlmrl.errors import TaskError
from vlmrl.orchestrator.envs import shared_pixels
from vlmrl.orchestrator.envs import worker as worker_module
from vlmrl.orchestrator.envs.processes import ProcessEnvs
from vlmrl.orchestrator.envs.shared_pixels import SharedPixels, put_pixels, take_pixels
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.envs.worker_program import FOR_THE_RUN
from vlmrl.rendering.images import VideoError
from vlmrl.types import Group, Rollout, StopReason


def env_processes(folder: Path, *kinds: str, workers: int = 2, **settings: Any) -> ProcessEnvs:
    config = config_of(folder, *kinds, num_workers=workers, **settings)
    return ProcessEnvs(config, counted(folder, *kinds), seed=0, logs=folder.with_name("logs"))


def played_in(
    envs: ProcessEnvs, problems: Sequence[int], group_size: int = 1, policy: Policy = answer
) -> list[Rollout]:
    async def main() -> list[Group]:
        try:
            return await played(runner_of(envs, policy), problems, group_size)
        finally:
            await envs.stop()

    return [rollout for group in asyncio.run(main()) for rollout in group.rollouts]


def content(rollouts: Sequence[Rollout]) -> list[Any]:
    """What a rollout recorded, apart from times, and the place of an error in a traceback."""
    return [
        (
            rollout.rollout_id,
            rollout.stop_reason,
            rollout.error,
            rollout.reward,
            [(turn.prompt.token_ids.tolist(), [image.hash for image in turn.prompt.images]) for turn in rollout.turns],
        )
        for rollout in rollouts
    ]


def test_rollouts_are_those_of_threads_and_every_env_is_closed_once(tmp_path: Path) -> None:
    in_threads, in_processes = tmp_path / "threads", tmp_path / "processes"
    for folder in (in_threads, in_processes):
        folder.mkdir()
    expected = play(ThreadEnvs(counted(in_threads)), range(len(KINDS)))
    found = played_in(env_processes(in_processes), range(len(KINDS)), group_size=2)
    assert content(found) == content(expected)
    opened, closed = counts(in_processes)
    assert len(opened) == 2 * len(KINDS)
    assert closed == opened == Counter(dict.fromkeys(opened, 1))
    assert len({name.split("-")[1] for name in opened} - {str(os.getpid())}) == 2, "both workers had envs"


# ── crashes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "how"), [("exits", "exit code 7"), ("crashes", "SIGSEGV")])
def test_a_crash_in_one_of_288_costs_its_rollout_and_no_more(tmp_path: Path, kind: str, how: str) -> None:
    rollouts = played_in(env_processes(tmp_path, "done", kind), [0] * 143 + [1] + [0] * 144)
    crashed = rollouts.pop(143)
    assert crashed.stop_reason is StopReason.TASK_ERROR
    log = tmp_path.with_name("logs")
    assert str(crashed.error).startswith(f"its worker process ended in step(), with {how}; {log}/env_worker_0")
    assert {rollout.stop_reason for rollout in rollouts} == {StopReason.TERMINATED}
    assert {rollout.reward for rollout in rollouts} == {1.0}
    assert {len(rollout.turns) for rollout in rollouts} == {2}
    assert {rollout.replayed for rollout in rollouts} == {0, 1}, "those of the other worker went on"
    opened, closed = counts(tmp_path)
    died = next(name for name in opened if name.startswith(kind)).split("-")[1]
    assert {name.split("-")[1] for name in opened - closed} == {died}, "all envs but those of the dead process"


def test_many_crashes_cost_their_rollouts_alone(tmp_path: Path) -> None:
    rollouts = played_in(env_processes(tmp_path, "done", "exits", workers=1), [0, 1, 1, 0, 1, 1, 1, 0])
    ends = [rollout.stop_reason.value for rollout in rollouts]
    assert ends == ["task_error" if index in (1, 2, 4, 5, 6) else "terminated" for index in range(8)]


def test_a_process_that_dies_between_two_calls_costs_the_env_that_it_called_last(tmp_path: Path) -> None:
    envs = env_processes(tmp_path, "done", workers=1)
    killed: list[int] = []

    def policy(rollout_id: str, prompt: str) -> str:
        if "and now?" in prompt and not killed:  # the first turn is over, and the second has not reached the env
            (worker,) = envs._workers
            assert worker._process is not None
            assert worker._process.pid is not None
            killed.append(worker._process.pid)
            os.kill(worker._process.pid, signal.SIGKILL)
            worker._process.join()
        return "yes"

    rollouts = played_in(envs, [0, 0, 0], policy=policy)
    assert sorted(rollout.stop_reason.value for rollout in rollouts) == ["task_error", "terminated", "terminated"]
    (lost,) = (rollout for rollout in rollouts if rollout.stop_reason is StopReason.TASK_ERROR)
    assert str(lost.error).startswith("its worker process ended after its call, with SIGKILL")


# ── time limits ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    rollouts = played_in(env_processes(tmp_path, "done", "hangs", workers=1, timeout_s=1.0), [0, 1, 0, 1, 0])
    assert [rollout.stop_reason.value for rollout in rollouts] == [
        "terminated",
        "task_timeout",
        "terminated",
        "task_timeout",
        "terminated",
    ]
    assert str(rollouts[1].error).startswith("step() did not return within task.timeout_s=1, so")


def test_an_interrupted_run_ends_although_a_worker_hangs(tmp_path: Path) -> None:
    async def main() -> float:
        envs = env_processes(tmp_path, "hangs in reset", workers=1)
        playing = asyncio.create_task(played(runner_of(envs), [0], 1))
        async with asyncio.timeout(60):
            while not list(tmp_path.glob("opened*")):
                await asyncio.sleep(0.02)
        playing.cancel()
        started = time.monotonic()
        await asyncio.gather(playing, return_exceptions=True)
        await envs.stop()
        return time.monotonic() - started

    assert asyncio.run(main()) < 40


def test_signals_to_every_process_leave_the_workers_and_their_server_alive(tmp_path: Path) -> None:
    envs = env_processes(tmp_path, "done")
    reached: list[int] = []

    def policy(rollout_id: str, prompt: str) -> str:
        processes = [worker._process for worker in envs._workers]
        started = [process.pid for process in processes if process is not None and process.pid is not None]
        if "and now?" in prompt and not reached and len(started) == 2:  # on a busy machine, one starts later
            reached.extend(started)
            reached.append(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
            for number in FOR_THE_RUN:
                for pid in reached:
                    os.kill(pid, number)
                for pid in started:
                    wait_until_handled(pid)
            time.sleep(0.2)  # time to die
        return "yes"

    rollouts = played_in(envs, [0, 0, 0], policy=policy)
    assert len(reached) == 3
    assert [(rollout.stop_reason.value, rollout.replayed) for rollout in rollouts] == [("terminated", 0)] * 3


def wait_until_handled(pid: int) -> None:
    """Wait until a process has no signal before it. Handlers run on faulthandler's stack, on which five do not fit at
    once where the processor's registers are large."""
    deadline = time.monotonic() + 30
    while any(int(mask, 16) for mask in re.findall(r"^S\w+Pnd:\s*(\w+)$", status(pid), re.MULTILINE)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def status(pid: int) -> str:
    """What the kernel tells about a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_bug_in_the_thread_of_a_worker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "take_pixels", lambda value, shared: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        played_in(env_processes(tmp_path, "done"), [0, 0])


# ── workers that cannot start, problems that cannot be sent ─────────────────────────────────────────────────


def test_a_worker_that_cannot_make_the_task_ends_the_run(tmp_path: Path) -> None:
    envs = env_processes(tmp_path, "done")
    envs._config = ImportedTaskConfig(target=envs._config.target, num_workers=1)
    with pytest.raises(TaskError, match=r"could not make the task, .* KeyError: 'events' .* set task.workers=thread"):
        played_in(envs, [0])


def test_a_problem_that_cannot_be_pickled_is_a_fault_with_words(tmp_path: Path) -> None:
    envs = env_processes(tmp_path, "done")
    problem = envs.task.problem
    envs.task.problem = lambda split, index: Unpicklable(problem(split, index).id)  # type: ignore[method-assign]
    (rollout,) = played_in(envs, [0])
    assert rollout.stop_reason is StopReason.TASK_ERROR
    assert "task.workers=process hands the problem to a worker process: pickle.dumps(problem) raised" in str(
        rollout.error
    )


class Unpicklable:
    def __init__(self, name: str) -> None:
        self.id = name
        self.draw = lambda: None


def test_workers_close_their_envs_and_end_when_the_run_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, signal
from pathlib import Path
from support.played_envs import config_of, counted
from vlmrl.orchestrator.envs.processes import ProcessEnvs

async def main():
    events = Path({str(tmp_path)!r})
    envs = ProcessEnvs(config_of(events, "done", num_workers=1), counted(events, "done"), seed=0)
    await envs.new(envs.task.problem("train", 0)).reset()
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""
    script = tmp_path.with_name("script.py")
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": path}, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while (found := counts(tmp_path))[0] != found[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (name,) = found[0]
    while Path(f"/proc/{name.split('-')[1]}/cmdline").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ── pixels ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_pixels_keep_their_bytes_whatever_the_order_and_the_size() -> None:
    theirs = SharedPixels()
    ours = SharedPixels(os.dup(theirs._fd))
    random = np.random.default_rng(0)
    for _ in range(3):
        theirs.clear()
        shown = [random.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((3, 5), (700, 900), (1, 1), (64, 64))]
        message = Message.of("user", "see", *map(Image, shown), Image(b"PNG"), Image("a.png"))
        sent = [
            put_pixels(value, theirs)
            for value in ((message,), Reply(messages=(message,)), Reply(messages=(message,), history=(message,)))
        ]
        first, reply, over = [take_pixels(value, ours) for value in sent]
        for found in (first[0], reply.messages[0], over.messages[0], over.history[0]):
            sources = [part.source for part in found.content if isinstance(part, Image)]
            assert all(np.array_equal(a, b) for a, b in zip(sources[:4], shown, strict=True))
            assert sources[4:] == [b"PNG", "a.png"]
    ours.close()
    theirs.close()


def test_videos_keep_their_frames_rate_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SharedPixels()
    ours = SharedPixels(os.dup(theirs._fd))
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), np.uint8)
    backwards = frames[::-1]
    message = Message.of(
        "user",
        *(Video(frames, fps=2.0), Image(frames[0]), Video(backwards, times=(0.0, 1.0, 1.5, 2.0, 9.0))),
        *("?", Video(list(frames[:2])), Video("a.mp4"), Video(b"MP4")),
    )
    for _ in range(2):
        theirs.clear()
        (found,) = take_pixels(pickle.loads(pickle.dumps(put_pixels((message,), theirs))), ours)
        first, picture, second, _, short, *files = found.content
        assert np.array_equal(first.source, frames)
        assert np.array_equal(picture.source, frames[0])
        assert np.array_equal(second.source, backwards)
        assert np.array_equal(short.source, frames[:2])
        assert (first.fps, first.times, second.fps, second.times) == (2.0, None, None, (0.0, 1.0, 1.5, 2.0, 9.0))
        assert [part.source for part in files] == ["a.mp4", b"MP4"]
    monkeypatch.setattr(shared_pixels, "MAX_VIDEO_BYTES", frames.nbytes - 1)
    with pytest.raises(VideoError, match="too many to hand over from a worker process"):
        put_pixels((message,), theirs)
    with pytest.raises(VideoError, match="not int"):
        put_pixels((Message.of("user", Video(3)),), theirs)
    ours.close()
    theirs.close()
