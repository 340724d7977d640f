"""A Slurm task that runs one vLLM server (`inference.slurm_tasks`) until the run is over.

    compose ─▶ serve: checkpoint ─▶ VllmServer ─▶ announce ─▶ wait until the run is over; restart a server that dies

Like every server, it serves the checkpoint's weights until the run publishes its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.server import Host, VllmServer, visible_devices
from vlmrl.inference.vllm.slurm_servers import announce, announcement
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.ranks import slurm
from vlmrl.tasks.loading import load_task, tokenizer_texts
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
        texts = tokenizer_texts(config.model, load_task(config.task, seed=config.seed))
        checkpoint = resolve_checkpoint(config.model, texts)
        server = VllmServer(
            config.inference,
            index,
            checkpoint,
            run / "logs" / f"vllm_{index}.log",
            WEIGHT_TRANSFERS.get(config.weight_sync.kind),
            host(config.inference),
        )
        asyncio.run(_until_over(server, path, config.inference.max_restarts))
    except EngineError as error:
        announce(path, error=str(error))
        raise
    else:
        path.unlink(missing_ok=True)


def host(config: VllmConfig) -> Host:
    """The address on which this task's server listens, and the GPUs it runs on."""
    count = config.tensor_parallel_size * config.data_parallel_size
    devices = visible_devices()
    if len(devices) > count:
        first = slurm.first_gpu(count, slurm.tasks_of_step() - slurm.serving_tasks())
        devices = devices[first : first + count]
    if slurm.nodes() == 1:
        return Host(devices=devices)
    return Host(bind="0.0.0.0", name=os.environ["SLURMD_NODENAME"], devices=devices)


async def _until_over(server: VllmServer, path: Path, max_restarts: int) -> None:
    """Keep the server running until the run is over, then stop it."""
    over = asyncio.create_task(slurm.run_is_over())
    running = asyncio.create_task(_keep_running(server, path, max_restarts))
    try:
        await asyncio.wait({over, running}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, over):
            if task.done():
                task.result()
    finally:
        over.cancel()
        running.cancel()
        await asyncio.gather(over, running, return_exceptions=True)
        await server.stop()


async def _keep_running(server: VllmServer, path: Path, max_restarts: int) -> None:
    """Start the server, and restart it up to `max_restarts` times when it dies. Raises `EngineError` after that."""
    async with httpx.AsyncClient() as client:

        async def is_healthy() -> bool:
            try:
                return (await client.get(f"{server.url}/health")).status_code == 200
            except httpx.TransportError:
                return False

        for life in range(max_restarts + 1):
            await server.launch()
            await server.wait_healthy(is_healthy, lambda line: None)
            if life == 0:
                announce(path, url=server.url, key=server.api_key)
                print(f"{server.name} listens on {server.url}", flush=True)
            status = await server.exited()
            print(f"{server.name} ended with status {status}", flush=True)
    raise server.error(
        f"ended with status {status} and was restarted inference.max_restarts={max_restarts} times before"
    )
