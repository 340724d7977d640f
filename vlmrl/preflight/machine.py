"""The machine that a run would start on, without torch: importing it takes seconds, and a refusal should not."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One that CUDA shows to this process."""

    index: str
    """As `nvidia-smi` counts and CUDA_VISIBLE_DEVICES may name it."""
    name: str
    memory: int
    """Bytes in all, whoever uses them now."""


@dataclass(frozen=True)
class Machine:
    """What is here."""

    gpus: tuple[Gpu, ...]
    cores: int
    """That this process may run on."""
    memory: int
    """Bytes of the host."""
    ranks: int = 1
    """Of the run, that share these GPUs: torchrun's of this host. Slurm may show each of its tasks a GPU of its own."""


def find_machine() -> Machine:
    """This one. Asks `nvidia-smi`, where there is one, which takes a fraction of a second."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Machine(visible(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")), cores, pages * page, ranks)


def visible(listing: str, chosen: str | None) -> tuple[Gpu, ...]:
    """The GPUs of a listing (`index, uuid, name, MiB` per line) that CUDA_VISIBLE_DEVICES leaves over, in its order.

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
    """Its listing; "" where there is none, or its driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ""
