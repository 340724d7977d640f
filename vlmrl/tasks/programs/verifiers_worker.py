"""Plays episodes of a `verifiers` environment: `python verifiers_worker.py`, in an environment that has verifiers 0.4.

    run ── {"config": …, "keys": …} ─▶ resolve_env_config ─▶ load_environment ─▶ serving
        ── {"id": 7, "task": 3, "base_url": …, "api_key": …} ─▶ slots ─▶ run_slot(ModelContext(EvalClientConfig))
        ◀─ {"id": 7, "traces": [{"id": …, "reward": …}], …} ──

Each line is one JSON object, on standard input and on a copy of standard output; what the environment prints goes to
standard error. Episodes run at the same time. The requests of an episode carry the trace's id as X-Session-ID, by which
the run finds the turns of each trace.

The file is started by its path, so it imports nothing of vlmrl.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.clients import resolve_client
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.interception.server import InterceptionServer
from verifiers.v1.runtimes import SubprocessConfig
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

LONGEST_ERROR = 10_000


class Tasks:
    """The tasks of a taskset by their position. An endless taskset is read as far as it is needed."""

    def __init__(self, taskset: Any) -> None:
        self._rest: Iterator[Any] = iter(taskset)
        self._read: list[Any] = []
        self.is_endless = not taskset.bounded

    def __getitem__(self, index: int) -> Any:
        self._read += itertools.islice(self._rest, max(0, index + 1 - len(self._read)))
        return self._read[index]

    def keys(self) -> list[str] | None:
        """The identity of each task; None where there is no end of them."""
        if self.is_endless:
            return None
        self._read += self._rest
        return [task.key for task in self._read]


def made(config: dict[str, Any]) -> Any:
    """The environment. Agents run in processes of this machine unless the config says where."""
    resolved = resolve_env_config(config)
    local = {
        name: spec.model_copy(update={"runtime": SubprocessConfig()})
        for name, spec in agent_config_fields(resolved).items()
        if "runtime" not in spec.model_fields_set
    }
    return load_environment(resolved.model_copy(update=local))


def close_clients_with_their_episodes() -> None:
    """Verifiers keeps one HTTP client per endpoint, about 1 MB, until the environment ends. Here every episode has an
    endpoint of its own, so an episode's clients are closed when it ends."""
    unregister = InterceptionServer.unregister
    closing: set[asyncio.Task[None]] = set()

    def unregister_and_close(server: Any, model_secret: str, state_secret: str) -> None:
        session = server.sessions.get(model_secret)
        unregister(server, model_secret, state_secret)
        if session is not None and session.client is not None:
            task = asyncio.get_running_loop().create_task(session.client.close())
            closing.add(task)
            task.add_done_callback(closing.discard)

    InterceptionServer._client = lambda server, config: resolve_client(config)
    InterceptionServer.unregister = unregister_and_close


async def main() -> None:
    """Answer requests until standard input closes."""
    close_clients_with_their_episodes()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=read, args=(loop, lines), daemon=True).start()
    try:
        first = json.loads(await lines.get())
        env, tells_keys = made(first["config"]), first["keys"]
        tasks = Tasks(env.taskset)
        keys = tasks.keys() if tells_keys else None
    except BaseException as error:  # noqa: BLE001 — the environment's code may raise anything
        answer(failed=in_words(error))
        return
    answer(ready=True, keys=keys)
    episodes: dict[int, asyncio.Task[None]] = {}
    async with contextlib.AsyncExitStack() as stack:
        started = False
        while line := await lines.get():
            request = json.loads(line)
            if request.get("cancel"):
                if (running := episodes.pop(request["id"], None)) is not None:
                    running.cancel()
                continue
            if not started:
                await stack.enter_async_context(env.serving())
                started = True
            number = request["id"]
            episodes[number] = asyncio.create_task(episode(env, tasks, request, answer))
            episodes[number].add_done_callback(partial(forget, episodes, number))
        for running in episodes.values():
            running.cancel()
        await asyncio.gather(*episodes.values(), return_exceptions=True)


def forget(episodes: dict[int, asyncio.Task[None]], number: int, ended: asyncio.Task[None]) -> None:
    episodes.pop(number, None)


def read(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    """Hand the lines of standard input to the event loop; an empty one at the end."""
    for line in sys.stdin:
        loop.call_soon_threadsafe(lines.put_nowait, line)
    loop.call_soon_threadsafe(lines.put_nowait, "")


async def episode(env: Any, tasks: Tasks, request: dict[str, Any], answer: Any) -> None:
    """Play one episode and answer with its traces."""
    number = request["id"]
    variable = f"VLMRL_SESSION_{number}"  # a client reads its key from the environment
    os.environ[variable] = request["api_key"]
    try:
        client = vf.EvalClientConfig(base_url=request["base_url"], api_key_var=variable)
        (slot,) = env.slots(tasks[request["task"]])
        played = await env.run_slot(slot, vf.ModelContext(model=request["model"], client=client))
        errors = [*played.errors, *(error for trace in played.traces for error in trace.errors if not trace.ok)]
        answer(
            id=number,
            ok=played.ok,
            traces=[trace_record(trace) for trace in played.traces],
            error=f"{errors[-1].type}: {errors[-1].message}"[:LONGEST_ERROR] if errors else None,
        )
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 — the environment's code may raise anything
        answer(id=number, ok=False, traces=[], error=in_words(error))
    finally:
        del os.environ[variable]


def trace_record(trace: Any) -> dict[str, Any]:
    """What the run needs of a trace."""
    return {
        "id": trace.id,
        "ok": trace.ok,
        "trainable": trace.agent is None or trace.agent.trainable,
        "reward": trace.reward,
        "rewards": {name: None if each is None else each.value for name, each in trace.rewards.items()},
        "metrics": {name: value for name, value in trace.metrics.items() if isinstance(value, int | float)},
        "stop_condition": trace.stop_condition,
    }


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]


if __name__ == "__main__":
    asyncio.run(main())
