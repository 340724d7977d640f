"""Whether the tiny model learns to act by what it sees, and what a policy that sees nothing reaches.

    python benchmarks/environments.py                                   every goal, seeds 0, 1 and 2, and the control
    python benchmarks/environments.py --goals room_5 --seeds 0 trainer.max_steps=20
    python benchmarks/environments.py --goals "" --curves curves.svg    the table of the runs that are there

    right     MiniGrid-Empty-Random-5x5 after 150 supervised steps on right moves, which leave it at a third
    room_5    MiniGrid-Empty-Random-5x5 after a warm-up on random moves: experiment=minigrid_tiny
    room_6    MiniGrid-Empty-Random-6x6, likewise
    lakes     FrozenLake on random maps, likewise: experiment=frozenlake_tiny
    one_lake  FrozenLake on its one map, 60 steps of 288 rollouts: a test of speed, because it can be solved blind

The rewards of the last evaluation are those of starts that were never trained on. The control shows noise in place of
every frame (`task.noise=true`): what it reaches is what can be done blind. It runs for as many steps as its seed did.

A run that has ended is not made again, so the benchmark can be interrupted; delete its folder to repeat it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from curves import Curve, draw
from timed_command import processor_seconds

from vlmrl.record.metrics import Record, read_metrics

SETTINGS = ("monitor.live=false", "monitor.wandb.mode=disabled")
MEASURED = "measured.json"
"""In the folder of a run that has ended: the processor seconds of its command, in user and system mode."""
SAMPLED, GREEDY = "eval/task/success", "eval/task/success_greedy"
VISION_GAP = "vision_gap/shuffled"
CONTROL = "noise"
COLUMNS = (
    *("goal", "run", "RL steps", "rollouts", "before", "sampled", "greedy", "best sampled", "vision gap"),
    "processor s",
)

ROOM_6 = (
    *("task.env_id=minigrid:MiniGrid-Empty-Random-6x6-v0", "task.frame_size=96", "task.max_turns=12"),
    *("task.holdout_one_in=8", "orchestrator.groups_per_step=6", "trainer.max_steps=400"),
)
RIGHT_MOVES = (
    *("trainer.warmup.demonstrations=correct", "trainer.warmup.steps=150", "trainer.warmup.batch_size=32"),
    "trainer.warmup.learning_rate=1.5e-3",
)
ONE_LAKE = (
    *("task.env_id=FrozenLake-v1", "~task.env_kwargs.size", "~task.env_kwargs.pixels"),
    *("+task.env_kwargs.is_slippery=false", "orchestrator.groups_per_step=18", "trainer.max_steps=60"),
)
GOALS = {
    "right": ("experiment=minigrid_tiny", *RIGHT_MOVES),
    "room_5": ("experiment=minigrid_tiny",),
    "room_6": ("experiment=minigrid_tiny", *ROOM_6),
    "lakes": ("experiment=frozenlake_tiny",),
    "one_lake": ("experiment=frozenlake_tiny", *ONE_LAKE),
}
"""Row of the table → overrides of the command."""


def run_of(folder: Path, name: str, seed: int, is_control: bool) -> Path:
    """The folder of a run."""
    return folder / f"{name}_{CONTROL if is_control else 'seed'}_{seed}"


def measure(folder: Path, name: str, seed: int, is_control: bool, overrides: list[str]) -> None:
    """Run the command, unless it has run. Raises RuntimeError where it fails."""
    run = run_of(folder, name, seed, is_control)
    if (run / MEASURED).exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    chosen = [*SETTINGS, *GOALS[name], f"seed={seed}", f"hydra.run.dir={run}"]
    if is_control:
        chosen += ["task.noise=true", *_steps_of(run_of(folder, name, seed, is_control=False))]
    (run / MEASURED).write_text(json.dumps(processor_seconds([*chosen, *overrides], run.name)))


def _steps_of(run: Path) -> list[str]:
    """The override that gives a control as many steps as `run` took; none where that has not run."""
    if not (run / MEASURED).exists():
        return []
    return [f"trainer.max_steps={read_metrics(run / 'metrics.jsonl')[-1]['step']}"]


def report(folder: Path, curves: Path | None) -> None:
    """Print a row for each run in `folder` that has ended, and draw their curves."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    drawn: dict[str, list[Curve]] = {}
    for name in GOALS:
        for path in sorted(folder.glob(f"{name}_*_*/{MEASURED}"), key=lambda path: (CONTROL in str(path), path)):
            _, what, seed = path.parent.name.rsplit("_", 2)
            label = f"{what} {seed}"
            lines = read_metrics(path.parent / "metrics.jsonl")
            evaluated = [line for line in lines if line.get(SAMPLED) is not None]
            print(f"| {' | '.join([name, label, *_numbers(lines, evaluated)])} | {json.loads(path.read_text()):.0f} |")
            points = [(int(line["step"]), float(line[SAMPLED])) for line in evaluated]
            drawn.setdefault(name, []).append(Curve(label, points, is_control=what == CONTROL))
    if curves is not None:
        curves.write_text(draw(drawn), encoding="utf-8")


def _numbers(lines: Sequence[Record], evaluated: Sequence[Record]) -> list[str]:
    """The cells between the label and the processor seconds."""
    first, last = evaluated[0], evaluated[-1]
    rollouts = sum(int(line.get("rollouts/total") or 0) for line in lines)
    gaps = [line[VISION_GAP] for line in lines if line.get(VISION_GAP) is not None]
    shares = (first[SAMPLED], last[SAMPLED], last[GREEDY], max(line[SAMPLED] for line in evaluated))
    return [
        *(str(lines[-1]["step"]), f"{rollouts:,}"),
        *(f"{share:.3f}" for share in shares),
        f"{gaps[-1]:.2f}" if gaps else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", default=",".join(GOALS), help="names, with commas between them")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--controls", default="0", help="seeds of the control")
    parser.add_argument("--folder", type=Path, default=Path("outputs/environments"))
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options, overrides = parser.parse_known_args()
    for is_control, seeds in ((False, options.seeds), (True, options.controls)):
        for seed in filter(None, seeds.split(",")):
            for name in filter(None, options.goals.split(",")):
                measure(options.folder, name, int(seed), is_control, overrides)
    report(options.folder, options.curves)


if __name__ == "__main__":
    main()
