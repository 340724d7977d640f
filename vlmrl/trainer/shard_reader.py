"""Read the files of a checkpoint side by side, with torch.distributed.checkpoint's own plan of who reads what.

torch's reader takes one file after the other, and where it is given several threads, it loses the errors of all but the
first. A checkpoint has a file for each 512 MiB (shard_writer.py).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

READING_THREADS = 8


class ShardReader(HuggingFaceStorageReader):
    """Fills the tensors of a state from safetensors files, several files at once."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the slices of the plan. Raises OSError and SafetensorError."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="checkpoint-reading") as pool:
            for _ in pool.map(partial(_read, planner), files.items()):
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(planner: LoadPlanner, file: tuple[str, list[ReadItem]]) -> None:
    path, items = file
    with safe_open(path, framework="pt") as stored:
        for item in items:
            begins_and_sizes = zip(item.storage_offsets, item.lengths, strict=True)
            part = stored.get_slice(item.storage_index.fqn)[
                tuple(slice(begin, begin + size) for begin, size in begins_and_sizes)
            ]
            planner.resolve_tensor(item).detach().copy_(part)
