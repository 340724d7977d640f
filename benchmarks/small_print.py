"""Whether the tiny model learns to read a small print with a zoom, and what it reaches without.

    python benchmarks/small_print.py                                    seeds 0, 1 and 2, and the control
    python benchmarks/small_print.py --seeds 0 trainer.max_steps=20
    python benchmarks/small_print.py --seeds "" --controls ""           the table of the runs that are there

    zoom      experiment=small_print_tiny
    control   the same without the tool: tool=[] task.max_turns=1 task.demonstrated_zooms=0

The rewards are those of held-out problems: the share of right answers, less that of answers which are none of the four
letters. Chance is 0.25. The bridged turns are those of all training rollouts of a run; each shows the result of a call.

A run that has ended is not made again, so the benchmark can be interrupted; delete its folder to repeat it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from curves import Curve, draw
from timed_command import processor_seconds

from vlmrl.record.metrics import read_metrics

SETTINGS = ("monitor.live=false", "monitor.wandb.mode=disabled")
MEASURED = "measured.json"
"""In the folder of a run that has ended: the processor seconds of its command, in user and system mode."""
KINDS = {"zoom": (), "control": ("tool=[]", "task.max_turns=1", "task.demonstrated_zooms=0")}
"""Kind of run → overrides of the experiment."""
SAMPLED, GREEDY = "eval/reward", "eval/reward_greedy"
COLUMNS = ("run", "RL steps", "before", "sampled", "greedy", "bridged turns", "breaks", "calls", "processor s")


def measure(folder: Path, kind: str, seed: int, overrides: list[str]) -> None:
    """Run the command, unless it has run. Raises RuntimeError where it fails."""
    run = folder / f"{kind}_{seed}"
    if (run / MEASURED).exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    chosen = (*SETTINGS, "experiment=small_print_tiny", *KINDS[kind], f"seed={seed}", f"hydra.run.dir={run}")
    (run / MEASURED).write_text(json.dumps(processor_seconds([*chosen, *overrides], run.name)))


def report(folder: Path, curves: Path | None) -> None:
    """Print a row for each run in `folder` that has ended, and draw their curves."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    drawn: dict[str, list[Curve]] = {"small_print": []}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}_*/{MEASURED}")):
            label = path.parent.name.replace("_", " ")
            lines = read_metrics(path.parent / "metrics.jsonl")
            evaluated = [line for line in lines if line.get(SAMPLED) is not None]
            bridged = sum(int(line.get("turns/bridged") or 0) for line in lines)
            breaks = max((float(line.get("bridge_break_rate") or 0) for line in lines), default=0.0)
            calls = [line["tools/calls"] for line in lines if line.get("tools/calls") is not None]
            shares = (evaluated[0][SAMPLED], evaluated[-1][SAMPLED], evaluated[-1][GREEDY])
            cells = [label, str(lines[-1]["step"]), *(f"{share:.3f}" for share in shares), f"{bridged:,}"]
            cells += [f"{breaks:g}", f"{calls[-1]:.2f}" if calls else "", f"{json.loads(path.read_text()):.0f}"]
            print(f"| {' | '.join(cells)} |")
            points = [(int(line["step"]), float(line[SAMPLED])) for line in evaluated]
            drawn["small_print"].append(Curve(label, points, is_control=kind == "control"))
    if curves is not None:
        curves.write_text(draw(drawn), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--controls", default="0", help="seeds of the control")
    parser.add_argument("--folder", type=Path, default=Path("outputs/small_print"))
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options, overrides = parser.parse_known_args()
    for kind, seeds in (("zoom", options.seeds), ("control", options.controls)):
        for seed in filter(None, seeds.split(",")):
            measure(options.folder, kind, int(seed), overrides)
    report(options.folder, options.curves)


if __name__ == "__main__":
    main()
