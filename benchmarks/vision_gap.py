"""What the blind control costs: a short run that measures it at every step, against the rest of these steps.

    python benchmarks/vision_gap.py                       the default run's first 60 steps
    python benchmarks/vision_gap.py model=qwen3vl model.name=DIR trainer.max_steps=8

Prints the median seconds of the control and of a step without it, and the share of a run's time that the control takes
at the default `monitor.vision_gap_every`. Medians, because the first calls of a process pay for what stays warm later.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

from vlmrl.cli.main import main
from vlmrl.config.monitor import MonitorConfig
from vlmrl.record.metrics import read_metrics

SHORT = ("trainer.max_steps=60", "orchestrator.eval.every=0", "monitor.wandb.mode=disabled")


def measure(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        code = main([*SHORT, *overrides, "monitor.vision_gap_every=1", f"hydra.run.dir={run}"])
        if code:
            sys.exit(code)
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "time/vision_gap" in line]
    control = median(line["time/vision_gap"] for line in lines)
    step = median(line["time/step"] - line["time/vision_gap"] for line in lines)
    every = MonitorConfig().vision_gap_every
    print(f"blind control {control:.4f} s, a step without it {step:.4f} s, of {len(lines)} steps each")
    print(f"every {every} steps: {control / every / step:.2%} of the run's time")


if __name__ == "__main__":
    measure(sys.argv[1:])
