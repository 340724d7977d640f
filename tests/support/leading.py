"""A rank group at work. test_rank_group.py runs this script once per rank.

python leading.py <trouble>        sums over the ranks, or arrays for each rank; `trouble` says what goes wrong
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from vlmrl.errors import RankError
from vlmrl.ranks import heartbeat, meeting, messages
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment

MEMORY = "/memfd:vlmrl"
SILENCE_LIMIT_S = 3.0
"""Instead of a minute."""
LOOKING = ("shared", "nothing shared", "killed looking", "no room")


class Worker:
    """The state of a rank."""

    trouble = ""

    def sum(self, number: int) -> float:
        """The sum of the numbers of all ranks."""
        total = torch.tensor(float(number))
        dist.all_reduce(total)
        return float(total)


@dataclass(frozen=True)
class Begin(Command[Worker, None]):
    """Tell a rank what goes wrong."""

    trouble: str

    def run(self, worker: Worker) -> None:
        worker.trouble = self.trouble


@dataclass(frozen=True)
class Sum(Command[Worker, float]):
    """Take part in a sum over all ranks."""

    number: int

    def run(self, worker: Worker) -> float:
        if self.number == 1 and worker.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.number == 1 and worker.trouble == "raises":
            raise ValueError("no such number")
        if self.number == 1 and worker.trouble == "exits":
            sys.exit("no such number")
        if self.number == 1 and worker.trouble == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.number == 1 and worker.trouble == "stands still":
            threading.Event().wait()
        if self.number == 1 and worker.trouble == "slow":
            time.sleep(2 * SILENCE_LIMIT_S)
            end = time.monotonic() + 2 * SILENCE_LIMIT_S
            while time.monotonic() < end:
                pass
        return worker.sum(self.number)


@dataclass(frozen=True, eq=False)
class Look(Command[Worker, tuple[float, bool]]):
    """Return the mean of `pixels`, and whether this process maps memory that rank 0 shares."""

    pixels: np.ndarray

    def run(self, worker: Worker) -> tuple[float, bool]:
        if self.pixels[0, 0] == 1 and worker.trouble == "killed looking":
            os.kill(os.getpid(), signal.SIGKILL)
        return float(self.pixels.mean()), MEMORY in Path("/proc/self/maps").read_text()


def no_room(path: str, sizes: Sequence[int]) -> list[memoryview]:
    """A `messages._mapped` that finds no memory."""
    raise OSError(12, "Cannot allocate memory")


def look(group: RankGroup) -> None:
    """Send the other ranks 4 MiB each, three times; print their last answers, and how many files stayed open."""
    answers: list[tuple[float, bool]] = []
    before = len(os.listdir("/proc/self/fd"))
    for step in range(3):
        commands = [Look(np.full((1024, 1024), 10 * step + rank, np.float32)) for rank in range(1, group.size)]
        _, answers = group.together(commands, lambda: None)
    print(answers, len(os.listdir("/proc/self/fd")) - before, flush=True)


def limit(trouble: str) -> None:
    """Wait for seconds instead of minutes."""
    heartbeat.BEAT_S = 0.1
    heartbeat.SILENCE_LIMIT_S = SILENCE_LIMIT_S
    if trouble == "stands still":
        heartbeat.STANDSTILL_LIMIT_S = SILENCE_LIMIT_S
    if trouble == "one is missing":
        meeting.MEETING_TIMEOUT_S = 2.0
    if trouble == "stopped while they meet" and os.environ["RANK"] == "1":
        meeting._start_torch = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    elif trouble == "stopped while they meet":
        meeting.MEETING_TIMEOUT_S = 4.0


def lead(group: RankGroup, trouble: str) -> float:
    """Rank 0's part of a sum."""
    if trouble == "leader stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if trouble == "all suspended":
        pids = " ".join(map(str, [os.getpid(), *(link.peer.pid for link in group._links)]))
        script = f"kill -STOP {pids}; sleep {2 * SILENCE_LIMIT_S}; kill -CONT {pids}"
        subprocess.run(["sh", "-c", script], check=True)
    return Worker().sum(10)


def main(trouble: str) -> int:
    """As rank 0: sum 10 and the numbers of the other ranks, or send them pixels."""
    limit(trouble)
    if trouble == "nothing shared":
        del os.memfd_create
    if trouble == "no room" and os.environ["RANK"] == "1":
        messages._mapped = no_room
    with init_from_environment() as group:
        assert group is not None
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
        if group.rank > 0:
            return follow(group, Worker())
        group.together([Begin(trouble)] * (group.size - 1), lambda: None)
        try:
            if trouble in LOOKING:
                look(group)
                return 0
            own, others = group.together([Sum(rank) for rank in range(1, group.size)], lambda: lead(group, trouble))
            print([own, *others], flush=True)
        except RankError as error:
            print(error, flush=True)
            return 1
        if trouble == "leader killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
