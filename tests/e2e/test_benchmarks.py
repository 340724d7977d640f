"""Every script of benchmarks/ is rehearsed at a small size: `pytest -m "benchmark and not release"`, which .ci/run
calls, and `pytest -m benchmark` before a release.

The numbers of a rehearsal mean nothing. It shows that the script still runs and prints its table.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.command_line import REPOSITORY
from support.processes import start
from support.verifiers_here import PYTHON

BENCHMARKS = REPOSITORY / "benchmarks"
REHEARSAL_TIMEOUT_S = 500.0

HELPERS = (
    *("family_cells.py", "family_export.py", "family_image.py", "family_runs.py", "family_task.py"),
    *(
        "cards_task.py",
        "curves.py",
        "large_family.py",
        "shared_prefix_kernels.py",
        "noise_task.py",
        "timed_command.py",
        "training_batches.py",
        "trl_rows.py",
        "trl_side.py",
    ),
)
"""Files of benchmarks/ that others import or start."""

SMALL_IMAGES = "--groups 2 --group-size 2 --image-size 64 --new-tokens 8"
REHEARSALS = {
    "arena.py": "--curves curves.svg",
    "checkpoints.py": "--gib 0.01 --tensor-mib 0.5 --repeats 1",
    "dataset_start.py": "--rows 60,300 --rounds 1",
    "digits.py": "--seeds 0 trainer.max_steps=2 trainer.warmup.steps=2 orchestrator.eval.problems=4",
    "embedded_gpu.py": (
        "--size tiny --device cpu --shapes 2x5x37x16 --rounds 1 --starts 1 "
        "--parts exact,rate,turns,equal,mismatch,start,profile --decoders embedded,reference"
    ),
    "endpoint.py": "--sessions 2 --turns 2 --new-tokens 4 --rounds 1 --requests 2",
    "env_workers.py": "--draw-ms 0.05 --groups 2 --group-size 2 --turns 2 --rounds 1",
    "environments.py": (
        "--goals right,one_lake --seeds 0 --controls 0 --curves curves.svg trainer.max_steps=1 trainer.warmup.steps=1 "
        "orchestrator.eval.problems=2 orchestrator.groups_per_step=1 orchestrator.group_size=4 monitor.report=false"
    ),
    "clip_direction.py": (
        "--seeds 0 --controls 0 --curves curves.svg trainer.max_steps=1 trainer.warmup.steps=1 "
        "trainer.warmup.batch_size=1 orchestrator.eval.problems=2 orchestrator.groups_per_step=1 "
        "orchestrator.group_size=2 monitor.report=false"
    ),
    "epochs.py": "--epochs 1,2 --seeds 0 --steps 1 trainer.warmup.steps=1 orchestrator.eval.problems=9",
    "families.py": "--families gemma3,qwen3 --columns embedded,packing,resume,export,fsdp2,image_tokens --out out",
    "families_gpu.py": "--size tiny --device cpu --shapes codeword --steps 1 --groups 1",
    "families_learn.py": (
        "--models smolvlm --seeds 0 --controls= --curves curves.svg trainer.max_steps=1 trainer.warmup.steps=1 "
        "orchestrator.eval.problems=2 orchestrator.groups_per_step=1 orchestrator.group_size=4 monitor.report=false"
    ),
    "fsdp_scaling.py": "--size tiny --device cpu --shape codeword --rows alone,full,optimizer --steps 1 --groups 1",
    "kills.py": "--kills 2",
    "memory_4bit.py": "--sizes tiny --device cpu --rows nf4 --steps 2 trainer.optimizer=adamw",
    "mismatch.py": f"--checkpoint TINY --dtype float32 --engines default {SMALL_IMAGES}",
    "rollout_bytes.py": "--run RUN --answer-tokens 20",
    "looking.py": "--steps 1 --seeds 0 --weights 1 trainer.warmup.steps=1 orchestrator.eval.problems=9",
    "recompiles.py": "--size tiny --device cpu --steps 4",
    "recorder.py": "--pictures 3 --steps 2 --size 32 --repeats 1",
    "references.py": "--sizes tiny --device cpu --shapes codeword --steps 1 --groups 1",
    "refill.py": "--steps 1 --seeds 0",
    "rollout_throughput.py": f"--rounds 1 --turns 1 {SMALL_IMAGES}",
    "same_runs.py": f"{sys.executable} {sys.executable} --short --cases default",
    "shared_prefix.py": "--size tiny --device cpu --shapes 2x5x37x16,3x1x9x7",
    "small_print.py": (
        "--seeds 0 --controls 0 --curves curves.svg trainer.max_steps=1 trainer.warmup.steps=1 "
        "trainer.warmup.batch_size=1 orchestrator.eval.problems=2 orchestrator.groups_per_step=1 "
        "orchestrator.group_size=2 monitor.report=false"
    ),
    "train_cpu.py": "--rounds 1 --warmup-steps 3",
    "train_throughput.py": (
        "--sizes tiny --device cpu --shapes codeword --rows tree,varlen-eager,padded --steps 1 --groups 1"
    ),
    "trl_gpu.py": "--size tiny --device cpu --shapes codeword --steps 3 --groups 1 --trl-micro-batches 8",
    "trl_step.py": f"--trl-python {sys.executable} --rounds 1 --steps 3 --warmup-steps 3",
    "trl_whole_step.py": (
        "--rows embedded,trl_vllm,trl_continuous,trl_generate --size tiny --device cpu --groups 2 --group-size 2 "
        "--side 64 --new-tokens 8 --seq-len 128 --steps 2 bench.warmup_steps=1"
    ),
    "verifiers_tools.py": (
        "--python VERIFIERS --seeds 0 --curves curves.svg trainer.max_steps=1 trainer.warmup.steps=2 "
        "trainer.warmup.batch_size=2 orchestrator.eval.problems=2 orchestrator.groups_per_step=1 "
        "orchestrator.group_size=2"
    ),
    "vision_gap.py": "trainer.max_steps=2 trainer.warmup.steps=3",
    "weight_sync.py": (
        "--checkpoint TINY --dtype float32 --transports folder --rounds 1 --requests 4 --new-tokens 16 --image-size 64 "
        "--max-model-len 512 --lead 0.1"
    ),
    "whole_step.py": (
        "--rows embedded,two_ranks --size tiny --groups 2 --group-size 2 --side 64 --new-tokens 8 --seq-len 128 "
        "--steps 1 --repetitions 1 bench.warmup_steps=1"
    ),
    "wrong_configs.py": "--first 3",
}
"""Script → arguments; TINY is the folder of a tiny checkpoint, RUN that of a finished run, VERIFIERS the Python of an
environment with verifiers."""

QUICK = {
    *("checkpoints.py", "embedded_gpu.py", "endpoint.py", "env_workers.py", "families_gpu.py", "fsdp_scaling.py"),
    *("memory_4bit.py", "recompiles.py", "recorder.py", "references.py", "rollout_bytes.py", "shared_prefix.py"),
    *("train_throughput.py", "weight_sync.py", "whole_step.py", "wrong_configs.py"),
}
"""Scripts that are rehearsed for each change; the others start many commands or servers, and are for a release."""

NEEDS = {
    "clip_direction.py": "torchvision",
    "memory_4bit.py": "bitsandbytes",
    "mismatch.py": "vllm",
    "rollout_throughput.py": "vllm",
    "weight_sync.py": "vllm",
    "trl_gpu.py": "trl",
    "trl_step.py": "trl",
    "trl_whole_step.py": "trl",
}
"""Script → the package without which it is skipped."""


@pytest.mark.benchmark
@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.release]) for name in sorted(REHEARSALS)],
)
def test_a_benchmark_runs_at_a_small_size(
    script: str, tiny_folder: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    needed = NEEDS.get(script)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    if script == "verifiers_tools.py" and PYTHON is None:
        pytest.skip("VLMRL_VERIFIERS_PYTHON does not name the Python of an environment with verifiers")
    arguments = REHEARSALS[script].split()
    places = {"TINY": str(tiny_folder), "VERIFIERS": str(PYTHON)}
    if "RUN" in arguments:
        places["RUN"] = str(request.getfixturevalue("never_stopped"))
    arguments = [places.get(word, word) for word in arguments]
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node=2") if script == "fsdp_scaling.py" else ()
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "VLMRL_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",  # the server of processes forks, so nothing may start threads while it imports
    }
    process = start(*ranks, str(BENCHMARKS / script), *arguments, cwd=tmp_path, environment=environment)
    out, err = process.communicate(timeout=REHEARSAL_TIMEOUT_S)
    assert process.returncode == 0, f"{out}\n{err}"
    assert out.strip()


def test_every_script_is_rehearsed_and_has_its_page() -> None:
    scripts = {path.name for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*REHEARSALS, *HELPERS}
    assert REHEARSALS.keys() >= QUICK
    index = (BENCHMARKS / "README.md").read_text()
    for script in REHEARSALS:
        page = script.replace(".py", ".md")
        assert (BENCHMARKS / page).exists(), f"{script} has no page"
        assert f"]({page})" in index, f"benchmarks/README.md does not link to {page}"
