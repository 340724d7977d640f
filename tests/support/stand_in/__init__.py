"""Runs engines whose servers are small programs in place of vLLM (vllm/entrypoints/openai/api_server.py)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.types import Completion, Prompt, SamplingParams
from vlmrl.weight_sync.folder import FolderSync

HANGS_AFTER_S = 2.0
"""A deadline for tests that wait for it to pass. A healthy server answers in milliseconds, on a busy machine in tenths
of a second."""


class Rig:
    """An engine with stand-in servers and its weight sync; `folder` is where faults are planted."""

    def __init__(self, folder: Path, config: VllmConfig) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        (folder / "weights").mkdir()
        self.engine = VllmEngine(config, folder, folder / "run" / "logs", lambda line: None, self.warnings.append)
        self.sync = FolderSync(
            self.engine, lambda: {"w": torch.zeros(2)}, FolderSyncConfig(root=str(folder / "weights"), verify=False)
        )

    def plant(self, fault: str) -> None:
        (self.folder / fault).touch()

    def requests(self) -> list[str]:
        return (self.folder / "requests").read_text().splitlines()

    async def ask(self, tokens: int, name: str = "train/000001/00/00") -> Completion:
        prompt = Prompt(np.arange(4), (), ())
        sampling = SamplingParams(tokens, 1.0, stop_token_ids=(9,), banned_token_ids=(), seed=0)
        async with self.engine.session(name) as session:
            return await session.generate(prompt, sampling)

    async def __aenter__(self) -> Rig:
        await self.engine.start()
        await self.sync.publish(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.stop()
        self.sync.close()


def make_rig(folder: Path, monkeypatch: pytest.MonkeyPatch, speed: float = 2000, **config: float) -> Rig:
    """A rig with one server; `speed` in tokens per second and request. A test of a server that hangs sets
    `request_timeout_s` to `HANGS_AFTER_S`; the other tests leave a deadline that no busy machine misses."""
    monkeypatch.setattr("vlmrl.inference.vllm.server.vllm_version", lambda: (0, 32))
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.setenv("STAND_IN_SPEED", str(speed))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("vlmrl.inference.vllm.server.HEALTH_POLL_S", 0.02)
    settings = VllmConfig(dtype=Dtype.float32, request_timeout_s=60.0)
    for name, value in config.items():
        setattr(settings, name, value)
    return Rig(folder, settings)


def tree(rig: Rig, replica: int = 0) -> list[psutil.Process]:
    """Guard, supervisor, API server, engine of a server."""
    server = rig.engine.replicas[replica].server
    assert server is not None
    assert server._process is not None
    guard = psutil.Process(server._process.pid)
    return [guard, *guard.children(recursive=True)]
