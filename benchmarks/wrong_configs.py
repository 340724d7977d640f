"""Twenty wrong command lines, each in a process of its own: the message, the exit code, and how long it takes.

    python benchmarks/wrong_configs.py        prints the table of benchmarks/README.md

Seconds are measured by the clock and, because a machine may be busy, by the processor (user and system).
tests/unit/preflight/test_same_message.py starts these command lines and `MORE` in four ways each and compares the
messages.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

WRONG: tuple[tuple[str, ...], ...] = (
    ("trainer.learning_rat=1e-5",),
    ("lr=1e-5",),
    ("model=qwen3vl_tin",),
    ("modle=qwen3vl",),
    ("mode=train",),
    ("trainer.max_steps=many",),
    ("trainer.learning_rate=-1",),
    ("orchestrator/renderer=none",),
    ("orchestrator.renderer.name=qwen3",),
    ("~model/vlm",),
    ("inference=vllm", "weight_sync=in_process"),
    ("inference=vllm", "weight_sync=nccl", "model.device=cpu"),
    ("orchestrator.max_staleness=2",),
    ("orchestrator.group_size=1",),
    ("task.image_size=40",),
    ("task.max_turns=4", "orchestrator.max_new_tokens=8"),
    ("model=qwen3vl", "task.images_per_turn=9"),
    ("inference=vllm", "inference.max_model_len=512"),
    ("algorithm.loss=gpro",),
    ("algorithm.filters.repetition=drop",),
)

MORE: tuple[tuple[str, ...], ...] = (
    ("task=no_such_module:Task",),
    ("task.target=no_such_module:Task",),
    ("algorithm.advantage=vlmrl.tasks.color_codeword:no_such_name",),
    ("task=vlmrl.tasks.color_codeword:ColorCodeword", "task.args.api_key=sk-proj-9f8e7d6c5b4a"),
    ("algorithm.args.url=https://me:hunter2@host/x",),
    ("weight_sync=folder",),
    ("inference=vllm", "inference.slurm_tasks=2", "inference.replicas=2"),
    ("inference=vllm", "orchestrator.max_staleness=400"),
    ("mode=replay",),
    ("mode=sft", "trainer.warmup.steps=0"),
    ("mode=eval", "orchestrator.eval.problems=0"),
    ("export.folder=there",),
    ("model/lora=all_linear", "model.vlm.freeze_language=true"),
    ("model.vlm.freeze_vision=true", "model.vlm.freeze_language=true"),
    ("model.vlm.positions=rope",),
    ("model.tiny.head_dim=6",),
    ("inference.max_model_len=512",),
    ("trainer.seq_len=4097", "inference.max_model_len=4097"),
    ("orchestrator.max_new_tokens=2000",),
    ("orchestrator.temperature=-1",),
    ("trainer.betas=[0.9]",),
    ("trainer.optimizer=adamw_8bit",),
    ("model/lora=all_linear",),
)
"""More of them. The last two need packages; the test hides them, so that they are missing."""


def run(arguments: tuple[str, ...], folder: str) -> tuple[int, str, float, float]:
    """Run one command line; returns exit code, message, seconds of the clock, seconds of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "vlmrl", *arguments]
    ended = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ended.returncode, ended.stderr.strip().removeprefix("error: "), wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=len(WRONG), help="only so many of the command lines")
    wrong = WRONG[: parser.parse_args().first]
    print("| `python -m vlmrl …` | exit code | message | seconds | of the processor |")
    print("|---|---|---|---|---|")
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        run(wrong[0], folder)  # the first one reads everything from the disk
        for arguments in wrong:
            code, message, wall, processor = run(arguments, folder)
            slowest = max(slowest, wall)
            cells = (f"`{' '.join(arguments)}`", code, message.replace("|", "\\|"), f"{wall:.1f}", f"{processor:.1f}")
            print(f"| {' | '.join(map(str, cells))} |")
        left = os.listdir(folder)
    print(f"\nThe slowest took {slowest:.1f} seconds. Files that they left: {len(left)}.")


if __name__ == "__main__":
    main()
