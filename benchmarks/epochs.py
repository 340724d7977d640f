"""How many sampled tokens the default task takes to its target, with one, two and four epochs per batch.

    python benchmarks/epochs.py [--epochs 1,2,4] [--seeds 0,1] [--steps 400] [--folder outputs/epochs] [override …]

Each run is `python -m vlmrl algorithm.epochs=N` with one more setting: the seed. A batch is learned from in N optimizer
steps, each on all of it. A run that has ended is read from its folder and not made again, so the command may be stopped
and started again; a folder of a run that was stopped must be deleted first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from vlmrl.record.metrics import read_metrics

TARGET = 0.95
"""Of the default run: two evaluations in a row at this held-out reward, sampled, end it."""

SETTINGS = (
    *("monitor.live=false", "monitor.report=false", "monitor.record_rollouts=false", "monitor.vision_gap_every=0"),
    *("monitor.wandb.mode=disabled", "trainer.checkpoint_every=0"),
)


def play(folder: Path, epochs: int, seed: int, steps: int, overrides: list[str]) -> None:
    """Make the run, unless it has ended before."""
    if (folder / "summary.json").exists():
        return
    settings = (f"hydra.run.dir={folder}", f"seed={seed}", f"algorithm.epochs={epochs}", f"trainer.max_steps={steps}")
    command = [sys.executable, "-m", "vlmrl", *SETTINGS, *settings, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def row(folder: Path, epochs: int, seed: int) -> list[object]:
    """The cells of a run: sampled tokens to the first evaluation at 0.5, and to the end."""
    lines = read_metrics(folder / "metrics.jsonl")
    spent, half, evaluated = 0, None, []
    for line in lines:
        spent += int(line.get("tokens/completion") or 0)
        if line.get("eval/reward") is not None:
            evaluated.append(line["eval/reward"])
            if half is None and line["eval/reward"] >= 0.5:
                half = spent
    trained = [line for line in lines if line["step"] > 0]
    reached = len(evaluated) > 1 and min(evaluated[-2:]) >= TARGET
    kls = [line["policy_kl/mean"] for line in trained if line.get("policy_kl/mean") is not None]
    return [
        *(epochs, seed, trained[-1]["step"], "–" if half is None else f"{half:,}"),
        f"{spent:,}" if reached else f"not in {spent:,}",
        f"{evaluated[-1]:.2f}",
        f"{statistics.median(kls):.1e}" if kls else "–",
        f"{trained[-1]['time/elapsed']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", default="1,2,4")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=400, help="the most steps of a run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/epochs"))
    options, overrides = parser.parse_known_args()
    print_row("epochs", "seed", "steps", "tokens to 0.5", "tokens to the target", "reward", "KL per token", "seconds")
    print_row(*["---"] * 8)
    for seed in map(int, options.seeds.split(",")):
        for epochs in map(int, options.epochs.split(",")):
            folder = options.folder / f"epochs_{epochs}_seed_{seed}"
            play(folder, epochs, seed, options.steps, overrides)
            print_row(*row(folder, epochs, seed))


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
