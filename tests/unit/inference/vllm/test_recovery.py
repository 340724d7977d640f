"""Servers that die, hang or are slow, with real processes and sockets; a small program stands in for vLLM.

test_engine.py and tests/e2e/test_vllm_runs.py have the same with vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.stand_in import HANGS_AFTER_S, Rig, make_rig, tree
from vlmrl.errors import EngineError, EngineLostError


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(in_time())


async def sampled(rig: Rig) -> None:
    """Wait until a request is being answered."""
    client = rig.engine.replicas[0].client
    assert client is not None
    before = await client.pulse()
    while await client.pulse() == before:
        await asyncio.sleep(0.01)


def nothing_is_left(processes: list[psutil.Process], folders: list[Path]) -> bool:
    _, alive = psutil.wait_procs(processes, 30)
    return not alive and not any(folder.exists() for folder in folders)


# ── who may reach a server ──────────────────────────────────────────────────────────────────────────────────


def test_only_the_user_can_reach_a_server_and_no_health_check_has_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch) as rig:
            server = rig.engine.replicas[0].server
            assert server is not None
            folder = server.socket.parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            first = server.api_key
            listening = [c for p in tree(rig) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            assert listening == []
            tree(rig)[2].kill()
            await rig.ask(3)
            assert server.api_key != first
            assert server.socket.parent != folder
            assert not folder.exists()
        lines = rig.requests()
        assert "/health without key" in lines
        assert "/health with key" not in lines
        assert not [line for line in lines if line.startswith("/collective_rpc without")]

    run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_connect_and_one_who_listens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from vlmrl.inference.vllm.connections import is_own
    from vlmrl.inference.vllm.control import ControlClient

    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch) as rig:
            server = rig.engine.replicas[0].server
            assert server is not None
            pid = os.fork()
            if pid == 0:
                os.setgid(65534)
                os.setuid(65534)
                try:
                    socket.socket(socket.AF_UNIX).connect(str(server.socket))
                except PermissionError:
                    os._exit(13)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 13
            assert await is_own(server.socket)

    run(scenario())

    path = Path("/tmp") / f"stranger-{os.getpid()}"  # a folder that the other user can write to
    ready_r, ready_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(8)
        os.write(ready_w, b"x")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(ready_r, 1)

        async def check() -> None:
            from collections import Counter

            client = ControlClient("server", "http://server", "secret", Counter(), 1.0, unix_socket=path)
            with pytest.raises(EngineError, match="server: another user listens on "):
                await client.is_healthy()

        asyncio.run(check())
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        path.unlink()


# ── servers that hang ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["engine_stuck", "tokens_stuck"])
def test_a_server_that_hangs_is_restarted_and_asked_again(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, speed=500, request_timeout_s=HANGS_AFTER_S) as rig:
            asked = asyncio.create_task(rig.ask(300))
            await sampled(rig)
            rig.plant(fault)
            completion = await asked
            assert len(completion.token_ids) == 300
            assert set(completion.versions.tolist()) == {0}
            assert rig.engine.replicas[0].restarts == 1
            (warning,) = rig.warnings
            assert "within inference.request_timeout_s=2; restart 1 of 3" in warning
            metrics = rig.engine.metrics()
            assert (metrics["inference/timeouts"], metrics["inference/restarts"]) == (1, 1)

    run(scenario())


@pytest.mark.parametrize("which", ["API server", "idle"])
def test_a_stopped_server_is_restarted(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a request waits for it, and while nobody wants anything of it."""

    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, speed=500, request_timeout_s=HANGS_AFTER_S) as rig:
            before = tree(rig)
            asked = asyncio.create_task(rig.ask(300)) if which != "idle" else None
            if asked is not None:
                await sampled(rig)
            before[2].suspend()
            if asked is None:
                while not rig.warnings:
                    await asyncio.sleep(0.05)
                asked = asyncio.create_task(rig.ask(3))
            await asked
            assert rig.engine.replicas[0].restarts == 1
            assert nothing_is_left(before, [])

    run(scenario())


def test_a_slow_server_is_not_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One completion takes three times the deadline."""

    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, speed=5, request_timeout_s=1.0) as rig:
            assert len((await rig.ask(15)).token_ids) == 15
            assert (rig.engine.replicas[0].restarts, rig.warnings) == (0, [])

    run(scenario())


@pytest.mark.parametrize("fault", ["pause_stuck", "reload_stuck"])
def test_a_server_that_hangs_in_a_weight_update_gets_the_newest_weights_after_its_restart(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, request_timeout_s=HANGS_AFTER_S) as rig:
            rig.plant(fault)
            await rig.sync.publish(1)
            completion = await rig.ask(3)
            assert set(completion.versions.tolist()) == {1}
            assert rig.engine.replicas[0].restarts == 1

    run(scenario())


def test_a_request_that_is_lost_too_often_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, speed=500, max_retries=0, request_timeout_s=HANGS_AFTER_S) as rig:
            asked = asyncio.create_task(rig.ask(300))
            await sampled(rig)
            rig.plant("engine_stuck")
            with pytest.raises(EngineLostError, match=r"lost 1 times.*inference\.max_retries=0"):
                await asked
            assert len((await rig.ask(3)).token_ids) == 3

    run(scenario())


def test_restarts_are_counted_and_the_last_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch, max_restarts=1) as rig:
            tree(rig)[2].kill()
            while not rig.warnings or not rig.engine.replicas[0].is_ready:
                await asyncio.sleep(0.01)
            tree(rig)[2].kill()
            while rig.engine.replicas[0].error is None:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineError, match=r"no vLLM server is left: given up after .*ended with status -9"):
                await rig.ask(3)
            with pytest.raises(EngineError, match=r"no vLLM server is left: given up after .*ended with status -9"):
                await rig.sync.publish(1)

    run(scenario())


# ── nothing outlives its server ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "killed",
    [[0], [1], [2], [3], [0, 1], [1, 0], [0, 1, 2], [1, 2], [2, 3]],
    ids=lambda places: "".join(map(str, places)),
)
def test_whoever_is_killed_it_costs_a_restart_and_nothing_is_left(
    killed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 is the guard, 1 the supervisor, 2 the API server, 3 the engine."""

    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch) as rig:
            server = rig.engine.replicas[0].server
            assert server is not None
            folder = server.socket.parent
            before = tree(rig)
            assert len(before) == 4
            for place in killed:
                with contextlib.suppress(psutil.NoSuchProcess):  # the death of the one before has ended it already
                    before[int(place)].kill()
            while rig.engine.replicas[0].is_ready:
                await asyncio.sleep(0.01)
            assert len((await rig.ask(3)).token_ids) == 3
            assert rig.engine.replicas[0].restarts == 1
            assert nothing_is_left(before, [folder])
            last, folder = tree(rig), server.socket.parent
        assert nothing_is_left(last, [folder])

    run(scenario())


def test_stopped_processes_of_a_killed_supervisor_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with make_rig(tmp_path, monkeypatch) as rig:
            before = tree(rig)
            guard, supervisor, _, engine = before
            for process in (engine, guard, supervisor):
                process.suspend()  # so that the supervisor does not notice the guard's death before its own
            guard.kill()
            supervisor.kill()
            while rig.engine.replicas[0].is_ready:
                await asyncio.sleep(0.01)
            await rig.ask(3)
            assert nothing_is_left(before, [])

    run(scenario())
