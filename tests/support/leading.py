"""A group at work, run by test_distributed.py as each rank: sums over the ranks, and ways to come to an end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from vlmrl.errors import RankError
from vlmrl.ranks import messages
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment

MEMORY = "/memfd:vlmrl"
LOOKING = ("shared", "nothing shared", "killed looking", "no room")


class Summing:
    """What the ranks do."""

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def sum(self, number: int) -> float:
        """Of the numbers of all ranks."""
        if number == 1 and self._trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and self._trouble == "raises":
            raise ValueError("no such number")
        total = torch.tensor(float(number))
        dist.all_reduce(total)
        return float(total)

    def look(self, pixels: np.ndarray) -> tuple[float, bool]:
        """Their mean, and whether this process maps memory that it shares."""
        if pixels[0, 0] == 1 and self._trouble == "killed looking":
            os.kill(os.getpid(), signal.SIGKILL)
        return float(pixels.mean()), MEMORY in Path("/proc/self/maps").read_text()


def no_room(path: str, sizes: Sequence[int]) -> list[memoryview]:
    """In place of `messages._mapped`."""
    raise OSError(12, "Cannot allocate memory")


def look(group: RankGroup) -> None:
    """Have the other ranks look at 4 MiB each, three times; print what the last saw, and how many files were opened."""
    answers: list[tuple[float, bool]] = []
    before = len(os.listdir("/proc/self/fd"))
    for step in range(3):
        shares = [(np.full((1024, 1024), 10 * step + rank, np.float32),) for rank in range(1, group.size)]
        _, *answers = group.together("look", shares, lambda: (0.0, False))
    print(answers, len(os.listdir("/proc/self/fd")) - before, flush=True)


def main(trouble: str) -> int:
    """Rank 0 has everyone add 10 to what the other ranks have, or look at pixels."""
    if trouble == "nothing shared":
        del os.memfd_create
    if trouble == "no room" and os.environ["RANK"] == "1":
        messages._mapped = no_room
    with init_from_environment() as group:
        assert group is not None
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
        if group.rank > 0:
            return follow(group, Summing)
        group.together("make", [(trouble,)] * (group.size - 1), lambda: None)
        try:
            if trouble in LOOKING:
                look(group)
                return 0
            print(group.together("sum", [(r,) for r in range(1, group.size)], lambda: Summing("").sum(10)), flush=True)
        except RankError as error:
            print(error, flush=True)
            return 1
        if trouble == "leader killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
