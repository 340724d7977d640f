"""Runs that are killed by SIGKILL again and again, and what they must have in common with one that was not.

run ─ SIGKILL at a random moment ─ resume ─ SIGKILL inside a checkpoint write ─ resume ─ … ─ resume to the end
 └──────────────────────────── differences(): none, bit for bit ───────────────────────────────▶ undisturbed run
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from support.command_line import PATIENCE, Home, steady, steady_rollouts

Kill = Literal["moment", "write"]

LONG = (
    *("trainer.warmup.steps=6", "trainer.warmup.batch_size=8", "trainer.warmup.rl_batch_size=2"),
    *("trainer.max_steps=8", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=2"),
    *("orchestrator.groups_per_step=2", "orchestrator.group_size=4", "orchestrator.max_new_tokens=10"),
    *("orchestrator.eval.problems=6", "orchestrator.eval.every=3", "orchestrator.eval.target=null"),
    *("trainer.warmup.rl_weight=0.04", "orchestrator.max_staleness=0"),
    *("monitor.wandb.mode=disabled", "monitor.report=false"),
)
"""A run that writes a checkpoint after every step."""

TASKS = {"color_codeword": (), "faults": ("task=their_tasks:SomeFaults",)}
"""Name → overrides. In the second, four of six problems go wrong, so that faults.jsonl and dropped rollouts count."""

EVENTS_OF_A_CHECKPOINT = 20
"""About how many file operations write a checkpoint of these runs and delete an old one."""

KILL_IN_WRITE = """
import os, signal, sys
left = int(sys.argv.pop(1))
def hook(happens, arguments):
    global left
    if arguments and "checkpoints/partial_" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, killed right before a file operation on a checkpoint that is being written or deleted."""


@dataclass(frozen=True)
class Killed:
    """A run after its kills and its last resume."""

    run: Path
    kills: Counter[Kill]
    """How often it was killed; fewer than planned where it was finished before."""
    code: int
    err: str


def kill_and_resume(
    home: Home, name: str, arguments: Sequence[str], plan: Sequence[Kill], seed: int, whole_s: float
) -> Killed:
    """Start a run, kill it as `plan` says, each time after a resume, and let the last resume come to the end.

    `whole_s`: seconds of an undisturbed run. Random moments lie between the start of a process and then.
    """
    run, choose, kills = home.path / "outputs" / name, random.Random(seed), Counter[Kill]()

    def words() -> tuple[str, ...]:
        is_begun = (run / "config.yaml").exists()
        return (f"resume={run}",) if is_begun else (*arguments, f"hydra.run.dir={run}")

    for kill in plan:
        if kill == "write":
            events = str(choose.randint(1, 2 * EVENTS_OF_A_CHECKPOINT))
            process = home.start(events, *words(), code=("-c", KILL_IN_WRITE))
            process.communicate(timeout=PATIENCE)
        else:
            process = home.start(*words())
            try:
                process.communicate(timeout=choose.uniform(0.0, whole_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=PATIENCE)
        kills[kill] += process.returncode == -signal.SIGKILL
    last = home.vlmrl(*words())
    return Killed(run, kills, last.code, last.err)


def record_of(run: Path) -> dict[str, Any]:
    """Everything a run leaves that does not depend on the clock and the machine."""
    newest = max((run / "checkpoints").glob("step_*"))
    tensors: dict[str, str] = {}
    for file in sorted(newest.glob("*.safetensors")):
        with safe_open(file, "np") as content:
            tensors |= {key: hashlib.sha256(content.get_tensor(key).tobytes()).hexdigest() for key in content.keys()}  # noqa: SIM118
    faults = run / "faults.jsonl"
    return {
        "metrics.jsonl": steady(run / "metrics.jsonl"),
        "supervised.jsonl": steady(run / "supervised.jsonl"),
        "faults.jsonl": faults.read_bytes() if faults.exists() else None,
        "rollouts": steady_rollouts(run),
        "images": {path.name: path.read_bytes() for path in (run / "images").iterdir()},
        "tokens.jsonl": sorted((run / "tokens.jsonl").read_bytes().splitlines()),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "tensors": tensors,
        "loop.json": json.loads((newest / "loop.json").read_bytes()),
        "other files": sorted(path.name for path in run.iterdir() if path.name != "wandb"),
    }


def differences(run: Path, undisturbed: Path) -> list[str]:
    """The parts of the record in which two runs differ; none where both are the same run."""
    ours, theirs = record_of(run), record_of(undisturbed)
    return [part for part in theirs if ours[part] != theirs[part]]
