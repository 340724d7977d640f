"""Whether a data set without code is learned from its pictures: experiment=digits_tiny with three seeds and a control.

    python benchmarks/digits.py                         seeds 0, 1 and 2, then the control; writes the data itself
    python benchmarks/digits.py --seeds 0 trainer.max_steps=50

Each seed reads another form of the same rows: JSONL with paths, Parquet with bytes, a folder of `save_to_disk`. The
control shows the pictures of other rows (`task.shuffle_images=true`), so nothing but chance can be reached. The table
has the last evaluation, on all 297 held-out digits, and the processor seconds of the whole command.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from vlmrl.record.metrics import EVAL_GREEDY, EVAL_SAMPLED, read_metrics

WRITE_DIGITS = Path(__file__).parents[1] / "docs" / "write_digits.py"
FORMS = {
    "JSONL, paths": ("task.path=digits/train.jsonl", "task.eval_path=digits/test.jsonl"),
    "Parquet, bytes": ("task.path=digits/train.parquet", "task.eval_path=digits/test.parquet"),
    "save_to_disk": ("task.path=digits/hf", "task.eval_path=null", "task.eval_split=test"),
}


def processor_seconds() -> float:
    """Seconds of processor time of all ended children, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def held_out(folder: Path, name: str, overrides: list[str]) -> tuple[float, float]:
    """Run the experiment and return its last (sampled, greedy) held-out reward."""
    run = folder / name
    command = [sys.executable, "-m", "vlmrl", "experiment=digits_tiny", f"hydra.run.dir={run}", "monitor.live=false"]
    repository = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (repository, os.environ.get("PYTHONPATH"))))}
    ended = subprocess.run([*command, *overrides], cwd=folder, stdout=subprocess.DEVNULL, check=False, env=environment)
    if ended.returncode:
        sys.exit(ended.returncode)
    last = [line for line in read_metrics(run / "metrics.jsonl") if EVAL_SAMPLED in line][-1]
    return last[EVAL_SAMPLED], last[EVAL_GREEDY]


def measure(seeds: list[int], overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, str(WRITE_DIGITS), "digits"], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        print("| run | rows from | sampled | greedy | processor s |\n|---|---|---|---|---|", flush=True)
        rewards = []
        for seed in seeds:
            form = list(FORMS)[seed % len(FORMS)]
            begun = processor_seconds()
            sampled, greedy = held_out(folder, f"seed{seed}", [f"seed={seed}", *FORMS[form], *overrides])
            rewards.append((sampled, greedy))
            spent = processor_seconds() - begun
            print(f"| seed {seed} | {form} | {sampled:.3f} | {greedy:.3f} | {spent:.0f} |", flush=True)
        both = [mean(column) for column in zip(*rewards, strict=True)]
        print(f"| mean | | {both[0]:.3f} | {both[1]:.3f} | |", flush=True)
        begun = processor_seconds()
        sampled, greedy = held_out(folder, "control", ["task.shuffle_images=true", *overrides])
        spent = processor_seconds() - begun
        print(f"| control: pictures of other rows | JSONL, paths | {sampled:.3f} | {greedy:.3f} | {spent:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn handwritten digits with three seeds, and a control.")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    arguments, more = parser.parse_known_args()
    measure([int(seed) for seed in arguments.seeds.split(",")], more)
