"""A Slurm task that runs one vLLM server (`inference.slurm_tasks`) until the run is over.

    compose ─▶ serve: checkpoint ─▶ Relay ─▶ VllmServer ─▶ announce ─▶ wait until the run is over
                                             ▲─────────── dies or hangs ◀──┘

Like every server, it serves the checkpoint's weights until the run publishes its own. The port is this task's own from
before the first launch until its end (relay.py). Each launch has a key of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm import progress
from vlmrl.inference.vllm.control import ControlClient
from vlmrl.inference.vllm.relay import Relay
from vlmrl.inference.vllm.server import VllmServer, visible_devices
from vlmrl.inference.vllm.slurm_servers import announce, announcement
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.ranks import slurm
from vlmrl.runs.tools import texts_of_run
from vlmrl.tasks.loading import load_task
from vlmrl.weight_sync.gpu import WEIGHT_TRANSFERS


def serve(config: RunConfig, index: int) -> None:
    """Run server `index` of the run until the run is over.

    Raises `EngineError` where the server cannot run; the run is told the reason too (`announce`).
    """
    assert isinstance(config.inference, VllmConfig), (
        "slurm.divide_tasks gives this role to tasks of runs with vLLM only"
    )
    # Ignore every signal that asks the job to stop: the run answers it, and needs its servers until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM, *slurm.QUEUE_SIGNALS):
        signal.signal(number, lambda *_: None)
    run = Path(config.output_dir)
    path = announcement(run, index)
    try:
        texts = texts_of_run(config, load_task(config.task, seed=config.seed))
        checkpoint = resolve_checkpoint(config.model, texts)
        server = VllmServer(
            config.inference,
            index,
            checkpoint,
            run / "logs" / f"vllm_{index}.log",
            WEIGHT_TRANSFERS.get(config.weight_sync.kind),
            devices(config.inference),
        )
        asyncio.run(_until_over(server, path, config.inference))
    except EngineError as error:
        announce(path, error=str(error))
        raise
    else:
        path.unlink(missing_ok=True)


def devices(config: VllmConfig) -> list[str]:
    """The GPUs that this task's server runs on."""
    count = config.tensor_parallel_size * config.data_parallel_size
    visible = visible_devices()
    if len(visible) <= count:
        return visible
    first = slurm.first_gpu(count, slurm.tasks_of_step() - slurm.serving_tasks())
    return visible[first : first + count]


async def _until_over(server: VllmServer, path: Path, config: VllmConfig) -> None:
    """Keep the server running until the run is over, then stop it."""
    relay = Relay()
    over = asyncio.create_task(slurm.run_is_over())
    running = asyncio.create_task(_keep_running(server, relay, path, config))
    try:
        await asyncio.wait({over, running}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, over):
            if task.done():
                task.result()
    finally:
        over.cancel()
        running.cancel()
        await asyncio.gather(over, running, return_exceptions=True)
        await relay.close()
        await server.stop()


async def _keep_running(server: VllmServer, relay: Relay, path: Path, config: VllmConfig) -> None:
    """Start the server, and restart it up to `max_restarts` times when it dies or hangs. Raises `EngineError` after
    that."""
    on_one_node = slurm.nodes() == 1
    port = await relay.listen("127.0.0.1" if on_one_node else "0.0.0.0")
    url = f"http://{'127.0.0.1' if on_one_node else os.environ['SLURMD_NODENAME']}:{port}"
    for _ in range(config.max_restarts + 1):
        await server.launch()
        client = ControlClient(
            server.name, url, server.api_key, Counter(), config.request_timeout_s, unix_socket=server.socket
        )
        try:
            await server.wait_healthy(client.is_healthy, lambda line: None)
            relay.target = server.socket
            announce(path, url=url, key=server.api_key)
            print(f"{server.name} listens on {url}", flush=True)
            what = await _death(server, client)
        finally:
            relay.target = None
            await client.close()
        print(f"{server.name} {what}", flush=True)
        await server.stop()
    raise server.error(f"{what} and was restarted inference.max_restarts={config.max_restarts} times before")


async def _death(server: VllmServer, client: ControlClient) -> str:
    """Wait until the server has ended or hangs → which of them. Whether it processes tokens while the run waits for
    some is only known to the run, so a server that still answers is left to it."""
    hanging = asyncio.create_task(progress.watch(client, lambda: False))
    ended = asyncio.create_task(server.exited())
    try:
        await asyncio.wait({hanging, ended}, return_when=asyncio.FIRST_COMPLETED)
        return hanging.result() if hanging.done() else f"ended with status {ended.result()}"
    finally:
        hanging.cancel()
        ended.cancel()
        await asyncio.gather(hanging, ended, return_exceptions=True)
