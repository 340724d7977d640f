"""Two versions of vlmrl make the same runs: metrics and rollouts, bit for bit.

    python benchmarks/same_runs.py OLD NEW [--cases default,other_seed,gspo,shuffled] [--short]

OLD and NEW are the Python interpreters of two virtual environments, each with one version of vlmrl installed. The two
sides of a case run side by side, each in a folder and with a cache of its own. Compared are all lines of metrics.jsonl
and supervised.jsonl without what depends on the clock and the machine (`time/`, `env/`, `throughput/`, `memory/`), all
records of rollouts/ without their seconds, and the names of the images, which are hashes of their pixels. `--short`
ends each run after three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.record.rollouts import read_rollouts

CASES: dict[str, tuple[str, ...]] = {
    "default": ("seed=0",),
    "other_seed": ("seed=1",),
    "gspo": ("algorithm=gspo", "trainer.packing=varlen", "trainer.max_steps=100"),
    "shuffled": ("task.shuffle_images=true", "trainer.max_steps=100"),
}
QUIET = ("monitor.wandb.mode=disabled", "monitor.live=false")
SHORT = ("trainer.max_steps=3", "trainer.warmup.steps=5", "orchestrator.eval.every=2")
VOLATILE = ("time/", "env/", "throughput/", "memory/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="interpreter of the old version")
    parser.add_argument("new", type=Path, help="interpreter of the new version")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--short", action="store_true", help="three steps a run")
    arguments = parser.parse_args()
    differing = 0
    print("| case | metrics lines | supervised lines | rollouts | images | verdict |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases.split(","):
            overrides = (*CASES[case], *QUIET, *(SHORT if arguments.short else ()))
            runs = run_both([arguments.old, arguments.new], Path(folder) / case, overrides)
            counts, difference = compare(*runs)
            differing += difference is not None
            print(f"| {case} | {' | '.join(map(str, counts))} | {difference or 'equal'} |", flush=True)
    sys.exit(1 if differing else 0)


def run_both(pythons: list[Path], folder: Path, overrides: tuple[str, ...]) -> list[Path]:
    """Run each side to its end, side by side → the folders of the runs."""
    started = []
    for number, python in enumerate(pythons):
        home = folder / str(number)
        home.mkdir(parents=True)
        environment = os.environ | {"VLMRL_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        command = [str(python.absolute()), "-m", "vlmrl", *overrides, f"hydra.run.dir={home / 'run'}"]
        output = (home / "output.txt").open("w")
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append((process, home))
    for process, home in started:
        if process.wait() != 0:
            sys.exit(f"{(home / 'output.txt').read_text()}\na run ended with exit code {process.returncode}")
    return [home / "run" for _, home in started]


def compare(old: Path, new: Path) -> tuple[tuple[int, int, int, int], str | None]:
    """(lines of metrics, lines of supervised steps, rollouts, images) of the old run, and the first difference."""
    counts, difference = [], None
    for name in ("metrics.jsonl", "supervised.jsonl"):
        sides = [[steady(line) for line in lines(run / name)] for run in (old, new)]
        counts.append(len(sides[0]))
        difference = difference or first_difference(name, *sides)
    files = [{path.stem: path for path in sorted((run / "rollouts").iterdir())} for run in (old, new)]
    difference = difference or first_difference("rollouts/", *map(list, files))
    rollouts = 0
    for name in files[0].keys() & files[1].keys():
        sides = [list(map(steady_rollout, read_rollouts(side[name]))) for side in files]
        rollouts += len(sides[0])
        difference = difference or first_difference(name, *sides)
    images = [sorted(path.name for path in (run / "images").iterdir()) for run in (old, new)]
    difference = difference or first_difference("images/", *images)
    return (counts[0], counts[1], rollouts, len(images[0])), difference


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines."""
    with path.open() as file:
        yield from map(json.loads, file)


def steady(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock and the machine."""
    return {key: value for key, value in line.items() if not key.startswith(VOLATILE)}


def steady_rollout(record: Any) -> dict[str, Any]:
    """A rollout without its seconds, and with the bits of its float32 numbers: versions before Parquet wrote them as
    the shortest decimals."""
    turns = [dict(turn) for turn in record["turns"]]
    for turn in turns:
        for name in ("logprobs", "trainer_logprobs", "entropies"):
            turn[name] = turn[name] and np.array(turn[name], np.float32).tobytes()
    return {**record, "seconds": None, "turns": turns}


def first_difference(name: str, old: list[Any], new: list[Any]) -> str | None:
    """Where two lists differ first, in words; None where they are equal."""
    if len(old) != len(new):
        return f"{name}: {len(old)} entries against {len(new)}"
    for number, (one, other) in enumerate(zip(old, new, strict=True), 1):
        if one == other:
            continue
        if isinstance(one, dict):
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            return f"{name} entry {number}: {', '.join(sorted(keys)[:5])} differ"
        return f"{name} entry {number}: {one} against {other}"
    return None


if __name__ == "__main__":
    main()
