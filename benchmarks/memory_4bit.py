"""Peak memory and step time of runs with the embedded engine, next to what dry_run estimates.

    python benchmarks/memory_4bit.py [--sizes 4b,8b] [--rows nf4,8bit] [--limit-gib 24] [override …]
    python benchmarks/memory_4bit.py --sizes tiny --device cpu      rehearsal: the numbers mean nothing

    nf4    model/lora=nf4: adapters of rank 16, the base in 4 bits; AdamW in 8 bits
    lora   model/lora=all_linear: the same adapters, the base in bfloat16
    8bit   all weights learn; AdamW in 8 bits

Each row is a run by the product's own command, in a process of its own: the Qwen3-VL of that size with random weights,
4 groups of 8 rollouts a step, one image of 1024 × 1024 pixels a group, up to 256 new tokens, layers recomputed in the
backward pass. The process may take `--limit-gib` of the GPU (torch's set_per_process_memory_fraction); rows whose
estimate is above the limit are run without it. `peak` is the largest `memory/peak_bytes` of the steps, after the
weights are loaded; `loading` that before. `s/step` is the median without the first step. The final checkpoint is not
written: the process is ended after its last step. `sampling` and `training` are the peaks of the two halves of a step.
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
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY)]

GIB = 2**30
HEAD = (
    "| size | row | limit GiB | estimate GiB | peak GiB | estimate / peak | sampling GiB | training GiB | loading GiB "
    "| s/step | rollouts s "
    "| train s | tokens/s | mismatch | steps |"
)

ROWS = {
    "nf4": ("model/lora=nf4", "trainer.optimizer=adamw_8bit"),
    "lora": ("model/lora=all_linear", "trainer.optimizer=adamw_8bit"),
    "8bit": ("trainer.optimizer=adamw_8bit",),
}

RUN = (
    "task=imported",
    "task.target=noise_task:Noise",
    "inference=embedded",
    "orchestrator.groups_per_step=4",
    "orchestrator.group_size=8",
    "orchestrator.max_new_tokens=256",
    "orchestrator.eval.every=0",
    "trainer.learning_rate=1e-6",
    "trainer.lr_warmup_steps=0",
    "trainer.seq_len=2048",
    "trainer.micro_batch_tokens=8192",
    "trainer.activation_checkpointing=true",
    "trainer.compile=false",
    "trainer.feature_cache_mib=256",
    "trainer.checkpoint_every=0",
    "monitor.live=false",
    "monitor.report=false",
    "monitor.vision_gap_every=0",
    "monitor.wandb.mode=disabled",
)
LARGE = ("model=qwen3vl", "model.init=random", "+task.args.side=1024", "trainer.threads=8")
TINY = (
    *("model=qwen3vl_tiny", "+task.args.side=64", "orchestrator.groups_per_step=2", "orchestrator.group_size=2"),
    *("orchestrator.max_new_tokens=8", "model.device=cpu"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4b,8b", help="of model/size, or tiny")
    parser.add_argument("--rows", default="nf4,8bit", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="0: no limit")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="no further run is begun after this")
    parser.add_argument("--run-seconds", type=float, default=1e9, help="a run is ended after this")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child is not None:
        child(arguments.child, arguments.limit_gib, overrides)
        return
    name = platform.machine()
    if arguments.device == "cuda":
        name = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.splitlines()[0]
    print(f"python {' '.join(sys.argv)}\n{name}, torch {version('torch')}\n", flush=True)
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}", flush=True)
    began = time.perf_counter()
    for row in arguments.rows.split(","):
        for size in arguments.sizes.split(","):
            if time.perf_counter() - began > arguments.seconds:
                print(f"| {size} | {row} | not run: time is up |", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                print(measure(arguments, size, row, Path(folder), overrides), flush=True)


def measure(arguments: argparse.Namespace, size: str, row: str, folder: Path, overrides: list[str]) -> str:
    """Run one row → its line of the table."""
    chosen = [*RUN, *(TINY if size == "tiny" else (*LARGE, f"model/size={size}")), *ROWS[row]]
    chosen += [f"trainer.max_steps={arguments.steps + 100}", f"hydra.run.dir={folder / 'run'}", *overrides]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--child", str(folder), "--limit-gib", str(arguments.limit_gib), *chosen]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
        lines = steps_of(folder / "run/metrics.jsonl", arguments.steps, process, arguments.run_seconds)
        process.kill()
        process.wait()
    known = json.loads((folder / "known.json").read_text()) if (folder / "known.json").is_file() else {}
    limit = "none" if not known.get("limit") else f"{known['limit'] / GIB:.0f}"
    if len(lines) < min(2, arguments.steps):
        said = " ".join((folder / "log").read_text(errors="replace").split())[-600:]
        return f"| {size} | {row} | {limit} | {known.get('estimate', 0) / GIB:.1f} | ended: {said} |"
    later = lines[1:] or lines
    median = {
        key: statistics.median(line[key] for line in later) for key in ("time/step", "time/rollout_span", "time/train")
    }
    halves = json.loads((folder / "halves.json").read_text())
    sampling, training = (halves[half] / GIB for half in ("sampling", "training"))
    estimate, loading, peak = known["estimate"] / GIB, known["loading"] / GIB, max(sampling, training)
    tokens = statistics.median(line["throughput/tokens_per_s"] for line in later)
    return (
        f"| {size} | {row} | {limit} | {estimate:.2f} | {peak:.2f} | {estimate / max(peak, 1e-9):.2f} "
        f"| {sampling:.2f} | {training:.2f} | {loading:.2f} "
        f"| {median['time/step']:.2f} | {median['time/rollout_span']:.2f} | {median['time/train']:.2f} "
        f"| {tokens:.0f} | {lines[0]['mismatch_kl/mean']:.1e} | {len(lines)} |"
    )


def steps_of(metrics: Path, steps: int, process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, float]]:
    """The lines of the first `steps` steps; fewer where the run ends before, or takes longer than `seconds`."""
    lines: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(lines) < steps:
        has_ended = process.poll() is not None or time.perf_counter() > end
        if metrics.is_file():
            whole = metrics.read_bytes().rpartition(b"\n")[0].splitlines()
            lines = [line for line in map(json.loads, whole) if "memory/peak_bytes" in line][:steps]
        if has_ended:
            break
        time.sleep(0.2)
    return lines


def child(folder: Path, limit_gib: float, overrides: list[str]) -> None:
    """The product's command in this process. Once the weights are loaded, it writes `known.json`: the estimate, the
    peak so far and the limit, in bytes, and begins to count anew."""
    import torch

    from vlmrl.runs import build, every_rank
    from vlmrl.trainer.trainer import LocalTrainer

    original = every_rank.make_model

    def make_model(config: Any, *rest: Any) -> Any:
        estimate = estimated(config)
        limit = 0.0
        known: dict[str, float] = {"estimate": estimate, "loading": 0.0}
        if torch.cuda.is_available():
            limit = limit_gib * GIB if estimate < limit_gib * GIB else 0.0
            if limit:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(limit / total, 0)
        model = original(config, *rest)
        if torch.cuda.is_available():
            known["loading"] = float(torch.cuda.max_memory_allocated())
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        (folder / "known.json").write_text(json.dumps(known | {"limit": limit}))
        return model

    step, halves = LocalTrainer.train_step, {"sampling": 0.0, "training": 0.0}

    def count(half: str) -> None:
        if torch.cuda.is_available():
            halves[half] = max(halves[half], float(torch.cuda.max_memory_allocated()))
        (folder / "halves.json").write_text(json.dumps(halves))

    def train_step(self: Any, *rest: Any, **named: Any) -> Any:
        count("sampling")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            return step(self, *rest, **named)
        finally:
            count("training")

    sys.argv = ["vlmrl", *overrides]
    from vlmrl.__main__ import run

    with patch.object(build, "make_model", make_model), patch.object(LocalTrainer, "train_step", train_step):
        run()


def estimated(config: Any) -> float:
    """The peak that dry_run estimates, in bytes."""
    from vlmrl.preflight.estimate.episode import play
    from vlmrl.preflight.estimate.memory import trainer_memory
    from vlmrl.preflight.estimate.plan import tokens_of_micro_batch
    from vlmrl.preflight.estimate.sizes import find_sizes
    from vlmrl.tasks.loading import load_task

    episode = play(load_task(config.task, seed=config.seed), config.task.max_turns)[0]
    sizes = find_sizes(config.model)
    memory = trainer_memory(
        config, sizes, tokens_of_micro_batch(config, sizes, episode), ranks=1, on_gpu=config.model.device != "cpu"
    )
    assert memory is not None
    assert memory.peak is not None
    return float(memory.peak)


if __name__ == "__main__":
    main()
