"""Whether the tiny model learns from reward alone to see time in clips, and what it reaches without their order.

    python benchmarks/clip_direction.py                                 seeds 0, 1 and 2, and the two controls
    python benchmarks/clip_direction.py --seeds 0 trainer.max_steps=20
    python benchmarks/clip_direction.py --seeds "" --controls ""        the table of the runs that are there

    clips      experiment=clip_tiny
    shuffled   the same with the frames of each clip in another order: task.frames=shuffled
    first      the same with the first frame alone: task.frames=first

The rewards are those of held-out clips: the share whose two answers are right. The frames without their order leave one
clip in four, the first frame alone one in sixteen. The gaps are those of the last steps (docs/trust.md).

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

SETTINGS = ("monitor.live=false", "monitor.wandb.mode=disabled", "trainer.checkpoint_every=0")
MEASURED = "measured.json"
"""In the folder of a run that has ended: the processor seconds of its command, in user and system mode."""
KINDS = {"clips": (), "shuffled": ("task.frames=shuffled",), "first": ("task.frames=first",)}
"""Kind of run → overrides of the experiment."""
EVALUATED = ("eval/reward", "eval/reward_greedy", "eval/task/way", "eval/task/first_color")
GAPS = ("vision_gap/shuffled", "vision_gap/order", "vision_gap/first_frame")
COLUMNS = (
    *("run", "RL steps", "before", "sampled", "greedy", "way", "first color"),
    *("gap: other clips", "gap: order", "gap: first frame", "mismatch_kl", "processor s"),
)


def measure(folder: Path, kind: str, seed: int, overrides: list[str]) -> None:
    """Run the command, unless it has run. Raises RuntimeError where it fails."""
    run = folder / f"{kind}_{seed}"
    if (run / MEASURED).exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    chosen = (*SETTINGS, "experiment=clip_tiny", *KINDS[kind], f"seed={seed}", f"hydra.run.dir={run}")
    (run / MEASURED).write_text(json.dumps(processor_seconds([*chosen, *overrides], run.name)))


def report(folder: Path, curves: Path | None) -> None:
    """Print a row for each run in `folder` that has ended, and draw their curves."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    drawn: dict[str, list[Curve]] = {"clip_direction": []}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}_*/{MEASURED}")):
            label = path.parent.name.replace("_", " ")
            lines = read_metrics(path.parent / "metrics.jsonl")
            evaluated = [line for line in lines if line.get(EVALUATED[0]) is not None]
            last = [evaluated[-1][name] for name in EVALUATED]
            gaps = [[line[name] for line in lines if line.get(name) is not None] for name in GAPS]
            mismatch = max(line["mismatch_kl/mean"] for line in lines if line.get("mismatch_kl/mean") is not None)
            cells = [label, str(lines[-1]["step"]), f"{evaluated[0][EVALUATED[0]]:.3f}"]
            cells += [f"{share:.3f}" for share in last]
            cells += [f"{found[-1]:.2f}" if found else "" for found in gaps]
            cells += [f"{mismatch:.0e}", f"{json.loads(path.read_text()):.0f}"]
            print(f"| {' | '.join(cells)} |")
            points = [(int(line["step"]), float(line[EVALUATED[0]])) for line in evaluated]
            drawn["clip_direction"].append(Curve(label, points, is_control=kind != "clips"))
    if curves is not None:
        curves.write_text(draw(drawn), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--controls", default="0", help="seeds of the controls")
    parser.add_argument("--folder", type=Path, default=Path("outputs/clip_direction"))
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options, overrides = parser.parse_known_args()
    for kind in KINDS:
        for seed in filter(None, (options.seeds if kind == "clips" else options.controls).split(",")):
            measure(options.folder, kind, int(seed), overrides)
    report(options.folder, options.curves)


if __name__ == "__main__":
    main()
