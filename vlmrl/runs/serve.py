"""`mode=serve`: put the model behind an OpenAI-style chat endpoint, until Ctrl-C.

    python -m vlmrl mode=serve model=auto model.name=<Hugging Face folder>
    python -m vlmrl mode=serve resume=<run>

Other people's harnesses and programs talk to it, and people by hand. It is the endpoint that programs are trained
through, with two differences: a client's temperature, top_p, top_k and seed are taken, and a repeated request is
sampled again. Each conversation is recorded as a rollout without a reward.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from vlmrl.config.model import most_frames
from vlmrl.errors import ConfigError
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.endpoint.lobby import ConversationLobby
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.server import HOST, Endpoint
from vlmrl.orchestrator.endpoint.session import Budgets
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling, Truncation
from vlmrl.record.files import disk_errors
from vlmrl.runs.build import Run
from vlmrl.runs.problems import max_model_len
from vlmrl.types import Group

ENDLESS = 2**31
"""Turns of a conversation without a limit."""

LONGEST_PAUSE_S = 5.0
"""Longest time between two looks for conversations that are over."""

NEW_KEY_BYTES = 24


async def serve(run: Run) -> ExitReason:
    """Serve the weights as they were loaded until the run is asked to stop. Raises ConfigError where the port is taken,
    and what ends the engine."""
    config = run.config
    run.monitor.phase("serve")
    await run.weight_sync.publish(run.trainer.version)
    key = os.environ.get(config.serve.api_key_env) or f"vlmrl-{secrets.token_urlsafe(NEW_KEY_BYTES)}"
    budgets = Budgets(ENDLESS, config.orchestrator.max_new_tokens, max_model_len(config), most_frames(config.model))
    lobby = ConversationLobby(
        key, run.renderer, run.engine, lambda id: _sampling(run, id), budgets, config.serve.idle_s
    )
    endpoint = Endpoint(
        config.model.name,
        temperature=config.orchestrator.temperature,
        port=config.serve.port,
        lobby=lobby,
    )
    try:
        await endpoint.start()
    except OSError as error:
        raise ConfigError(
            f"serve.port={config.serve.port} cannot be listened on ({error.strerror or error}), so nobody could reach "
            "the model: set serve.port=0 for a free port"
        ) from error
    address = run.run_dir.path / "serve.json"
    record = _Record(run.monitor, lobby)
    try:
        _write_address(address, endpoint.base_url, key)
        _show(run, endpoint, key, address)
        work = asyncio.create_task(_until_failure(endpoint, record.keep(min(config.serve.idle_s / 2, LONGEST_PAUSE_S))))
        if not await stopped_before(work, run.stop):
            work.result()
    finally:
        with disk_errors(address):
            address.unlink(missing_ok=True)
        await endpoint.stop()
        await record.write(everything=True)
    return "finished"


async def _until_failure(endpoint: Endpoint, recording: Coroutine[Any, Any, None]) -> None:
    """Raise what ends the endpoint or the recording."""
    assert endpoint.failure is not None
    task = asyncio.create_task(recording)
    try:
        done, _ = await asyncio.wait({task, endpoint.failure}, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(eq=False)
class _Record:
    """Records the conversations that are over, those of each look as one step."""

    monitor: Monitor
    lobby: ConversationLobby
    step: int = 0

    async def keep(self, pause_s: float) -> None:
        """Record until cancelled."""
        while True:
            await asyncio.sleep(pause_s)
            await self.write()

    async def write(self, *, everything: bool = False) -> None:
        """Record the conversations that are over, or all."""
        rollouts = await self.lobby.finished(everything=everything)
        if rollouts:
            self.step += 1
            self.monitor.record(self.step, [Group(rollout.problem_id, [rollout]) for rollout in rollouts])


def _sampling(run: Run, rollout_id: str) -> SessionSampling:
    """The client's sampling, and where it does not say, the run's."""
    config = run.config
    own = OwnSampling(
        config.orchestrator.temperature,
        run.renderer.stop_token_ids,
        run.renderer.banned_token_ids,
        Truncation.of(config),
        stop=tuple(config.orchestrator.stop),
    )
    return SessionSampling(own, partial(sampling_seed, config.seed, rollout_id), client_samples=True)


def _write_address(path: Path, base_url: str, key: str) -> None:
    """Write where the model is served and the key, for programs on this machine; only the owner can read it. The file
    is there as a whole or not at all, because a program may wait for it."""
    written = path.with_name(f".{path.name}")
    with disk_errors(path):
        written.unlink(missing_ok=True)
        content = orjson.dumps({"base_url": base_url, "api_key": key, "pid": os.getpid()}, option=orjson.OPT_INDENT_2)
        with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content + b"\n")
        written.replace(path)


def _show(run: Run, endpoint: Endpoint, key: str, address: Path) -> None:
    run.monitor.table(
        "serving",
        {
            "base URL": endpoint.base_url,
            "key": key,
            "model": endpoint.model,
            "address": f"{address} (for programs; deleted at the end)",
            "try it": f"curl {endpoint.base_url}/chat/completions -H 'Authorization: Bearer <key>' -d "
            '\'{"messages": [{"role": "user", "content": "hi"}]}\'',
            "stop": f"Ctrl-C (it listens on {HOST} only)",
        },
        hidden=("key",),
    )
