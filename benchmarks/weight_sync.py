"""How long a policy version takes to reach a vLLM server, and whether requests in flight survive it.

    python benchmarks/weight_sync.py --checkpoint DIR [--transports folder,cuda_ipc] [--rounds 5]

One server per kind of weight transfer, on DIR; the tensors of DIR's safetensors files, on the GPU where there is one,
stand for the trainer's. Every round changes all of them, and publishes while requests are in flight. The time is that
of `publish`, all in: copy or write, pause, transfer, caches, version, resume. At the end every tensor in the server is
compared with the trainer's by SHA-256.

`straddled` counts requests that began before a publish and were not done after it; `survived` those of all requests
that gave all of their tokens; `two versions` those whose tokens say that two versions sampled them, which vLLM 0.26
does not tell. `left on GPU` is what torch has allocated here after the last round more than after the first.
`DIR` holds a Qwen3-VL; random weights will do. nccl needs a second GPU, cuda_ipc a single visible one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from mismatch import GRAPHS, config_of, prompts_of, renderer_of
from safetensors.torch import load_file
from torch import Tensor

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import CudaIpcSyncConfig, FolderSyncConfig, NcclSyncConfig
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.preflight.rules.transfer import refuse_transfer
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import Completion, Prompt, SamplingParams
from vlmrl.weight_sync.cuda_ipc import CudaIpcSync
from vlmrl.weight_sync.folder import FolderSync
from vlmrl.weight_sync.gpu import WEIGHT_TRANSFERS
from vlmrl.weight_sync.nccl import NcclSync
from vlmrl.weight_sync.servers import ServerSync, without_ties

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

CHANGE = 1 + 2**-6
"""Every weight is multiplied by it in one round and divided by it in the next: enough that bfloat16 sees it."""


@dataclass
class Row:
    """What one transport did."""

    transport: str
    gigabytes: float
    seconds: list[float] = field(default_factory=list)
    """Of each publish but version 0's, which also connects."""
    first_s: float = 0.0
    requests: int = 0
    straddled: int = 0
    survived: int = 0
    two_versions: int = 0
    left_gib: float = 0.0
    compared: int = 0
    differing: int = 0
    unmatched: int = 0


def sync_of(transport: str, engine: VllmEngine, weights: dict[str, Tensor], root: str) -> ServerSync:
    if transport == "nccl":
        return NcclSync(engine, lambda: weights, NcclSyncConfig())
    if transport == "cuda_ipc":
        return CudaIpcSync(engine, lambda: weights, CudaIpcSyncConfig())
    assert transport == "folder", f"no transport {transport}"
    return FolderSync(engine, lambda: weights, FolderSyncConfig(root=root))


def ask(
    engine: VllmEngine, renderer: Renderer, prompts: list[Prompt], count: int, new_tokens: int
) -> list[asyncio.Task[Completion]]:
    """Requests under way, none of which stops before its last token."""
    banned = (*renderer.banned_token_ids, *renderer.stop_token_ids)

    async def one(index: int) -> Completion:
        sampling = SamplingParams(new_tokens, 1.0, renderer.stop_token_ids, banned, index)
        async with engine.session(f"train/{index}") as session:
            return await session.generate(prompts[index % len(prompts)], sampling)

    return [asyncio.create_task(one(index)) for index in range(count)]


async def measure(
    transport: str,
    engine: VllmEngine,
    renderer: Renderer,
    prompts: list[Prompt],
    weights: dict[str, Tensor],
    first: int,
    args: argparse.Namespace,
) -> Row:
    """Publish versions `first` … through one transport."""
    tensors = without_ties(weights)
    row = Row(transport, sum(t.numel() for t in tensors.values()) * BYTES[args.dtype] / 1e9)
    sync = sync_of(transport, engine, weights, args.root)
    try:
        started = time.perf_counter()
        await sync.publish(first)
        row.first_s = time.perf_counter() - started
        await asyncio.gather(*ask(engine, renderer, prompts, len(prompts), 4))  # images are there, kernels are warm
        held: list[int] = []
        for version in range(first + 1, first + 1 + args.rounds):
            for tensor in tensors.values():
                tensor.mul_(CHANGE) if version % 2 else tensor.div_(CHANGE)
            requests = ask(engine, renderer, prompts, args.requests, args.new_tokens)
            await asyncio.sleep(args.lead)
            under_way = [request for request in requests if not request.done()]
            started = time.perf_counter()
            await sync.publish(version)
            row.seconds.append(time.perf_counter() - started)
            row.straddled += sum(not request.done() for request in under_way)
            row.requests += len(requests)
            for answer in await asyncio.gather(*requests, return_exceptions=True):
                if isinstance(answer, BaseException):
                    print(f"{transport}: {type(answer).__name__}: {str(answer)[:300]}", flush=True)
                    continue
                row.survived += len(answer.token_ids) == args.new_tokens
                row.two_versions += len(np.unique(answer.versions)) > 1
            print(f"{transport}: version {version} in {row.seconds[-1]:.3f} s", flush=True)
            if torch.cuda.is_available():
                held.append(torch.cuda.memory_allocated())
        row.left_gib = (held[-1] - held[0]) / 2**30 if held else 0.0
        found = await sync.compare()
        row.compared, row.differing, row.unmatched = found.compared, len(found.differing), len(found.unmatched)
    finally:
        sync.close()
    return row


async def measure_all(args: argparse.Namespace) -> list[Row]:
    folder: Path = args.checkpoint
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path, device=device).items()}
    embeddings = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    renderer = renderer_of(folder, config_of(folder, Dtype(args.dtype)), embeddings)
    prompts = await prompts_of(renderer, 4, args.image_size)
    extra = {"max_num_seqs": 256, "limit_mm_per_prompt": {"image": 8, "video": 0}}
    vllm = VllmConfig(
        dtype=Dtype(args.dtype),
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory,
        extra_args=extra | ({"compilation_config": GRAPHS} if device == "cuda" else {}),
    )
    rows: list[Row] = []
    # A folder is read by any server.
    known = {WEIGHT_TRANSFERS[name] for name in args.transports if name in WEIGHT_TRANSFERS}
    backends: set[Literal["nccl", "ipc"] | None] = {*known} or {None}
    for number, backend in enumerate(sorted(backends, key=str)):
        here = [n for n in args.transports if WEIGHT_TRANSFERS.get(n, backend if number == 0 else None) == backend]
        for name in here:
            if name in WEIGHT_TRANSFERS:
                config = NcclSyncConfig() if name == "nccl" else CudaIpcSyncConfig()
                refuse_transfer(config, vllm, "auto")
        engine = VllmEngine(vllm, folder, Path(args.logs), lambda line: None, print, backend)
        started = time.perf_counter()
        try:
            await engine.start()
            print(f"a server that takes weights by {backend}, up in {time.perf_counter() - started:.0f} s", flush=True)
            for name in here:
                rows.append(
                    await measure(name, engine, renderer, prompts, weights, len(rows) * (args.rounds + 1), args)
                )
        finally:
            await engine.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--transports", type=lambda text: text.split(","), default=["folder", "cuda_ipc"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=768)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--lead", type=float, default=1.5, help="seconds between the requests and the publish")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--gpu-memory", type=float, default=0.45)
    parser.add_argument("--root", default="/dev/shm")
    parser.add_argument("--logs", default="/tmp/vlmrl-weight-sync")
    args = parser.parse_args()
    rows = asyncio.run(measure_all(args))
    print(
        f"\n{'transport':<10} {'GB':>7} {'median s':>9} {'min s':>7} {'GB/s':>7} {'first s':>8} {'straddled':>10} "
        f"{'survived':>10} {'two versions':>13} {'left on GPU':>12}  tensors equal"
    )
    for row in rows:
        median = statistics.median(row.seconds)
        equal = row.compared - row.differing
        unmatched = f", {row.unmatched} unmatched" if row.unmatched else ""
        print(
            f"{row.transport:<10} {row.gigabytes:>7.3f} {median:>9.3f} {min(row.seconds):>7.3f} "
            f"{row.gigabytes / median:>7.2f} {row.first_s:>8.3f} {f'{row.straddled}/{row.requests}':>10} "
            f"{f'{row.survived}/{row.requests}':>10} {f'{row.two_versions}/{row.requests}':>13} "
            f"{row.left_gib:>8.2f} GiB  {equal} of {row.compared}{unmatched}"
        )


if __name__ == "__main__":
    main()
