"""The hardware of this host, found without torch, whose import takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from vlmrl.ranks.environment import number

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA shows to this process."""

    index: str
    """Its number in `nvidia-smi`, by which CUDA_VISIBLE_DEVICES may name it."""
    name: str
    memory: int
    """Total bytes, whether they are in use or not."""


@dataclass(frozen=True)
class Machine:
    """The hardware of a host, and how many ranks share it."""

    gpus: tuple[Gpu, ...]
    cores: int
    """CPU cores that this process may run on."""
    memory: int
    """Bytes of the host's memory."""
    ranks: int = 1
    """Ranks of the run that share these GPUs: torchrun's ranks on this host. (Slurm may show each task its own GPU.)"""


def find_machine() -> Machine:
    """This host. Runs `nvidia-smi` where it is installed, which takes a fraction of a second."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = number(os.environ, "LOCAL_WORLD_SIZE", least=1, default=1)
    return Machine(visible(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")), cores, pages * page, ranks)


def visible(listing: str, chosen: str | None) -> tuple[Gpu, ...]:
    """The GPUs of a listing (`index, uuid, name, MiB` per line) that `chosen`, CUDA_VISIBLE_DEVICES, names, in order.

    >>> listing = "0, GPU-8f, NVIDIA H100, 81559\\n1, GPU-91, NVIDIA H100, 81559"
    >>> [gpu.index for gpu in visible(listing, None)], [gpu.index for gpu in visible(listing, "1")]
    (['0', '1'], ['1'])
    >>> visible(listing, ""), visible("", "0,1")
    ((), ())
    """
    gpus: dict[str, Gpu] = {}
    for line in listing.splitlines():
        index, uuid, name, mebibytes = (part.strip() for part in line.split(","))
        gpus[index] = gpus[uuid] = Gpu(index, name, int(mebibytes) * MIB)
    if chosen is None:
        return tuple(dict.fromkeys(gpus.values()))
    return tuple(gpus[one] for one in chosen.split(",") if one in gpus)


def _nvidia_smi() -> str:
    """The listing of `nvidia-smi`; "" where it is not installed or its driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            query, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout
    except (subprocess.SubprocessError, OSError):
        return ""
