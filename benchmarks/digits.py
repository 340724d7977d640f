"""Whether a data set without code is learned from its pictures: experiment=digits_tiny with three seeds and a control.

    python benchmarks/digits.py                         seeds 0, 1 and 2, then the control; writes the data itself
    python benchmarks/digits.py --jobs 4                all four runs at once, where four cores are free
    python benchmarks/digits.py --seeds 0 trainer.max_steps=50

Each seed reads another form of the same rows: JSONL with paths, Parquet with bytes, a folder of `save_to_disk`. The
control shows the pictures of other rows (`task.shuffle_images=true`), so nothing but chance can be reached. The table
has the last evaluation, on all 297 held-out digits, and the processor seconds of the whole command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from timed_command import processor_seconds

from vlmrl.record.metrics import EVAL_GREEDY, EVAL_SAMPLED, read_metrics

WRITE_DIGITS = Path(__file__).parents[1] / "docs" / "write_digits.py"
FORMS = {
    "JSONL, paths": ("task.path=digits/train.jsonl", "task.eval_path=digits/test.jsonl"),
    "Parquet, bytes": ("task.path=digits/train.parquet", "task.eval_path=digits/test.parquet"),
    "save_to_disk": ("task.path=digits/hf", "task.eval_path=null", "task.eval_split=test"),
}


@dataclass(frozen=True)
class Run:
    """A run of the experiment."""

    name: str
    form: str
    overrides: list[str]


@dataclass(frozen=True)
class Measured:
    """The last evaluation of a run, and the processor seconds of its command in user and system mode."""

    sampled: float
    greedy: float
    seconds: float


def measure(folder: Path, run: Run) -> Measured:
    """Run the command. Raises RuntimeError where it fails."""
    output = folder / run.name.split(":")[0].replace(" ", "")
    settings = ("experiment=digits_tiny", f"hydra.run.dir={output}", "monitor.live=false")
    seconds = processor_seconds([*settings, *run.overrides], f"the {run.name}", folder)
    last = [line for line in read_metrics(output / "metrics.jsonl") if EVAL_SAMPLED in line][-1]
    return Measured(last[EVAL_SAMPLED], last[EVAL_GREEDY], seconds)


def measure_all(seeds: list[int], jobs: int, overrides: list[str]) -> None:
    """Run each seed and the control, `jobs` at a time, and print the table."""
    forms = [list(FORMS)[seed % len(FORMS)] for seed in seeds]
    runs = [
        Run(f"seed {seed}", form, [f"seed={seed}", *FORMS[form], *overrides])
        for seed, form in zip(seeds, forms, strict=True)
    ]
    control = Run("control: pictures of other rows", "JSONL, paths", ["task.shuffle_images=true", *overrides])
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as threads:
        folder = Path(name)
        subprocess.run([sys.executable, str(WRITE_DIGITS), "digits"], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        print("| run | rows from | sampled | greedy | processor s |\n|---|---|---|---|---|", flush=True)
        found = list(threads.map(lambda run: measure(folder, run), [*runs, control]))
    for run, ended in zip(runs, found, strict=False):
        print(f"| {run.name} | {run.form} | {ended.sampled:.3f} | {ended.greedy:.3f} | {ended.seconds:.0f} |")
    of_seeds = found[:-1]
    print(f"| mean | | {mean(one.sampled for one in of_seeds):.3f} | {mean(one.greedy for one in of_seeds):.3f} | |")
    ended = found[-1]
    print(f"| {control.name} | {control.form} | {ended.sampled:.3f} | {ended.greedy:.3f} | {ended.seconds:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn handwritten digits with three seeds, and a control.")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, more = parser.parse_known_args()
    measure_all([int(seed) for seed in arguments.seeds.split(",")], arguments.jobs, more)
