"""What refilling a step buys, on a task of which 70 % of the groups have no signal.

    python benchmarks/refill.py [--steps 60] [--seeds 0,1,2] [--folder outputs/refill]

The task shows one colored square, whose letter is the answer. In seven of ten training problems every answer is worth
0, so their groups have no gradient; the held-out problems are all sound. The tiny model trains on it twice per seed,
from the same weights: with `algorithm.refill.budget=20`, and with `algorithm.refill.budget=1` for as many steps as
spend the same tokens. Rewards are held-out ones, of sampled answers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl import Env, Message, Reply, Split, Task
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.record.metrics import read_metrics
from vlmrl.tasks.color_codeword import CodewordProblem, ColorCodeword

BUDGET = 20
MORE_STEPS = 4
"""How many times the steps a run without refill gets, to spend as many tokens as one with it."""
SETTINGS = (
    "model=qwen3vl_tiny",
    "task=refill:MostlyHopeless",
    "trainer.decay=constant",
    "trainer.max_grad_norm=0.3",
    "trainer.warmup.steps=40",
    "trainer.warmup.rl_weight=0.04",
    "trainer.checkpoint_every=0",
    "orchestrator.groups_per_step=6",
    "orchestrator.group_size=16",
    "orchestrator.max_new_tokens=4",
    "orchestrator.eval.problems=63",
    "monitor.live=false",
    "monitor.report=false",
    "monitor.record_rollouts=false",
    "monitor.vision_gap_every=0",
    "monitor.wandb.mode=disabled",
)


@dataclass(frozen=True)
class Numbered:
    """A problem of the task."""

    id: str
    square: CodewordProblem
    is_hopeless: bool


class Worthless:
    """An env of which every answer is worth 0."""

    def __init__(self, env: Env) -> None:
        self._env = env

    def reset(self) -> tuple[Message, ...]:
        return self._env.reset()

    def step(self, completion: str) -> Reply:
        self._env.step(completion)
        return Reply(done=True)


class MostlyHopeless(Task):
    """color_codeword with one square, and training problems of which three in ten can be solved."""

    def __init__(self, config: Any, *, seed: int) -> None:
        # No letter is held out: the question is how fast the letters are learned, not whether others follow.
        squares = ColorCodewordConfig(max_turns=1, images_per_turn=1, holdout_one_in=1000)
        self._squares = ColorCodeword(squares, seed=seed)

    def problem(self, split: Split, index: int) -> Numbered:
        number = index if split == "train" else (1 << 50) // 9 * 9 + index
        is_hopeless = split == "train" and index < 1 << 40 and index % 10 >= 3
        return Numbered(f"{split} {index}", self._squares.problem("train", number), is_hopeless)

    def env(self, problem: Numbered) -> Env:
        env = self._squares.env(problem.square)
        return Worthless(env) if problem.is_hopeless else env

    def demonstration(self, problem: Numbered, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self._squares.demonstration(problem.square, random_answers=random_answers, seed=seed)

    def texts(self) -> tuple[str, ...]:
        return self._squares.texts()


@dataclass(frozen=True)
class Measured:
    """One run."""

    refilled: bool
    steps: int
    full: float
    """Share of steps with all their groups."""
    signal: float
    """Groups with signal per step."""
    tokens: list[int]
    """Completion tokens until each evaluation."""
    rewards: list[float]
    """Held-out reward of each evaluation."""
    seconds: float

    def at_tokens(self, tokens: int) -> float:
        """The reward of the last evaluation before so many tokens were sampled."""
        return [reward for spent, reward in zip(self.tokens, self.rewards, strict=True) if spent <= tokens][-1]


def measure(folder: Path, seed: int, steps: int, budget: int) -> Measured:
    """Run the command and read its metrics."""
    settings = {
        "hydra.run.dir": folder,
        "seed": seed,
        "trainer.max_steps": steps,
        "algorithm.refill.budget": budget,
        "orchestrator.eval.every": max(1, steps // 12),
    }
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vlmrl", *SETTINGS, *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    lines = read_metrics(folder / "metrics.jsonl")
    trained = [line for line in lines if line["step"] > 0]
    with_signal = [(1 - line["groups/zero_advantage"]) * line["rollouts/total"] / 16 for line in trained]
    tokens, spent, rewards = [], 0, []
    for line in lines:
        spent += int(line.get("tokens/completion") or 0)
        if line.get("eval/reward") is not None:
            tokens.append(spent)
            rewards.append(line["eval/reward"])
    return Measured(
        budget > 1,
        len(trained),
        statistics.mean(groups > 5.5 for groups in with_signal),
        statistics.mean(with_signal),
        tokens,
        rewards,
        lines[-1]["time/elapsed"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps with refill")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, default=Path("outputs/refill"))
    options = parser.parse_args()
    head = ("seed", "refill", "steps", "full steps", "groups with signal", "sampled tokens", "seconds")
    print_row(*head, "reward at equal steps", "reward at equal tokens")
    print_row(*["---"] * 9)
    for seed in map(int, options.seeds.split(",")):
        runs = [
            measure(options.folder / f"seed_{seed}_budget_{budget}", seed, steps, budget)
            for budget, steps in ((1, MORE_STEPS * options.steps), (BUDGET, options.steps))
        ]
        tokens = min(run.tokens[-1] for run in runs)
        for run in runs:
            evaluated = run.rewards[: 1 + len(run.rewards) // (1 if run.refilled else MORE_STEPS)]
            print_row(
                seed,
                "on" if run.refilled else "off",
                run.steps,
                f"{run.full:.0%}",
                f"{run.signal:.1f} of 6",
                f"{run.tokens[-1]:,}",
                f"{run.seconds:.0f}",
                f"{evaluated[-1]:.2f}",
                f"{run.at_tokens(tokens):.2f}",
            )


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
