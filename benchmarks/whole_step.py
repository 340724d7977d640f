"""The whole step beside its limit, in each way to place sampler and trainer: `mode=bench` of the same shape, in turn.

    python benchmarks/whole_step.py [--rows embedded,one_gpu,two_gpus,two_ranks] [--model FOLDER]
    python benchmarks/whole_step.py --rows embedded --size tiny --groups 2 …        rehearsal: the numbers mean nothing

A new image of noise for each problem, groups of siblings, answers up to `--new-tokens`; a reward by which siblings
differ. The rows take turns, `--repetitions` times; medians count, with their spread. Each is a process with servers of
its own, so nothing is cached from the one before.

    embedded    inference=embedded: one GPU samples and trains, from one copy of the weights
    one_gpu     vLLM beside the trainer on one GPU, weight_sync=cuda_ipc, on-policy
    two_gpus    vLLM on a GPU of its own, weight_sync=nccl, orchestrator.max_staleness=1
    two_ranks   inference=embedded on two GPUs: each samples half of the groups and trains half of the batch, on-policy

`step / least`: the share of a step that rollouts and training need as they were measured: their sum on-policy, the
longer one with `two_gpus` (goal there: 0.85). Sampling and training stand beside the limits that docs/bench.md
explains. Random weights (the default) sample from the tokens of the task alone; with a checkpoint of the whole
vocabulary (`--model`) vLLM takes its usual route.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]

ROWS = {
    "embedded": ("inference=embedded",),
    "one_gpu": (
        *("inference=vllm", "weight_sync=cuda_ipc", "inference.gpu_memory_utilization=0.3"),
        "trainer.micro_batch_tokens=4096",
    ),
    "two_gpus": (
        *("inference=vllm", "weight_sync=nccl", "inference.gpu_memory_utilization=0.85"),
        *("orchestrator.max_staleness=1", "algorithm.importance_correction=truncated"),
    ),
    "two_ranks": ("inference=embedded", "trainer.sharding=optimizer"),
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
HEAD = (
    "| row | s/step, median | min – max | sampled tokens/s | of the limit | training, share of a product "
    "| step / least | bounded by | peak GiB | plan GiB |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    add_shape(parser)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a bench")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every bench.json here, as one list")
    parser.add_argument("overrides", nargs="*", help="further words of the command line, of every row")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.repetitions):
            for row in rows:
                run = Path(folder) / f"{row}_{number}"
                found[row].append(bench(arguments, row, number, run))
                print(f"{row}, repetition {number + 1}: {found[row][-1]['step_s']['mean']:.2f} s", file=sys.stderr)
    device = found[rows[0]][0]["device"]
    print(
        f"python {' '.join(sys.argv)}\n{device['name']}, product {device['product_flops'] / 1e12:.1f} TFLOP/s, copy "
        f"{device['copy_bytes_per_s'] / 1e12:.2f} TB/s; {arguments.groups} × {arguments.group_size} rollouts, images "
        f"of {arguments.side} × {arguments.side}, up to {arguments.new_tokens} tokens\n\n{HEAD}\n"
        f"|{'---|' * (HEAD.count('|') - 1)}"
    )
    for row, benches in found.items():
        print(line(row, benches))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The model and the rollouts of a step, as `bench` reads them."""
    parser.add_argument("--size", default="2b", help="of conf/model/size, or tiny")
    parser.add_argument("--model", help="a checkpoint's folder; default: random weights")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=1000, help="pixels per side of an image")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048, help="longest sequence")


def bench(arguments: argparse.Namespace, row: str, number: int, run: Path) -> dict[str, Any]:
    """bench.json of one run of mode=bench. Raises CalledProcessError where it fails."""
    model = [f"model/size={arguments.size}", "model=qwen3vl"]
    model += [f"model.name={arguments.model}"] if arguments.model else ["model.init=random"]
    words = [
        "mode=bench",
        *(["model=qwen3vl_tiny"] if arguments.size == "tiny" else model),
        f"task={REPOSITORY / 'benchmarks/noise_task.py'}:Noise",
        f"+task.args.side={arguments.side}",
        f"orchestrator.groups_per_step={arguments.groups}",
        f"orchestrator.group_size={arguments.group_size}",
        f"orchestrator.max_new_tokens={arguments.new_tokens}",
        f"trainer.seq_len={arguments.seq_len}",
        f"bench.steps={arguments.steps}",
        f"seed={number}",
        f"hydra.run.dir={run}",
        *ROWS[row],
        *arguments.overrides,
    ]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    launcher = TORCHRUN if row == "two_ranks" else ()
    subprocess.run([sys.executable, *launcher, "-m", "vlmrl", *words], stdout=sys.stderr, env=environment, check=True)
    content: dict[str, Any] = json.loads((run / "bench.json").read_bytes())
    return content


def line(row: str, benches: list[dict[str, Any]]) -> str:
    """A row of the table."""
    steps = [each["step_s"]["mean"] for each in benches]
    memory = benches[-1]["memory"]
    plans = (memory["planned_bytes"], memory["planned_full_bytes"])
    planned = "unknown" if None in plans else " – ".join(dict.fromkeys(f"{each / 2**30:.1f}" for each in plans))
    limits = [
        each["sampling"]["least_s"] / max(each["parts_s"]["sampling"], 1e-9)
        for each in benches
        if each["sampling"]["least_s"] is not None
    ]

    def median(part: str, key: str) -> float:
        return statistics.median(float(each[part][key]) for each in benches)

    bounds = max(benches, key=lambda each: float(each["bounded_by"]["share"]))["bounded_by"]
    return (
        f"| {row} | {statistics.median(steps):.3f} | {min(steps):.3f} – {max(steps):.3f} "
        f"| {median('sampling', 'tokens_per_s'):.0f} | {f'{statistics.median(limits):.1%}' if limits else 'none'} "
        f"| {median('training', 'share_of_product'):.1%} | {median('whole_step', 'share'):.2f} "
        f"| {bounds['part']} ({bounds['share']:.0%}) | {memory['peak_bytes'] / 2**30:.1f} | {planned} |"
    )


if __name__ == "__main__":
    main()
