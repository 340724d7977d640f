"""Seconds per optimizer step (rollouts + training): vlmrl against TRL's GRPOTrainer, in one run on one machine.

    python benchmarks/trl_step.py --trl-venv DIR            DIR is made if it is not there (pip, 1.5 GB)
    python benchmarks/trl_step.py --trl-venv DIR --tune     TRL alone, under each of the settings tried for it

Both sides get the same checkpoint folder, the same prompts in the same order (color_codeword in its single-turn
variant: a system message, a user message with two images), the same number of groups, siblings, new tokens and torch
threads, float32, one optimizer step per batch, no KL term, no evaluation. They take turns, a fresh process each time,
so that a busy neighbour hits both. A step's time is the wall clock from the end of the step before, so whatever a side
does between two steps is in it; vlmrl writes its metrics and every rollout meanwhile, TRL logs nothing.

Two checkpoints: `warm`, after the format warm-up of the default run (`mode=sft`: answers of two letters and the end of
turn), which is what RL starts from; and `random`, the weights before it (answers run into the token budget).

Left out on purpose: what is learned. Both learn, but ten steps say nothing about it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

HERE = Path(__file__).parent
TRL_PACKAGES = (
    "torch==2.13.0",
    "torchvision==0.28.0",
    "transformers==5.19.0",
    "trl==1.16.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "pillow==13.0.0",
)

SEED = 0
GROUPS, GROUP_SIZE, MAX_NEW_TOKENS, IMAGES = 8, 32, 8, 2
WARMUP_STEPS = 2
"""First steps of each process that are not counted: allocators and caches fill."""

BEST_TRL: dict[str, Any] = {
    "micro_batch": 256,
    "attention": "sdpa",
    "image_processor": "torchvision",
    "cache": None,
    "optimizer": "adamw_torch_fused",
}
"""The fastest settings found by --tune; the rest are the reasons, one change each."""
TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"micro_batch": 128},
    {"micro_batch": 64},
    {"micro_batch": 32},
    {"attention": "eager"},
    {"image_processor": "pil"},
    {"cache": "static"},
    {"optimizer": "adamw_torch"},
)

Steps: TypeAlias = list[dict[str, float]]
"""Per counted step: `step`, `rollout`, `train` in seconds, `prompt` and `completion` in tokens over the batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--trl-venv", type=Path, help="virtual environment for TRL, made if missing")
    which.add_argument("--trl-python", type=Path, help="an interpreter that has TRL and torchvision already")
    parser.add_argument("--rounds", type=int, default=3, help="times that the two sides take turns")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps a turn, {WARMUP_STEPS} not counted")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on both sides")
    parser.add_argument("--warmup-steps", type=int, default=100, help="supervised steps that make `warm`")
    parser.add_argument("--tune", action="store_true", help="compare settings for TRL instead")
    arguments = parser.parse_args()
    assert arguments.steps > WARMUP_STEPS, "no step would be counted"
    python = arguments.trl_python or trl_python(arguments.trl_venv.absolute())
    with tempfile.TemporaryDirectory(prefix="trl_step_") as folder:
        bench = Bench(Path(folder), python, arguments)
        if arguments.tune:
            tune(bench)
        else:
            compare(bench, arguments.rounds)


def compare(bench: Bench, rounds: int) -> None:
    print_head(bench)
    print("| checkpoint | side | s/step, median | min – max | rollouts | the rest | prompt tokens | sampled tokens |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    verdicts = []
    for checkpoint in ("warm", "random"):
        trl: list[Steps] = []
        ours: list[Steps] = []
        for _ in range(rounds):
            trl.append(bench.trl(checkpoint, BEST_TRL))
            ours.append(bench.vlmrl(checkpoint))
        assert tokens(trl, "prompt") == tokens(ours, "prompt"), "the two sides did not see the same prompts"
        print_row(checkpoint, "TRL", trl)
        print_row(checkpoint, "vlmrl", ours)
        by_round = [median(a, "step") / median(b, "step") for a, b in zip(trl, ours, strict=True)]
        verdicts.append(
            f"{checkpoint}: {statistics.median(by_round):.1f} times faster, the median of the rounds "
            f"({', '.join(f'{ratio:.1f}' for ratio in by_round)})"
        )
    print("\n" + "\n".join(verdicts))


def tune(bench: Bench) -> None:
    """Each setting that was tried for TRL; CPU seconds too, which a busy neighbour changes less."""
    print_head(bench)
    print("| settings | s/step, median | CPU s/step, median |")
    print("|---|---|---|", flush=True)
    for change in TRIED:
        steps = bench.trl("warm", BEST_TRL | change)
        name = ", ".join(f"{key}={value}" for key, value in change.items()) or "as compared"
        print(f"| {name} | {median(steps, 'step'):.2f} | {median(steps, 'cpu'):.2f} |", flush=True)


# ── the two sides ───────────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """What both sides share: checkpoints, prompts and sizes, in a folder of its own."""

    def __init__(self, folder: Path, trl_python: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.trl_python = folder, trl_python
        self.steps, self.threads = arguments.steps, arguments.threads
        self.runs = 0
        self.environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        write_prompts(folder / "prompts", self.steps * GROUPS)
        self.checkpoints = self.make_checkpoints(arguments.warmup_steps)

    def overrides(self) -> list[str]:
        """The batch, for `python -m vlmrl`."""
        return [
            "experiment=color_codeword_tiny",
            "task.max_turns=1",
            f"task.images_per_turn={IMAGES}",
            f"orchestrator.groups_per_step={GROUPS}",
            f"orchestrator.group_size={GROUP_SIZE}",
            f"orchestrator.max_new_tokens={MAX_NEW_TOKENS}",
            "orchestrator.eval.every=0",
            "orchestrator.eval.target=null",
            "trainer.learning_rate=1.5e-3",
            "trainer.max_grad_norm=1.0",
            f"trainer.threads={self.threads}",
            "trainer.checkpoint_every=0",
            "monitor.wandb.mode=disabled",
            "monitor.report=false",
            "monitor.live=false",
            f"seed={SEED}",
        ]

    def rl_overrides(self, checkpoint: Path | str) -> list[str]:
        """The run that is measured."""
        return [
            f"model.name={checkpoint}",
            "model.tiny=null",
            "trainer.warmup.steps=0",
            f"trainer.max_steps={self.steps}",
        ]

    def make_checkpoints(self, warmup_steps: int) -> dict[str, Path]:
        """`random` as it is built, `warm` with the weights after the default warm-up."""
        from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
        from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint

        random = ensure_tiny_checkpoint(
            ModelConfig(name="qwen3vl_tiny", vlm=VLMConfig(family="qwen3_vl"), tiny=TinyConfig()), task().texts()
        )
        run = self.run_vlmrl("mode=sft", f"trainer.warmup.steps={warmup_steps}")
        warm = self.folder / "warm"
        export = ["mode=export", f"resume={run}", f"export.folder={warm}"]
        execute([sys.executable, "-m", "vlmrl", *export], self.environment)
        return {"random": random, "warm": warm}

    def run_vlmrl(self, *overrides: str) -> Path:
        """One run of the product; returns its run folder."""
        self.runs += 1
        run = self.folder / f"run_{self.runs}"
        execute(
            [sys.executable, "-m", "vlmrl", *self.overrides(), *overrides, f"hydra.run.dir={run}"], self.environment
        )
        return run

    def vlmrl(self, checkpoint: str) -> Steps:
        run = self.run_vlmrl(*self.rl_overrides(self.checkpoints[checkpoint]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = {line["step"]: line["time/elapsed"] for line in lines}
        return [
            {
                "step": seconds[line["step"]] - seconds[line["step"] - 1],
                "rollout": line["time/rollout"],
                "prompt": line["tokens/prompt"],
                "completion": line["tokens/completion"],
            }
            for line in lines
            if line["step"] > WARMUP_STEPS
        ]

    def trl(self, checkpoint: str, settings: dict[str, Any]) -> Steps:
        result = self.folder / "trl.json"
        job = {
            "checkpoint": str(self.checkpoints[checkpoint]),
            "prompts": str(self.folder / "prompts"),
            "scratch": str(self.folder / "trl"),
            "result": str(result),
            "steps": self.steps,
            "threads": self.threads,
            "groups": GROUPS,
            "group_size": GROUP_SIZE,
            "max_new_tokens": MAX_NEW_TOKENS,
            "seed": SEED,
            "settings": settings,
        }
        execute([str(self.trl_python), str(HERE / "trl_side.py"), json.dumps(job)], self.environment)
        steps: Steps = json.loads(result.read_text())
        return steps[WARMUP_STEPS:]


def task() -> Any:
    from vlmrl.config.task import ColorCodewordConfig
    from vlmrl.tasks.color_codeword import ColorCodeword

    return ColorCodeword(ColorCodewordConfig(max_turns=1, images_per_turn=IMAGES), seed=SEED)


def write_prompts(folder: Path, count: int) -> None:
    """The first `count` training problems as prompts.json, and their images as PNG."""
    from vlmrl.types import Image

    folder.mkdir()
    problems = task()
    rows = []
    names: dict[int, str] = {}
    for index in range(count):
        problem = problems.problem("train", index)
        messages = []
        for message in problems.env(problem).reset():
            content = []
            for part in message.content:
                if isinstance(part, Image):
                    name = names.setdefault(id(part.source), f"{len(names)}.png")
                    part.source.save(folder / name)
                    content.append({"image": name})
                else:
                    content.append({"text": part.text})
            messages.append({"role": message.role, "content": content})
        rows.append({"messages": messages, "answer": problem.codeword})
    (folder / "prompts.json").write_text(json.dumps(rows))


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────


def trl_python(venv: Path) -> Path:
    """The interpreter of TRL's environment, which is made if it is missing or its packages are others."""
    python = venv / "bin" / "python"
    stamp = venv / "trl_step.txt"
    wanted = "\n".join(TRL_PACKAGES)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing TRL into {venv}", file=sys.stderr)
        execute([sys.executable, "-m", "venv", str(venv)], dict(os.environ))
        execute([str(python), "-m", "pip", "install", "--quiet", *TRL_PACKAGES], dict(os.environ))
        stamp.write_text(wanted)
    return python


def execute(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run to the end; its output only where it fails."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{' '.join(command)} ended with exit code {done.returncode}")


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────


def print_head(bench: Bench) -> None:
    ours = [*bench.overrides(), *bench.rl_overrides("FOLDER")]
    print(
        f"""python benchmarks/trl_step.py {" ".join(sys.argv[1:])}
vlmrl: python -m vlmrl {" ".join(ours)}
{platform.machine()}, {os.cpu_count()} cores, {bench.threads} torch thread(s), Python {platform.python_version()}
vlmrl with torch=={version("torch")}, transformers=={version("transformers")}; TRL with {", ".join(TRL_PACKAGES)}
{GROUPS} groups × {GROUP_SIZE} rollouts, {IMAGES} images a prompt, at most {MAX_NEW_TOKENS} new tokens; {bench.steps} \
steps a turn, the first {WARMUP_STEPS} not counted
"""
    )


def print_row(checkpoint: str, side: str, rounds: list[Steps]) -> None:
    steps = pooled(rounds)
    seconds = [step["step"] for step in steps]
    rollout = median(steps, "rollout")
    print(
        f"| {checkpoint} | {side} | {median(steps, 'step'):.3f} | {min(seconds):.3f} – {max(seconds):.3f} "
        f"| {rollout:.3f} | {statistics.median(step['step'] - step['rollout'] for step in steps):.3f} "
        f"| {median(steps, 'prompt'):.0f} | {median(steps, 'completion'):.0f} |",
        flush=True,
    )


def pooled(rounds: list[Steps]) -> Steps:
    return [step for steps in rounds for step in steps]


def median(steps: Steps, key: str) -> float:
    return statistics.median(step[key] for step in steps)


def tokens(rounds: list[Steps], key: str) -> list[list[float]]:
    return [[step[key] for step in steps] for steps in rounds]


if __name__ == "__main__":
    main()
