"""A group at work, run by test_distributed.py as each rank: sums over the ranks, and ways to come to an end."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from vlmrl.errors import RankError
from vlmrl.trainer.distributed import follow, init_from_environment


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


def main(trouble: str) -> int:
    """Rank 0 has everyone add 10 to what the other ranks have."""
    with init_from_environment() as group:
        assert group is not None
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
        if group.rank > 0:
            return follow(group, Summing)
        group.together("make", [(trouble,)] * (group.size - 1), lambda: None)
        try:
            print(group.together("sum", [(r,) for r in range(1, group.size)], lambda: Summing("").sum(10)), flush=True)
        except RankError as error:
            print(error, flush=True)
            return 1
        if trouble == "leader killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
