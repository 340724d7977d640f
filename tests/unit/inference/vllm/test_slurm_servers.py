"""How task 0 of a Slurm step finds the vLLM servers that other tasks run."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmrl.errors import EngineError
from vlmrl.inference.vllm.slurm_servers import Announced, announce, announced, announcement, find_servers


def test_an_announcement_is_for_this_life_and_this_user(in_task: Callable[..., None], tmp_path: Path) -> None:
    in_task(1, tasks=2, serving=1, SLURM_RESTART_COUNT="1")
    announce(tmp_path / "servers/7.0.0.0.json", url="http://old", key="old")
    said: list[str] = []

    async def both() -> list[Announced]:
        finding = asyncio.create_task(find_servers(tmp_path, 60.0, said.append))
        while not said:
            await asyncio.sleep(0)
        announce(announcement(tmp_path, 0), url="http://here:1", key="secret")
        return await finding

    path = announcement(tmp_path, 0)
    assert asyncio.run(both()) == [Announced("http://here:1", "secret", path)]
    announce(path, url="http://here:1", key="of the next launch")
    assert announced(path).key == "of the next launch"
    assert stat.S_IMODE(announcement(tmp_path, 0).stat().st_mode) == 0o600
    announce(announcement(tmp_path, 0), error="vLLM server 0 ended")
    with pytest.raises(EngineError, match="vLLM server 0 ended"):
        asyncio.run(find_servers(tmp_path, 60.0, said.append))


def test_a_server_that_does_not_come(in_task: Callable[..., None], tmp_path: Path) -> None:
    in_task(0, tasks=2, serving=1)
    with pytest.raises(EngineError, match="1 of 1 servers were not up within"):
        asyncio.run(find_servers(tmp_path, 0.0, lambda line: None))
