"""Write this rank's slices of a state, as torch.distributed.checkpoint has shared them out among the ranks.

    the state of each rank ─ stand-ins without memory ─▶ torch.distributed.checkpoint: which rank writes which slice
                           └─ this rank's tensors ─────▶ tensor_files.py ─▶ files ─▶ hashes, gathered by rank 0

torch's own writer of safetensors copies the whole state, then each tensor twice, and writes in one thread; and it wants
the state in the host's memory first. The files are the same.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from vlmrl.trainer.averages import local
from vlmrl.trainer.checkpoint_files import HASHES, SLICES, TENSORS
from vlmrl.trainer.tensor_files import TensorFile, write_files

FILE_BYTES = 2**29
"""About how large a file of one rank becomes; a larger tensor has a file of its own."""

OWN_CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and slices that has no memory."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device="meta")
    mesh, placements, shape = tensor.device_mesh, tensor.placements, tensor.shape
    return DTensor.from_local(
        local(tensor).to("meta"), mesh, placements, run_check=False, shape=shape, stride=tensor.stride()
    )


def parts(groups: Iterable[Mapping[str, Tensor]], ranks: int) -> dict[str, int]:
    """The number of the file, 1, 2, …, that each tensor belongs to. A group begins a new one, and so does a tensor with
    which a rank's file would become larger than `FILE_BYTES`.

    >>> parts([{"a": torch.zeros(8), "b": torch.zeros(8)}, {"c": torch.zeros(8)}], ranks=1)
    {'a': 1, 'b': 1, 'c': 2}
    """
    found: dict[str, int] = {}
    number = 0
    for group in groups:
        size = FILE_BYTES
        for name, tensor in group.items():
            share = tensor.numel() * tensor.element_size() // ranks
            if not size or size + share > FILE_BYTES:
                number, size = number + 1, 0
            found[name], size = number, size + share
    return found


def room_for_copies(ranks: int) -> int:
    """How many bytes of this host's memory a rank may fill with copies: half of what is available, shared by all ranks,
    as if all were on this host."""
    available: int = psutil.virtual_memory().available
    return min([available, *_left_in_cgroups()]) // 2 // ranks


def _left_in_cgroups() -> list[int]:
    """How many bytes each limit on this process's memory leaves it, as Slurm and containers set them (cgroup v2)."""
    left = []
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text(encoding="ascii").splitlines() if line.startswith("0::"))
        group = CGROUPS / own.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").exists():
                most, used = (
                    (folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
                )
                left += [] if most == "max" else [max(int(most) - int(used), 0)]
    except (OSError, StopIteration, ValueError):
        return left
    return left


@dataclass(frozen=True)
class WrittenFile:
    """What a rank tells rank 0 about a file."""

    name: str
    sha256: str


class ShardWriter(StorageWriter):
    """Writes the tensors of one state once; on rank 0, also the hashes of all ranks' files."""

    def __init__(self, folder: Path, state: Mapping[str, Tensor], parts: Mapping[str, int], most_bytes: int) -> None:
        """`most_bytes`: see `write_files`."""
        self._folder = folder
        self._slices = {name: local(tensor) for name, tensor in state.items()}
        self._parts = parts
        self._most_bytes = most_bytes
        self.copied = threading.Event()
        """Set once this rank's tensors may change."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks, from 1 on."""
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the slices of the plan. Raises OSError."""
        files = self._files(plan)
        self._slices.clear()
        hashes = write_files(files, self._most_bytes, self.copied.set)
        index = plan.items[0].index if plan.items else None
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, 0, WrittenFile(*file)) for file in hashes.items()])  # type: ignore[arg-type]
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the hashes of all ranks' files."""
        written: list[WrittenFile] = [result.storage_data for of_rank in results for result in of_rank]
        (self._folder / HASHES).write_text(json.dumps({file.name: file.sha256 for file in written}), encoding="utf-8")

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _files(self, plan: SavePlan) -> list[TensorFile]:
        count = max(self._parts.values())
        offsets: dict[int, dict[str, Sequence[int]]] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            name = item.index.fqn
            offsets.setdefault(self._parts[name], {})[name] = item.tensor_data.chunk.offsets
        return [
            TensorFile(
                self._folder / f"shard-{plan.storage_data:05d}-model-{part:05d}-of-{count:05d}{TENSORS}",
                {name: self._slices[name] for name in begins},
                {
                    SLICES: json.dumps({name: {"saved_offsets": list(begin)} for name, begin in begins.items()}),
                    "DCP_VERSION": "1.0",
                    "format": "pt",
                },
            )
            for part, begins in sorted(offsets.items())
        ]
