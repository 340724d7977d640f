"""Whether the tiny model learns from reward, in an environment of verifiers, what a tool's pictures mean.

    python -m venv venv && venv/bin/pip install verifiers==0.4.0
    python benchmarks/verifiers_tools.py --python venv/bin/python                   seeds 0, 1 and 2
    python benchmarks/verifiers_tools.py --python venv/bin/python --seeds 0 trainer.max_steps=20
    python benchmarks/verifiers_tools.py --seeds ""                                 the table of the runs that are there

    warm-up   supervised: call the tool, then say a random letter (cards_task.py)
    cards     task=verifiers task.env=vf_cards: the reward is 1 for the letter of the card that was drawn, chance 1/3

A card is drawn at random with each call, so that its letter is nowhere but in the picture that the tool returns. A run
that has ended is not made again, so the benchmark can be interrupted; delete its folder to repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from curves import Curve, draw
from timed_command import REPOSITORY, processor_seconds

from vlmrl.record.metrics import read_metrics

SETTINGS = ("monitor.live=false", "monitor.wandb.mode=disabled", "monitor.report=false")
MEASURED = "measured.json"
"""In the folder of a run that has ended: the processor seconds of its command, in user and system mode."""
ENVIRONMENTS = REPOSITORY / "tests/support/other_packages"
WARMUP_STEPS = 200
WARMUP = (
    *("mode=sft", "model=qwen3vl_tiny", "model.tiny.bpe_merges=600", "task=cards_task:Cards"),
    *("tool=[cards_task:card_tools_draw]", "task.max_turns=2", "orchestrator.max_new_tokens=40"),
    *(f"trainer.warmup.steps={WARMUP_STEPS}", "trainer.warmup.batch_size=32", "trainer.warmup.learning_rate=1e-3"),
    *("trainer.warmup.demonstrations=random", "orchestrator.eval.every=0"),
)
CARDS = (
    *("model=auto", "trainer=scratch", "task=verifiers", "task.env=vf_cards", "task.max_turns=2"),
    *("orchestrator.groups_per_step=8", "orchestrator.group_size=16", "orchestrator.max_new_tokens=40"),
    *("trainer.learning_rate=1e-3", "trainer.max_grad_norm=0.3", "trainer.max_steps=60"),
    *("orchestrator.eval.every=10", "orchestrator.eval.problems=48"),
)
SAMPLED, GREEDY = "eval/reward", "eval/reward_greedy"
COLUMNS = ("run", "RL steps", "before", "sampled", "greedy", "bridged turns", "breaks", "largest mismatch_kl")


def measure(folder: Path, seed: int, python: str, overrides: Sequence[str]) -> None:
    """Warm up, export and train, unless it has run. Raises RuntimeError where a command fails."""
    run, warmup = folder / f"cards_{seed}", folder / f"warmup_{seed}"
    if (run / MEASURED).exists():
        return
    for path in (run, warmup):
        shutil.rmtree(path, ignore_errors=True)
    smaller = [each for each in overrides if each.startswith("trainer.warmup.")]
    processor_seconds([*SETTINGS, *WARMUP, f"seed={seed}", f"hydra.run.dir={warmup}", *smaller], warmup.name)
    processor_seconds(["mode=export", f"resume={warmup}"], "the export")
    (exported,) = (warmup / "export").iterdir()
    chosen = [*SETTINGS, *CARDS, f"model.name={exported.resolve()}", f"task.python={python}", f"seed={seed}"]
    rest = [each for each in overrides if each not in smaller]
    seconds = processor_seconds([*chosen, f"hydra.run.dir={run}", *rest], run.name)
    (run / MEASURED).write_text(json.dumps(seconds))


def report(folder: Path, curves: Path | None) -> None:
    """Print a row for each run in `folder` that has ended, and draw their curves."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    drawn: list[Curve] = []
    for path in sorted(folder.glob(f"cards_*/{MEASURED}")):
        lines = read_metrics(path.parent / "metrics.jsonl")
        evaluated = [line for line in lines if line.get(SAMPLED) is not None]
        bridged = sum(int(line.get("turns/bridged") or 0) for line in lines)
        breaks = max((float(line.get("bridge_break_rate") or 0) for line in lines), default=0.0)
        mismatch = max((float(line.get("mismatch_kl/mean") or 0) for line in lines), default=0.0)
        shares = (evaluated[0][SAMPLED], evaluated[-1][SAMPLED], evaluated[-1][GREEDY])
        label = path.parent.name.replace("_", " ")
        cells = [label, str(lines[-1]["step"]), *(f"{share:.3f}" for share in shares)]
        print(f"| {' | '.join([*cells, f'{bridged:,}', f'{breaks:g}', f'{mismatch:.1e}'])} |")
        drawn.append(Curve(label, [(int(line["step"]), float(line[SAMPLED])) for line in evaluated], is_control=False))
    if curves is not None:
        curves.write_text(draw({"cards of verifiers": drawn}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python", help="of an environment with verifiers 0.4")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--folder", type=Path, default=Path("outputs/verifiers_tools"))
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options, overrides = parser.parse_known_args()
    known = filter(None, [str(ENVIRONMENTS), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(known)
    for seed in filter(None, options.seeds.split(",")):
        measure(options.folder, int(seed), options.python, overrides)
    report(options.folder, options.curves)


if __name__ == "__main__":
    main()
