"""Which algorithm when: the table and the curves of the sweep `arena`.

    python -m vlmrl +sweep=arena                        the runs; started again, the sweep goes on where it was
    python -m vlmrl +sweep=arena hydra/launcher=joblib hydra.launcher.n_jobs=8
    python benchmarks/arena.py                          take in the runs that have finished, print the tables
    python benchmarks/arena.py --curves arena.svg

Each finished run is one line of arena.jsonl, which is committed: what ran (task, algorithm, learning rate, seed, a hash
of its config), where (processor, torch), and its held-out rewards over the tokens that it had sampled. A job that ran
again with another config replaces its line; one that is there already is not taken in again. Tables and curves are made
from the lines alone.

A task's runs are compared at equal sampled tokens: the fewest that any of its runs sampled in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from curves import Curve, draw

from vlmrl.record.metrics import EVAL_GREEDY, EVAL_SAMPLED, read_metrics
from vlmrl.record.run_dir import RunDir

LINES = Path(__file__).with_name("arena.jsonl")
HASHED = ("algorithm", "model", "orchestrator", "reward", "task", "trainer")
"""Parts of the config that say what a run computes, beside its seed."""
ENDED = ("finished", "target_reached")
HALF_WAY = 0.5
LAST = 3
"""Evaluations at the end whose mean is a run's score: one alone is noisy."""


@dataclass(frozen=True)
class Line:
    """A run that has finished."""

    task: str
    algorithm: str
    learning_rate: float
    seed: int
    config: str
    """Hash of what it computes."""
    machine: str
    seconds: float
    points: list[list[float]]
    """Of each evaluation: sampled tokens so far, held-out reward sampled, and greedy."""

    @property
    def job(self) -> tuple[str, str, float, int]:
        """What the sweep calls it."""
        return self.task, self.algorithm, self.learning_rate, self.seed

    def score(self, tokens: float) -> float:
        """Held-out reward, sampled: the mean of the last evaluations within so many sampled tokens."""
        return statistics.mean([sampled for at, sampled, _ in self.points if at <= tokens][-LAST:])


def read(path: Path) -> list[Line]:
    """The lines that are there."""
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def line_of(run: Path, overrides: dict[str, str], machine: str) -> Line | None:
    """The line of a job's folder; None where it has not finished."""
    summary = run / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["exit_reason"] not in ENDED:
        return None
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    what = {part: config[part] for part in HASHED if part in config}
    points, tokens, seconds = [], 0.0, 0.0
    for record in read_metrics(run / "metrics.jsonl"):
        tokens += record.get("tokens/completion") or 0.0
        seconds += record.get("time/step") or 0.0
        if record.get(EVAL_SAMPLED) is not None:
            points.append([tokens, round(record[EVAL_SAMPLED], 4), round(record[EVAL_GREEDY], 4)])
    return Line(
        task=overrides["experiment"].removeprefix("arena_"),
        algorithm=overrides["algorithm"],
        learning_rate=float(overrides["trainer.learning_rate"]),
        seed=int(overrides["seed"]),
        config=hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12],
        machine=machine,
        seconds=round(seconds, 1),
        points=points,
    )


def take_in(sweep: Path, path: Path, machine: str) -> list[Line]:
    """All lines, those of newly finished jobs in the folder of the sweep included."""
    lines = {line.job: line for line in read(path)}
    for config in sorted(sweep.glob("*/config.yaml")):
        overrides = dict(each.split("=", 1) for each in RunDir(config.parent).read_overrides() or ())
        line = line_of(config.parent, overrides, machine)
        if line is not None and (line.job not in lines or lines[line.job].config != line.config):
            lines[line.job] = line
    found = [lines[job] for job in sorted(lines)]
    path.write_text("".join(json.dumps(asdict(line)) + "\n" for line in found))
    return found


def tables(lines: Sequence[Line]) -> Iterable[str]:
    """The lines of a table for each task: an algorithm's score at each rate, and more of its best rate."""
    by_task: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_task[line.task].append(line)
    for task, of_task in sorted(by_task.items()):
        tokens = min(line.points[-1][0] for line in of_task)
        rates = sorted({line.learning_rate for line in of_task})
        head = ("algorithm", *(f"{rate:g}" for rate in rates), "best rate", "seeds there", f"tokens to {HALF_WAY}")
        yield f"\n**{task}**, {tokens:,.0f} sampled tokens a run, {len(of_task)} runs\n"
        yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
        for algorithm in sorted({line.algorithm for line in of_task}):
            runs = [line for line in of_task if line.algorithm == algorithm]
            yield f"| {' | '.join([algorithm, *_cells(runs, rates, tokens)])} |"


def _cells(runs: Sequence[Line], rates: Sequence[float], tokens: float) -> Iterable[str]:
    scores = {rate: [run.score(tokens) for run in runs if run.learning_rate == rate] for rate in rates}
    yield from (f"{statistics.mean(found):.3f}" if found else "–" for found in scores.values())
    best = best_rate(runs, tokens)
    yield f"{best:g}"
    yield ", ".join(f"{score:.3f}" for score in scores[best])
    reached = [_tokens_to(run, HALF_WAY) for run in runs if run.learning_rate == best]
    yield ", ".join("not" if each is None else f"{each / 1e3:,.0f} k" for each in reached)


def best_rate(runs: Sequence[Line], tokens: float) -> float:
    """The learning rate with the best mean score over its seeds."""
    rates = {run.learning_rate for run in runs}
    return max(rates, key=lambda rate: statistics.mean(run.score(tokens) for run in runs if run.learning_rate == rate))


def _tokens_to(run: Line, reward: float) -> float | None:
    return next((tokens for tokens, sampled, _ in run.points if sampled >= reward), None)


def curves(lines: Sequence[Line]) -> dict[str, list[Curve]]:
    """For each task, each algorithm's curve at its best rate: the mean over its seeds."""
    panels: dict[str, list[Curve]] = {}
    for task in sorted({line.task for line in lines}):
        of_task = [line for line in lines if line.task == task]
        tokens = min(line.points[-1][0] for line in of_task)
        for algorithm in sorted({line.algorithm for line in of_task}):
            runs = [line for line in of_task if line.algorithm == algorithm]
            best = best_rate(runs, tokens)
            chosen = [run.points for run in runs if run.learning_rate == best]
            means = [
                (int(statistics.mean(at for at, _, _ in points)), statistics.mean(sampled for _, sampled, _ in points))
                for points in zip(*chosen, strict=False)
            ]
            panels.setdefault(task, []).append(Curve(algorithm, means, is_control=False))
    return panels


def this_machine() -> str:
    """The processor and torch."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, default=Path("outputs/multirun/arena"))
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--machine", default=None, help="where the runs ran; by default this machine")
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options = parser.parse_args()
    lines = take_in(options.sweep, options.lines, options.machine or this_machine())
    print("\n".join(tables(lines)))
    if options.curves is not None:
        options.curves.write_text(draw(curves(lines), unit="tokens"), encoding="utf-8")


if __name__ == "__main__":
    main()
