"""Rollouts per second with envs in threads and in worker processes, and what a crash in one of them costs.

    python benchmarks/env_workers.py [--draw-ms 5,0.05 --groups 36 --group-size 8 --turns 8 --rounds 3 --workers 2]

An env draws each frame (96 × 96) in a loop of Python, which holds Python's lock, until it has used `--draw-ms` of its
thread's processor time. The renderer is that of the tiny Qwen3-VL, so each frame is hashed, processed and placed among
the tokens. The engine answers at once: the clock is on the envs and on what moves their frames.

Threads and processes take turns, and the table has the median of the rounds. Processor seconds are those of the run's
own process: what it needs for itself while workers draw. The last lines are of a task of which one env in all rollouts
calls `os._exit`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl import Image, ImportedTaskConfig, Message, Reply, StepInfo, Task
from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.task import Workers
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
from vlmrl.models.families import family_of
from vlmrl.orchestrator.envs.make import make_envs
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.runs.doctor.watching import ScriptedEngine
from vlmrl.types import Group

QUESTION = "Where is the square?"
SIDE = 96


@dataclass(frozen=True)
class Problem:
    id: str
    exits: bool


class Drawn:
    """An env whose frames take a while to draw."""

    def __init__(self, problem: Problem, draw_ms: float, turns: int) -> None:
        self.problem, self.draw_ms, self.turns = problem, draw_ms, turns

    def reset(self) -> tuple[Message, ...]:
        return (Message.of("user", QUESTION, self.frame(0)),)

    def step(self, completion: str, info: StepInfo) -> Reply:
        if self.problem.exits and info.turn == self.turns:
            os._exit(7)
        done = info.turn == self.turns
        return Reply(done=done, reward=1.0, messages=() if done else (Message.of("user", self.frame(info.turn)),))

    def frame(self, turn: int) -> Image:
        until = time.thread_time() + self.draw_ms / 1000
        pixels = np.full((SIDE, SIDE, 3), turn, np.uint8)
        row = 0
        while time.thread_time() < until:
            row = (row + 1) % SIDE
            pixels[row, row] = 255
        return Image(pixels)


class Drawing(Task):
    """Problems whose envs draw."""

    def __init__(self, config: Any, *, seed: int) -> None:
        self.draw_ms, self.turns = config.args["draw_ms"], config.args["turns"]

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split} {index}", exits=index == 2**40)

    def env(self, problem: Problem) -> Drawn:
        return Drawn(problem, self.draw_ms, self.turns)

    def demonstration(self, problem: Problem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError("the envs are only played")


def tiny_renderer() -> Renderer:
    vlm = VLMConfig("qwen3_vl", ["qwen3-vl"], "mrope", "<|image_pad|>")
    config = ModelConfig(name="tiny", tiny=TinyConfig(), vlm=vlm)
    folder = ensure_tiny_checkpoint(config, (QUESTION,))
    tokenizer = load_tokenizer(folder)
    placeholders = family_of(vlm).placeholder_tokens
    return make_renderer(
        RendererConfig(), config, tokenizer, load_image_processor(folder, vlm), len(tokenizer), placeholders
    )


@dataclass(frozen=True)
class Measured:
    """One round."""

    rollouts: int
    seconds: float
    own: float
    """Processor seconds of the run's process."""
    groups: list[Group]


async def measure(
    args: argparse.Namespace, workers: Workers, draw_ms: float, crash: bool, rounds: int
) -> list[Measured]:
    """Play all groups that often, after one round that starts the workers."""
    config = ImportedTaskConfig(
        target="env_workers:Drawing",
        args={"draw_ms": draw_ms, "turns": args.turns},
        workers=workers,
        num_workers=args.workers if workers is Workers.process else None,
    )
    task = Drawing(config, seed=0)
    envs, renderer = make_envs(config, task, EndpointOfRun("policy", temperature=1.0), seed=0), tiny_renderer()
    runner = RolloutRunner(
        envs=envs,
        renderer=renderer,
        engine=ScriptedEngine(np.array([renderer.stop_token_ids[0]])),
        seed=0,
        max_turns=args.turns,
        max_new_tokens=8,
        max_model_len=10**6,
    )
    stream = ProblemStream(task, "train")
    sound = await stream.draw(0, args.groups)
    found = []
    try:
        for number in range(rounds + 1):
            problems = list(sound)
            size = args.group_size
            if crash and number:
                problems = [*(await stream.again([2**40])), *(each for each in sound for _ in range(size))][:-1]
                size = 1
            started, busy = time.perf_counter(), time.process_time()
            groups = await runner.run_groups(
                split="train", step=number, problems=problems, group_size=size, temperature=1.0
            )
            seconds, own = time.perf_counter() - started, time.process_time() - busy
            found.append(Measured(sum(len(group.rollouts) for group in groups), seconds, own, groups))
    finally:
        await envs.stop()
    return found[1:]


def table(args: argparse.Namespace) -> None:
    print("| ms a frame | envs in | rollouts/s, median | min – max | processor seconds of the run's process |")
    print("|---|---|---|---|---|")
    for draw_ms in map(float, args.draw_ms.split(",")):
        rounds: dict[Workers, list[Measured]] = {each: [] for each in Workers}
        for _ in range(args.rounds):
            for workers, found in rounds.items():
                found += asyncio.run(measure(args, workers, draw_ms, crash=False, rounds=1))
        speed = {workers: [each.rollouts / each.seconds for each in found] for workers, found in rounds.items()}
        for workers, found in rounds.items():
            own = statistics.median(each.own for each in found)
            values = speed[workers]
            called = "threads" if workers is Workers.thread else f"{args.workers} processes"
            print(
                f"| {draw_ms:g} | {called} | {statistics.median(values):.1f} | {min(values):.1f} – {max(values):.1f} "
                f"| {own:.2f} |"
            )
        ratio = statistics.median(speed[Workers.process]) / statistics.median(speed[Workers.thread])
        print(f"\n{draw_ms:g} ms a frame: processes play {ratio:.2f} times as many rollouts per second\n", flush=True)


def crash(args: argparse.Namespace) -> None:
    (measured,) = asyncio.run(measure(args, Workers.process, 0.05, crash=True, rounds=1))
    rollouts = [rollout for group in measured.groups for rollout in group.rollouts]
    ends = Counter(rollout.stop_reason.value for rollout in rollouts)
    print(f"os._exit in one of {len(rollouts)} rollouts: {dict(ends)}")
    print(f"played again: {sum(rollout.replayed for rollout in rollouts)}")
    print(f"its error: {rollouts[0].error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draw-ms", default="5,0.05")
    parser.add_argument("--groups", type=int, default=36)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"{args.groups} × {args.group_size} rollouts of {args.turns} turns, load {os.getloadavg()[0]:.1f}\n")
    table(args)
    crash(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # where a worker finds this task
    import env_workers

    env_workers.main()
