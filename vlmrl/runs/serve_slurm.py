"""What a task of a Slurm job does that serves (`inference.slurm_tasks`): one vLLM server, until the run is over.

    compose ─▶ serve: checkpoint ─▶ VllmServer ─▶ announce ─▶ wait: the run is over, or the server dies and is restarted

It serves the checkpoint's weights until the run has published its own, as every server does.
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
from vlmrl.inference.vllm.server import Host, VllmServer, check_vllm, visible_devices
from vlmrl.inference.vllm.slurm_servers import announce, announcement
from vlmrl.models.checkpoints.load import check_available, resolve_checkpoint
from vlmrl.ranks import slurm
from vlmrl.tasks.loading import load_task
from vlmrl.weight_sync.gpu import WEIGHT_TRANSFERS


def serve(config: RunConfig, index: int) -> None:
    """Be server `index` of the run. Raises what keeps it from that, which the run is told too."""
    assert isinstance(config.inference, VllmConfig), "slurm.part comes first"
    # Whatever is asked of the job, the run answers: it needs its servers until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM, *slurm.QUEUE_SIGNALS):
        signal.signal(number, lambda *_: None)
    run = Path(config.output_dir)
    path = announcement(run, index)
    try:
        check_available(config.model)
        check_vllm(config.inference)
        checkpoint = resolve_checkpoint(config.model, load_task(config.task, seed=config.seed).texts())
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
    """Where this task's server listens, and on which GPUs it runs."""
    count = config.tensor_parallel_size * config.data_parallel_size
    devices = visible_devices()
    if len(devices) > count:
        first = slurm.first_gpu(count, slurm.tasks_of_step() - slurm.serving_tasks())
        devices = devices[first : first + count]
    if slurm.nodes() == 1:
        return Host(devices=devices)
    return Host(bind="0.0.0.0", name=os.environ["SLURMD_NODENAME"], devices=devices)


async def _until_over(server: VllmServer, path: Path, max_restarts: int) -> None:
    over = asyncio.create_task(slurm.run_is_over())
    living = asyncio.create_task(_live(server, path, max_restarts))
    try:
        await asyncio.wait({over, living}, return_when=asyncio.FIRST_COMPLETED)
        for task in (living, over):
            if task.done():
                task.result()
    finally:
        over.cancel()
        living.cancel()
        await asyncio.gather(over, living, return_exceptions=True)
        await server.stop()


async def _live(server: VllmServer, path: Path, max_restarts: int) -> None:
    """Keep the server up. Raises `EngineError` when it has died once too often."""
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
    raise server.error(f"ended with status {status}, once more than inference.max_restarts={max_restarts} allows")
