"""Seconds per whole GRPO step on one GPU (rollouts, training, weights to the sampler): vlmrl against TRL's GRPOTrainer.

    python benchmarks/trl_whole_step.py --model DIR [--rows embedded,one_gpu,trl_vllm,trl_continuous,trl_generate]
    python benchmarks/trl_whole_step.py --size tiny --device cpu --groups 2 …      rehearsal: the numbers mean nothing

Every row has the same checkpoint, number of prompts and rollouts, images of noise (a new one for each problem), new
tokens, AdamW, bf16, on-policy, with one optimizer step per batch. Each row is a process group of its own. A row that
fails says why. A row that takes longer than `--row-limit-s` is killed; the steps that TRL took until then count.

    embedded, one_gpu   the rows of whole_step.py (`mode=bench`)
    trl_vllm            use_vllm, vllm_mode=colocate: vLLM in TRL's process, on the same GPU
    trl_continuous      use_transformers_continuous_batching
    trl_generate        transformers' generate

A step of TRL is the time from the end of one optimizer step to the end of the next. Its first step is not counted.
`sampling` is new weights in vLLM, prefill and decode; `training` is forward, backward and AdamW; `other` is the rest
(TRL: images to pixels, and with vLLM a forward pass for its importance ratios). TRL's peak memory is that of PyTorch in
its process, so it includes the colocated vLLM; the peak of `one_gpu` is without its server.

Settings of `trl_vllm` that TRL has no option for go to `vllm.LLM` directly (`--trl-vllm`, JSON): CUDA graphs for decode
without torch.compile, as in the row `one_gpu` of our measurements, and no memory for videos. TRL 1.16 hands vLLM
prompts with one placeholder token per image patch, and vLLM expands the first of them again
(https://github.com/huggingface/trl/issues/6294); here vLLM gets one placeholder per image, so that it samples from the
prompt that TRL trains on. The process group of vLLM is made through a file, so that no port is opened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import whole_step

VLMRL_ROWS = ("embedded", "one_gpu")
TRL_ROWS = ("trl_vllm", "trl_continuous", "trl_generate")
TRL_VLLM = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}
GPU_PATIENCE_S = 15.0
"""After a row was killed: seconds until its memory is free. vlmrl's servers end by themselves within ten."""
REASON_CHARACTERS = 200
LOG_LINES = 40
"""Lines of a failed row's log that are shown on standard error."""
HEAD = "| row | s/step, median | min – max | sampling s | training s | other s | tokens per answer | peak GiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join((*VLMRL_ROWS, *TRL_ROWS)))
    whole_step.add_shape(parser)
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a row")
    parser.add_argument("--device", default="cuda", help="of TRL's rows")
    parser.add_argument("--trl-micro-batch", type=int, default=4, help="samples per forward of TRL")
    parser.add_argument("--trl-vllm-memory", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    parser.add_argument("--trl-vllm", type=json.loads, default=TRL_VLLM, help="JSON for vllm.LLM")
    parser.add_argument("--trl-sleep", action="store_true", help="vllm_enable_sleep_mode")
    parser.add_argument("--row-limit-s", type=float, default=400.0)
    parser.add_argument("--json", type=Path, help="also write what every row measured here")
    parser.add_argument("--logs", type=Path, help="an existing folder for the log of each row")
    parser.add_argument("--row", help="what one process does (internal)")
    parser.add_argument("--result", type=Path, help="where it writes what it measured (internal)")
    parser.add_argument("overrides", nargs="*", help="words of vlmrl's rows; `one_gpu:key=value` is for one row")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := [row for row in rows if row not in (*VLMRL_ROWS, *TRL_ROWS)]:
        parser.error(f"--rows knows {', '.join((*VLMRL_ROWS, *TRL_ROWS))}, not {', '.join(unknown)}")
    if arguments.model is None and arguments.size != "tiny" and not set(TRL_ROWS).isdisjoint(rows):
        parser.error("TRL loads a checkpoint's folder: name one with --model, or set --size tiny")
    if arguments.groups * arguments.group_size % arguments.trl_micro_batch:
        parser.error("--trl-micro-batch must divide the number of rollouts, or TRL would take fewer of them")
    if arguments.row:
        arguments.result.write_text(json.dumps(measure(arguments)))
        return
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "vllm", "trl"))
    print(
        f"python {' '.join(sys.argv)}\nPython {platform.python_version()}, {packages}; {arguments.groups} × "
        f"{arguments.group_size} rollouts, images of {arguments.side} × {arguments.side}, up to {arguments.new_tokens} "
        f"tokens\n\n{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}",
        flush=True,
    )
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found[row] = in_process(arguments, row)
        print(line(row, found[row]), flush=True)
    print(f"\n{notes(found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def in_process(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """What a process of its own measures, or {"reason": why it does not}."""
    limit_s = arguments.row_limit_s
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", __file__, "--row", row, "--result", str(result), *sys.argv[1:]]
        reason = ""
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            reason = f"killed after {limit_s:.0f} s (--row-limit-s)"
        finally:  # vLLM may leave processes behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if arguments.logs:
            (arguments.logs / f"{row}.log").write_bytes(log.read_bytes())
        found = json.loads(result.read_text()) if result.exists() else {}
        if reason:
            time.sleep(GPU_PATIENCE_S)
        if found.get("seconds"):  # perhaps of fewer steps
            return {**found, "note": reason} if reason else dict(found)
        lines = log.read_text(errors="replace").strip().splitlines()
        print(f"{row} failed; the end of its log:", *lines[-LOG_LINES:], sep="\n", file=sys.stderr, flush=True)
        reason = reason or found.get("reason") or (lines or [f"ended with exit code {process.returncode}"])[-1]
        return {"reason": reason[:REASON_CHARACTERS].replace("|", "\\|")}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one row measures, in this process."""
    if arguments.row in VLMRL_ROWS:
        return vlmrl(arguments, arguments.row)
    from trl_rows import trl

    try:
        with tempfile.TemporaryDirectory() as folder:
            return trl(arguments, Path(folder))
    except Exception as error:
        said = [text.strip() for text in str(error).splitlines() if "For further information" not in text]  # pydantic's
        arguments.result.write_text(json.dumps({"reason": f"{type(error).__name__}: {said[-1] if said else ''}"}))
        raise


def vlmrl(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """One run of `mode=bench`."""
    words = [word.removeprefix(f"{row}:") for word in arguments.overrides]
    arguments.overrides = [word for word in words if not word.startswith(tuple(f"{each}:" for each in VLMRL_ROWS))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = whole_step.bench(arguments, row, 0, Path(folder) / "run")
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # the log's last line says why
    return {
        "seconds": bench["step_s"]["each"],
        "sampling": bench["parts_s"]["sampling"],
        "training": bench["parts_s"]["training"],
        "answer": bench["tokens"]["sampled"] / bench["tokens"]["rollouts"],
        "peak": bench["memory"]["peak_bytes"] / 2**30,
    }


def line(row: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "reason" in found:
        return f"| {row} | {found['reason']} |{' |' * (HEAD.count('|') - 3)}"
    seconds, sampling, training = found["seconds"], found["sampling"], found["training"]
    return (
        f"| {row} | {statistics.median(seconds):.3f} | {min(seconds):.3f} – {max(seconds):.3f} | {sampling:.3f} "
        f"| {training:.3f} | {statistics.mean(seconds) - sampling - training:.3f} | {found['answer']:.1f} "
        f"| {found['peak']:.1f} |"
    )


def notes(found: dict[str, dict[str, Any]]) -> str:
    """How much faster vlmrl is, and how far vLLM in TRL is from what TRL trains."""
    medians = {row: statistics.median(each["seconds"]) for row, each in found.items() if "seconds" in each}
    ours = [row for row in medians if row in VLMRL_ROWS]
    best = min((row for row in medians if row in TRL_ROWS), key=lambda row: medians[row], default=None)
    lines = [f"{row}: {medians[best] / medians[row]:.1f} times faster than {best}" for row in ours if best]
    lines += [f"{row}: {len(each['seconds'])} step(s), {each['note']}" for row, each in found.items() if "note" in each]
    for row in TRL_ROWS:
        if found.get(row, {}).get("difference"):
            mean = statistics.mean(found[row]["difference"])
            lines.append(f"{row}: |log p of vLLM - log p of the trainer| of a sampled token, mean: {mean:.4f}")
    return "\n".join(lines)


def installed(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "not installed"


if __name__ == "__main__":
    main()
