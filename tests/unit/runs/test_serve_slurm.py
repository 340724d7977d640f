"""A Slurm task that serves: its port and its announcement through the lives of its server, and the run on the other
side. A small program stands in for vLLM; tests/e2e/test_slurm.py has the same with Slurm and vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from support.stand_in import HANGS_AFTER_S, make_rig
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.relay import Relay
from vlmrl.inference.vllm.slurm_servers import announced, announcement
from vlmrl.runs.serve_slurm import _keep_running


def test_a_restarted_server_keeps_its_port_and_gets_a_new_key(
    in_task: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        rig = make_rig(tmp_path, monkeypatch, request_timeout_s=HANGS_AFTER_S)
        server = rig.engine.replicas[0].server
        assert server is not None
        config = rig.engine.config
        in_task(0, tasks=2, serving=1)
        run = tmp_path / "run"
        relay, path = Relay(), announcement(run, 0)
        serving = asyncio.create_task(_keep_running(server, relay, path, config))
        config.slurm_tasks = 1
        engine = rig.engine
        rig.engine = VllmEngine(config, tmp_path, run / "logs", lambda line: None, rig.warnings.append)
        rig.engine.restore_with(rig.sync.restore)
        rig.sync._engine = rig.engine
        async with rig:
            first = announced(path)
            assert len((await rig.ask(3)).token_ids) == 3
            rig.plant("engine_stuck")
            assert len((await rig.ask(3)).token_ids) == 3
            second = announced(path)
            assert (second.url, second.key != first.key) == (first.url, True)
            tree_of = rig.engine.replicas[0]
            assert tree_of.restarts == 1
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await relay.close()
        await server.stop()
        await engine.stop()

    async def in_time() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(in_time())
