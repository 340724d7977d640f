"""What looking as a signal buys, on a task whose prompt gives part of the answer away.

    python benchmarks/looking.py [--steps 96] [--seeds 0,1,2] [--weights 0,1,4] [--folder outputs/looking] [key=value …]

The task shows one colored square, whose letter is the answer, under a hint: a letter that is right in 60 % of the
problems and any other letter in the rest. A policy that repeats the hint earns 0.6 without a look at the square. The
tiny model trains on it once per seed and `algorithm.vision_advantage.weight`, for equally many steps from the same
weights. Held-out rewards are of sampled answers: on all problems, and on those whose hint is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl import Env, Message, Reply, Split, Task
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.record.metrics import read_metrics
from vlmrl.tasks.color_codeword import LETTERS, CodewordProblem, ColorCodeword

RIGHT = 0.6
"""Share of the problems whose hint is the answer."""
TRUSTED = 0.75
"""Share of the answers of the warm-up that repeat the hint. The others are random letters."""
AGAINST = "eval/task/against_hint"
"""The held-out reward on problems whose hint is wrong."""
SETTINGS = (
    "model=qwen3vl_tiny",
    "task=looking:Hinted",
    "trainer.decay=constant",
    "trainer.max_grad_norm=0.3",
    "trainer.warmup.steps=150",
    "trainer.warmup.rl_weight=0.04",
    "trainer.checkpoint_every=0",
    "orchestrator.groups_per_step=9",
    "orchestrator.group_size=16",
    "orchestrator.max_new_tokens=4",
    "orchestrator.eval.problems=180",
    "monitor.live=false",
    "monitor.report=false",
    "monitor.record_rollouts=false",
    "monitor.vision_gap_every=5",
    "monitor.wandb.mode=disabled",
)


@dataclass(frozen=True)
class Hint:
    """A problem of the task."""

    id: str
    square: CodewordProblem
    letter: str
    """What the prompt says."""


class Hinted(Task):
    """color_codeword with one square, and a letter in the prompt that may be the answer."""

    def __init__(self, config: Any, *, seed: int) -> None:
        # No letter is held out: the question is whether the policy looks, not whether it knows other colors.
        squares = ColorCodewordConfig(max_turns=1, images_per_turn=1, holdout_one_in=1000)
        self._squares = ColorCodeword(squares, seed=seed)
        self._seed = seed

    def problem(self, split: Split, index: int) -> Hint:
        square = self._squares.problem("train", index if split == "train" else (1 << 50) // 9 * 9 + index)
        draw = random.Random(f"{split} {index} {self._seed if split == 'train' else ''}")
        others = LETTERS.replace(square.codeword, "")
        letter = square.codeword if draw.random() < RIGHT else draw.choice(others)
        return Hint(f"{split} {index}", square, letter)

    def env(self, problem: Hint) -> Env:
        return Under(problem.letter, problem.square.codeword, self._squares.env(problem.square))

    def demonstration(self, problem: Hint, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A random answer repeats the hint in three of four cases, as a policy does that has learned to trust texts."""
        system, user, answer = self._squares.demonstration(problem.square, random_answers=random_answers, seed=seed)
        if random_answers and random.Random(seed).random() < TRUSTED:
            answer = Message.of("assistant", problem.letter)
        return system, under(problem.letter, user), answer

    def texts(self) -> tuple[str, ...]:
        return (*self._squares.texts(), "Hint:")


def under(letter: str, message: Message) -> Message:
    """The message with a hint before its square."""
    return Message.of(message.role, f"Hint: {letter}", *message.content)


class Under:
    """An env whose prompt has a hint."""

    def __init__(self, letter: str, answer: str, env: Env) -> None:
        self._letter = letter
        self._is_wrong = letter != answer
        self._env = env

    def reset(self) -> tuple[Message, ...]:
        system, user = self._env.reset()
        return system, under(self._letter, user)

    def step(self, completion: str) -> Reply:
        reply = self._env.step(completion)
        reward = reply.reward or 0.0
        return Reply(done=True, reward=reward, metrics={"against_hint": reward} if self._is_wrong else {})


def measure(folder: Path, seed: int, steps: int, weight: float, overrides: list[str]) -> list[dict[str, float]]:
    """Run the command → its lines of metrics.jsonl."""
    settings = {
        "hydra.run.dir": folder,
        "seed": seed,
        "trainer.max_steps": steps,
        "algorithm.vision_advantage.weight": weight,
        "orchestrator.eval.every": max(1, steps // 6),
    }
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vlmrl", *SETTINGS, *(f"{key}={value}" for key, value in settings.items())]
    command += overrides
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weights", default="0,1,4")
    parser.add_argument("--folder", type=Path, default=Path("outputs/looking"))
    parser.add_argument("overrides", nargs="*", help="further settings of every run")
    options = parser.parse_args()
    print_row("seed", "weight", "held-out reward after each evaluation", "hint wrong", "gap", "s per step")
    print_row(*["---"] * 6)
    ends: dict[float, list[tuple[float, float]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for weight in map(float, options.weights.split(",")):
            folder = options.folder / f"seed_{seed}_weight_{weight:g}"
            lines = measure(folder, seed, options.steps, weight, options.overrides)
            evaluated = [line for line in lines if line.get("eval/reward") is not None]
            rewards = [line["eval/reward"] for line in evaluated]
            against = evaluated[-1].get(AGAINST, 0.0)
            gap = [line["vision_gap/shuffled"] for line in lines if line.get("vision_gap/shuffled") is not None]
            seconds = statistics.median(line["time/step"] for line in lines if line["step"] > 0)
            curve = " ".join(f"{reward:.2f}" for reward in rewards)
            print_row(seed, f"{weight:g}", curve, f"{against:.2f}", f"{gap[-1]:.2f}" if gap else "-", f"{seconds:.2f}")
            ends.setdefault(weight, []).append((rewards[-1], against))
    for weight, found in ends.items():
        means = " and ".join(f"{statistics.mean(column):.2f}" for column in zip(*found, strict=True))
        print(f"\nweight {weight:g}: {means} where the hint is wrong, means of {len(found)} seeds", flush=True)


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
