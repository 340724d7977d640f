"""Runs that are killed by SIGKILL again and again leave the record of a run that was never disturbed, bit for bit.

    python benchmarks/kills.py [--kills 100] [--jobs 2] [--seed 0]

Each run is started, killed five times, each time after a resume, and resumed to its end. Two of five kills come inside
a checkpoint write: before a random file operation on a checkpoint that is being written or deleted. The others come at
a random moment between the start of the process and the time in which an undisturbed run is done. Half of the runs are
of `task=color_codeword`, the other half of a task in which four of six problems go wrong. Compared are metrics.jsonl
and supervised.jsonl (without what depends on the clock), faults.jsonl, all rollouts, images, tokens.jsonl, the tensors
and loop.json of the newest checkpoint, and the names of all files. The processes are forked from one that has imported
vlmrl (tests/support/processes.py).
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.command_line import Home  # noqa: E402
from support.kills import LONG, TASKS, Kill, differences, kill_and_resume  # noqa: E402

PLAN: tuple[Kill, ...] = ("moment", "write", "moment", "write", "moment")
"""The kills of one run, in a random order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    kills: dict[str, Counter[Kill]] = {name: Counter() for name in TASKS}
    runs, equal, litter = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        home = Home(Path(folder))
        shutil.copy(TESTS / "support/their_tasks.py", folder)
        whole_s = {name: undisturbed(home, name) for name in TASKS}
        choose = random.Random(arguments.seed)

        def one(number: int, plan: Sequence[Kill], seed: int) -> None:
            name = list(TASKS)[number % len(TASKS)]
            if sum(counted.total() for counted in kills.values()) >= arguments.kills:
                return
            words = (*TASKS[name], *LONG)
            killed = kill_and_resume(home, f"killed_{number}", words, plan, seed, whole_s[name])
            found = differences(killed.run, folder_of(home, name)) if killed.code == 0 else [killed.err]
            kills[name] += killed.kills
            runs[name] += 1
            equal[name] += not found
            litter[name] += len(list(killed.run.rglob("*.tmp"))) + len(list(killed.run.rglob("partial_*")))
            print(f"run {number}: {name}, {dict(killed.kills)}, {found or 'equal'}", file=sys.stderr, flush=True)
            shutil.rmtree(killed.run)

        plans = [(choose.sample(PLAN, len(PLAN)), choose.randrange(1 << 30)) for _ in range(arguments.kills)]
        for done in [pool.submit(one, number, *plan) for number, plan in enumerate(plans)]:
            done.result()
    print("| task | runs | kills at a random moment | inside a checkpoint write | equal runs | files left over |")
    print("|---|---|---|---|---|---|")
    for name in TASKS:
        counts = (runs[name], kills[name]["moment"], kills[name]["write"], equal[name], litter[name])
        print(f"| {name} | {' | '.join(map(str, counts))} |")
    print(f"\n{time.monotonic() - started:.0f} seconds.")
    sys.exit(0 if equal == runs else 1)


def folder_of(home: Home, name: str) -> Path:
    """The folder of the undisturbed run of a task."""
    return home.path / "outputs" / f"undisturbed_{name}"


def undisturbed(home: Home, name: str) -> float:
    """Make the undisturbed run of a task → its seconds."""
    for _ in range(2):  # the first one also builds the tiny checkpoint
        shutil.rmtree(folder_of(home, name), ignore_errors=True)
        ended = home.vlmrl(*TASKS[name], *LONG, f"hydra.run.dir={folder_of(home, name)}")
        assert ended.code == 0, ended.err
    return ended.seconds


if __name__ == "__main__":
    main()
