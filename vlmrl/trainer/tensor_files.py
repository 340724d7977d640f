"""Write safetensors files side by side: tensors are copied into the host's memory, hashed there, and written.

    tensors ─ copied in the order of the files ─▶ host memory ─┬─▶ thread 1: SHA-256, write, fsync of file 1
    (of a GPU or the host)      at most `most_bytes` waiting   ├─▶ thread 2: … of file 2
                                                               └─▶ …

The caller may change the tensors as soon as all of them are copied; that is long before the files are on the disk where
the host has memory for the copies. Where it has not, copying goes on as fast as the disk takes what waits. On a host
with few cores, files are written once all is copied, or no more may wait: the caller should not wait for the hashing.

SHA-256 is computed one block after the other, about 1.7 GB/s on a core that has instructions for it and 0.4 GB/s on one
that has not, so only several files at once can be hashed as fast as a disk writes.

Left out on purpose: tensors that are split over files (a tensor of any size goes into one file, so the largest one may
be the last to be ready), and O_DIRECT (not every file system has it).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COPYING_THREADS = 4

WRITING_THREADS = 8
"""How many files are hashed and written at once."""

CHUNK_BYTES = 2**25
"""How much is copied, hashed and written at a time."""

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""The names of dtypes in a safetensors file, in the order in which the safetensors library puts their tensors: wide
ones first, so that each tensor begins at a multiple of its dtype's width."""

Chunk: TypeAlias = NDArray[np.uint8]
"""[N]; a part of a tensor's bytes, in the host's memory."""

Chunks: TypeAlias = "SimpleQueue[Future[Chunk] | None]"
"""The bytes of one file's tensors, in order; None after the last."""


def cores() -> int:
    """How many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class TensorFile:
    """A safetensors file that is to be written."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """Further texts for the header."""

    def ordered(self) -> dict[str, Tensor]:
        """The tensors as they lie in the file: by dtype, then by name."""
        places = {dtype: place for place, dtype in enumerate(DTYPES)}
        return dict(sorted(self.tensors.items(), key=lambda item: (places[item[1].dtype], item[0])))

    def header(self) -> bytes:
        """The bytes before the first tensor: the length of the JSON text (8 bytes, little-endian), and the text."""
        entries: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        for name, tensor in self.ordered().items():
            begin, end = end, end + tensor.nbytes
            shape = list(tensor.shape)
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def write_files(files: list[TensorFile], most_bytes: int, copied: Callable[[], None]) -> dict[str, str]:
    """Write the files and flush them to the disk → the SHA-256 of each, by its name.

    `most_bytes`: how many bytes of copies may wait in the host's memory; one chunk per file may always. `copied` is
    called once all tensors are copied: from then on they may change. By then `files` is empty, so that nothing here
    holds the memory of a tensor. Raises OSError; then files are left that are not complete.
    """
    waiting = _Waiting(most_bytes)
    paths, headers = [file.path for file in files], [file.header() for file in files]
    queues: list[Chunks] = [SimpleQueue() for _ in files]
    with ThreadPoolExecutor(WRITING_THREADS, thread_name_prefix="checkpoint-files") as writers:
        hashes = [
            writers.submit(_write, path, header, queue, waiting)
            for path, header, queue in zip(paths, headers, queues, strict=True)
        ]
        try:
            _copy_all(files, queues, waiting)
        finally:
            waiting.may_write.set()
            for queue in queues:
                queue.put(None)
        copied()
        return {path.name: digest.result() for path, digest in zip(paths, hashes, strict=True)}


class _Waiting:
    """Counts the bytes that are copied and not yet written."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._changed = threading.Condition()
        self.has_failed = False
        """Whether a file cannot be written, so that the others need not be."""
        self.may_write = threading.Event()
        if cores() >= COPYING_THREADS + WRITING_THREADS:
            self.may_write.set()

    def reserve(self, count: int) -> bool:
        """Wait until there is room for `count` more bytes. Returns False where a file cannot be written."""
        with self._changed:
            if not self._has_room(count):
                self.may_write.set()
                self._changed.wait_for(lambda: self.has_failed or self._has_room(count))
            self._bytes += count
            return not self.has_failed

    def _has_room(self, count: int) -> bool:
        return not self._bytes or self._bytes + count <= self._most_bytes

    def release(self, count: int) -> None:
        with self._changed:
            self._bytes -= count
            self._changed.notify()

    def fail(self) -> None:
        with self._changed:
            self.has_failed = True
            self._changed.notify()


def _copy_all(files: list[TensorFile], queues: list[Chunks], waiting: _Waiting) -> None:
    """Copy the tensors of all files, and empty `files`. Ends early where a file cannot be written."""
    pinned = _Pinned()
    with ThreadPoolExecutor(COPYING_THREADS, thread_name_prefix="checkpoint-copies") as copying:
        for queue in queues:
            for part in _parts(files.pop(0)):
                if not waiting.reserve(part.nbytes):
                    files.clear()
                    return
                queue.put(copying.submit(_copy, part, pinned))
            queue.put(None)


def _parts(file: TensorFile) -> Iterator[Tensor]:
    """The bytes of a file's tensors, uint8 [N], at most `CHUNK_BYTES` at a time."""
    for tensor in file.ordered().values():
        yield from torch.split(tensor.contiguous().reshape(-1).view(torch.uint8), CHUNK_BYTES)


class _Pinned(threading.local):
    """A buffer per thread through which bytes of a GPU are copied: page-locked, so that the GPU writes into it at the
    speed of the bus."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def copy(self, part: Tensor) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._buffer[: part.numel()].copy_(part)


def _copy(part: Tensor, pinned: _Pinned) -> Chunk:
    """The bytes in memory of their own. numpy copies in the calling thread, where torch would start others."""
    copy: Chunk = (part if part.device.type == "cpu" else pinned.copy(part)).numpy().copy()
    return copy


def _write(path: Path, header: bytes, chunks: Chunks, waiting: _Waiting) -> str:
    """Write one file and flush it to the disk → its SHA-256. Raises OSError."""
    digest = hashlib.sha256(header)
    waiting.may_write.wait()
    try:
        with path.open("wb") as file:
            file.write(header)
            while not waiting.has_failed and (copying := chunks.get()) is not None:
                chunk = copying.result()
                digest.update(chunk.data)
                file.write(chunk.data)
                waiting.release(chunk.nbytes)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        waiting.fail()
        raise
    return digest.hexdigest()
