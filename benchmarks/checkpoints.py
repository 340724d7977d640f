"""How fast a checkpoint is written and loaded, next to what `dd` writes in the same call.

    python benchmarks/checkpoints.py --gib 2 --folder DIR
    python benchmarks/checkpoints.py --gib 24 --folder DIR --device cuda

The state is that of AdamW in float32: weights and two averages of the same shapes, of random numbers, `--gib` in all.
Each repetition writes the same number of bytes three times, each time after `sync`:

    dd                  if=/dev/zero conv=fsync
    as versions before  torch.distributed.checkpoint copies the state and writes two files in one thread; then the files
                        are read again for their SHA-256 and flushed
    checkpoint          `Checkpoints.save`, until the folder has its name

and then loads the checkpoint (`Checkpoints.load`: hashes, then tensors), whose files are dropped from the page cache
before, as far as the file system does that. What was loaded is compared by its SHA-256. `loop waits` is the time until
`save` returns: from then on the state may change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.checkpoint_files import hashes
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.training_state import begin_to_save, restore
from vlmrl.types import Trainer

GIB = 2**30
MIB = 2**20
EMBEDDING_SHARE = 8
"""The largest tensor is an eighth of the weights, about as the embedding of a model with 2 billion is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of the state, in GiB")
    parser.add_argument("--tensor-mib", type=float, default=16.0, help="of most tensors, in MiB")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk that is measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    state = State(round(arguments.gib * GIB), round(arguments.tensor_mib * MIB), arguments.device)
    print(
        f"{state.bytes / 1e9:.2f} GB on {arguments.device}, {len(state.weights)} weights, torch {torch.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores, SHA-256 {sha256_speed():.2f} GB/s on one\n"
    )
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.repeats):
            for name, measure in MEASURES.items():
                os.sync()
                found.setdefault(name, []).append(measure(Path(folder), state))
    print_table(found, state.bytes)


class State:
    """Weights and AdamW's averages, without a model."""

    def __init__(self, size: int, tensor_bytes: int, device: str) -> None:
        """`size` and `tensor_bytes`: of all tensors and of most tensors, in bytes."""
        generator = torch.Generator(device).manual_seed(0)

        def of(count: int) -> Tensor:
            return torch.rand(count, generator=generator, device=device)

        left = size // 3 // 4
        counts = [left // EMBEDDING_SHARE]
        left -= counts[0]
        while left > 0:
            counts.append(min(tensor_bytes // 4, left))
            left -= counts[-1]
        self.weights: dict[str, Tensor] = {f"layers.{i}.weight": of(count) for i, count in enumerate(counts)}
        self.optimizer = torch.optim.AdamW(list(self.weights.values()))
        for weight in self.weights.values():
            averages = {"exp_avg": of(weight.numel()), "exp_avg_sq": of(weight.numel())}
            self.optimizer.state[weight] = {"step": torch.ones(()), **averages}
        self.bytes = sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterable[Tensor]:
        yield from self.weights.values()
        for weight in self.weights.values():
            yield self.optimizer.state[weight]["exp_avg"]
            yield self.optimizer.state[weight]["exp_avg_sq"]

    def digests(self) -> list[str]:
        return [hashlib.sha256(tensor.cpu().numpy().data).hexdigest() for tensor in self.tensors()]

    def save(self, folder: str) -> Future[None]:
        return begin_to_save(Path(folder), self.weights, self.optimizer, self.weights, {"version": 1})

    def load(self, folder: str) -> None:
        restore(Path(folder), self.weights, self.optimizer, self.weights, ["version"])


def sha256_speed() -> float:
    """GB/s of one core."""
    content = bytes(64 * MIB)
    begun = time.perf_counter()
    hashlib.sha256(content)
    return len(content) / (time.perf_counter() - begun) / 1e9


# Each returns the seconds until everything is on the disk (or in memory), and those that the loop waits.


def with_dd(folder: Path, state: State) -> tuple[float, float]:
    path, megabytes = folder / "dd", max(round(state.bytes / MIB), 1)
    begun = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={megabytes}", "conv=fsync", "status=none"], check=True
    )
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds, seconds


def as_before(folder: Path, state: State) -> tuple[float, float]:
    """What versions before 2026-11-30 did."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    path = folder / "before"
    averages = {
        f"{average}/{name}": value.reshape(1) if value.dim() == 0 else value
        for name, weight in state.weights.items()
        for average, value in state.optimizer.state[weight].items()
    }
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    files = dict.fromkeys(state.weights, 1) | dict.fromkeys(averages, 2)
    begun = time.perf_counter()
    writer = HuggingFaceStorageWriter(str(path), fqn_to_index_mapping=files, save_distributed=True)
    saving: Any = async_save(state.weights | averages, storage_writer=writer)
    waited = time.perf_counter() - begun
    saving.result()
    (path / "sha256.json").write_text(json.dumps(hashes(path)))
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - begun
    shutil.rmtree(path)
    return seconds, waited


def as_now(folder: Path, state: State) -> tuple[float, float]:
    """Leaves the checkpoint for `loaded`."""
    checkpoints = Checkpoints(folder / "now", 1)
    begun = time.perf_counter()
    checkpoints.save(1, cast("Trainer", state), LoopState())
    waited = time.perf_counter() - begun
    checkpoints.finish()
    return time.perf_counter() - begun, waited


def loaded(folder: Path, state: State) -> tuple[float, float]:
    path = folder / "now"
    for file in path.glob("*/*"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wanted = state.digests()
    for tensor in state.tensors():
        tensor.zero_()
    begun = time.perf_counter()
    Checkpoints(path, 1).load(1, state)
    seconds = time.perf_counter() - begun
    assert state.digests() == wanted
    shutil.rmtree(path)
    return seconds, seconds


MEASURES: dict[str, Callable[[Path, State], tuple[float, float]]] = {
    "dd": with_dd,
    "as versions before": as_before,
    "checkpoint": as_now,
    "load": loaded,
}


def print_table(found: dict[str, list[tuple[float, float]]], size: int) -> None:
    """The shares are medians of each repetition's own."""
    print("| | s, median (min–max) | GB/s | share of dd | loop waits, s |")
    print("|---|---|---|---|---|")
    for name, pairs in found.items():
        seconds, waits = zip(*pairs, strict=True)
        shares = [dd / mine for (dd, _), mine in zip(found["dd"], seconds, strict=True)]
        share = (
            "" if name in ("dd", "load") else f"{statistics.median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"
        )
        waited = "" if name in ("dd", "load") else f"{statistics.median(waits):.2f}"
        median = statistics.median(seconds)
        print(
            f"| {name} | {median:.2f} ({min(seconds):.2f}–{max(seconds):.2f}) | {size / median / 1e9:.2f} | {share} | "
            f"{waited} |"
        )


if __name__ == "__main__":
    main()
