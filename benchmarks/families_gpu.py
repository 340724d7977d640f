"""Families beside Qwen3-VL on one GPU: a training step by tree or by shared states beside sequences, and a run.

    python benchmarks/families_gpu.py [--families qwen2_5_vl,qwen3_5] [--shapes image,codeword] [--rows tree,varlen]
    python benchmarks/families_gpu.py --run [--families …] [override …]        three steps of a run through vLLM
    python benchmarks/families_gpu.py --rounding --device cpu [--families …]   what bfloat16 alone does to the mismatch
    python benchmarks/families_gpu.py --size tiny --device cpu                 rehearsal: the numbers mean nothing

Checkpoints have published sizes (Qwen2.5-VL 3B, Qwen3.5 2B) and random weights (large_family.py). A step is forward and
backward over a whole batch of groups of 16 (training_batches.py), packing and the transfer of pixels included, the
optimizer's step left out. `tree`: each prefix once; layers that carry a state start branches from the state of their
prefix. `varlen`: the samples side by side. `loss` and `grad` (norm) are there to be compared: the rows of a shape are
the same samples. In a run, weights go to the server by CUDA IPC, and `mismatch` is `mismatch_kl/mean` and its largest.
`--rounding` samples text with transformers alone, token by token in bfloat16, and compares those logprobs with its own
of the whole sequences.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from large_family import LARGE, LOGIT_SCALE, REPOSITORY, random_model, write, write_tokenizer_and_config
from train_throughput import Step, packed_step
from training_batches import SHAPES, make_batch

from vlmrl.config.model import Dtype, ModelConfig, VideoConfig, VLMConfig
from vlmrl.config.orchestrator import TEMPLATE, RendererConfig
from vlmrl.config.trainer import Packing
from vlmrl.models.blocks import compile_blocks
from vlmrl.models.checkpoints.load import load_eos_ids, load_model, load_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.preflight.auto_model import known_families
from vlmrl.record.metrics import read_metrics
from vlmrl.rendering.renderer import Renderer, make_renderer

STEP_HEAD = (
    "| family | shape | row | s/step | rollout tokens/s | computed rows | rows/s | peak GiB | loss | grad "
    "| micro-batches | first step s |"
)
ROUNDING_HEAD = "| family | compared with | mismatch | largest |"
RUN_HEAD = "| family | step | s | rollouts s | train s | sync s | tokens/s | trained | mismatch | largest | peak GiB |"

RUN = (
    "model=auto",
    "task=color_codeword",
    "trainer.learning_rate=1e-6",
    "trainer.lr_warmup_steps=0",
    "trainer.max_steps=3",
    "trainer.micro_batch_tokens=8192",
    "trainer.checkpoint_every=0",
    "orchestrator.groups_per_step=8",
    "orchestrator.group_size=8",
    "orchestrator.eval.every=0",
    "monitor.live=false",
    "monitor.vision_gap_every=0",
)
ON_A_GPU = (
    "inference=vllm",
    "weight_sync=cuda_ipc",
    "inference.gpu_memory_utilization=0.2",
    "inference.extra_args={compilation_config:{mode:0,cudagraph_mode:FULL_DECODE_ONLY}}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(LARGE))
    parser.add_argument("--size", default="large", choices=["large", "tiny"])
    parser.add_argument("--shapes", default="image,codeword", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="tree,varlen")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--groups", type=int, default=2, help="of 16 rollouts")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further row is begun after this")
    parser.add_argument("--run", action="store_true", help="a run through vLLM in place of steps of the trainer")
    parser.add_argument("--rounding", action="store_true", help="the mismatch of bfloat16 with itself and with float32")
    arguments, overrides = parser.parse_known_args()
    name = torch.cuda.get_device_name(0) if arguments.device == "cuda" else platform.machine()
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"python {' '.join(sys.argv)}\n{name}, {packages}\n", flush=True)
    head = RUN_HEAD if arguments.run else ROUNDING_HEAD if arguments.rounding else STEP_HEAD
    print(f"{head}\n|{'---|' * (head.count('|') - 1)}", flush=True)
    for family in arguments.families.split(","):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / family
            if arguments.run:
                run(arguments, family, folder, overrides)
            elif arguments.rounding:
                rounding(arguments, family, folder)
            else:
                Steps(arguments, family, folder).measure_all()


def policy_and_renderer(
    family: str, size: str, folder: Path, device: str, dtype: torch.dtype | None = None
) -> tuple[Policy, Renderer]:
    """A family's policy with random weights, and its renderer; writes their `folder`. Without a `dtype` it is bfloat16,
    or float32 for the tiny one."""
    write_tokenizer_and_config(family, size, folder)
    fields = known_families()[family]
    video = VideoConfig(**fields["video"]) if "video" in fields else None
    vlm = VLMConfig(**{**fields, "video": video})
    config = ModelConfig(name=str(folder), dtype=Dtype.float32, device=device, vlm=vlm)
    model: Any = load_model(folder, config) if size == "tiny" else random_model(folder, device)
    if dtype is not None:
        model.to(dtype)
    processor = load_processor(folder, vlm)
    renderer = make_renderer(
        RendererConfig(name=TEMPLATE),
        config,
        load_tokenizer(folder),
        processor.image_processor,
        model.get_input_embeddings().num_embeddings,
        family_of(vlm).placeholder_tokens,
        processor=processor,
        eos_ids=load_eos_ids(folder),
    )
    merge = model.config.vision_config.spatial_merge_size
    return Policy(model, position_function(vlm.positions, merge), renderer.banned_token_ids), renderer


class Steps:
    """The training steps of one family."""

    def __init__(self, arguments: argparse.Namespace, family: str, folder: Path) -> None:
        self.arguments, self.family, self.folder = arguments, family, folder
        self.gpu = arguments.device == "cuda"
        self.started = time.perf_counter()

    def measure_all(self) -> None:
        """Print a line for each shape and row."""
        policy, renderer = policy_and_renderer(self.family, self.arguments.size, self.folder, self.arguments.device)
        if self.gpu:
            compile_blocks(policy.model)
        for shape in self.arguments.shapes.split(","):
            chosen = replace(SHAPES[shape], groups=self.arguments.groups)
            if self.arguments.size == "tiny":
                chosen = replace(chosen, side=min(chosen.side, 64), new_tokens=min(chosen.new_tokens, 12))
            samples = make_batch(chosen, renderer, policy.config.get_text_config().vocab_size)
            for row in self.arguments.rows.split(","):
                if time.perf_counter() - self.started > self.arguments.seconds:
                    print(f"| {self.family} | {shape} | {row} | not run: time is up |", flush=True)
                    continue
                try:
                    figures = self.measure(policy, Packing(row), samples)
                except Exception as error:  # noqa: BLE001  # the other rows are what the GPU's minutes are for
                    figures = f"{type(error).__name__}: {str(error)[:300]!r} |"
                policy.model.zero_grad(set_to_none=True)
                gc.collect()
                print(f"| {self.family} | {shape} | {row} | {figures}", flush=True)

    def measure(self, policy: Policy, packing: Packing, samples: list[Any]) -> str:
        kernel = policy.kernel(shared=packing is Packing.tree)
        seconds: list[float] = []
        for number in range(self.arguments.steps + 1):
            policy.model.zero_grad(set_to_none=True)
            self.synchronize()
            if number == 1 and self.gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            done: Step = packed_step(policy, samples, packing, kernel, self.arguments.micro_batch_tokens)
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        squares = [p.grad.float().square().sum() for p in policy.model.parameters() if p.grad is not None]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
        return (
            f"{median:.3f} | {done.tokens / median:.0f} | {done.work.rows} | {done.work.rows / median:.0f} "
            f"| {peak:.1f} | {done.loss:.5f} | {float(torch.stack(squares).sum().sqrt()):.4f} | {done.micro_batches} "
            f"| {seconds[0]:.1f} |"
        )

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def run(arguments: argparse.Namespace, family: str, folder: Path, overrides: list[str]) -> None:
    """Print a line for each step of a run."""
    write(family, arguments.size, folder, arguments.device)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # the run has processes of its own
    output = folder.parent / "run"
    chosen = [*RUN, *(ON_A_GPU if arguments.device == "cuda" else ()), *overrides]
    command = [sys.executable, "-m", "vlmrl", f"model.name={folder}", f"hydra.run.dir={output}", *chosen]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-8:]
        print(f"| {family} | the run ended with {done.returncode}: {' '.join(said)} |", flush=True)
        return
    for line in read_metrics(output / "metrics.jsonl"):
        if "mismatch_kl/mean" not in line:
            continue
        print(
            f"| {family} | {line['step']:.0f} | {line['time/step']:.2f} | {line['time/rollout_span']:.2f} "
            f"| {line['time/train']:.2f} | {line['time/sync']:.2f} | {line['throughput/tokens_per_s']:.0f} "
            f"| {line['tokens/trained']:.0f} | {line['mismatch_kl/mean']:.2e} | {line['mismatch_kl/max']:.2e} "
            f"| {line['memory/peak_bytes'] / 2**30:.1f} |",
            flush=True,
        )


@torch.inference_mode()
def rounding(arguments: argparse.Namespace, family: str, folder: Path) -> None:
    """Print how far logprobs sampled one token at a time are from those of whole sequences, by k3 in nats."""
    write_tokenizer_and_config(family, "large", folder)
    model = random_model(folder, arguments.device, logit_scale=LOGIT_SCALE)
    decoder, head = model.base_model.get_decoder(), model.get_output_embeddings()
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (4, 64), device=arguments.device)
    prompt, newest, past = tokens.shape[1], tokens, None
    sampled = []
    for _ in range(24):
        out = decoder(input_ids=newest, past_key_values=past, use_cache=True)
        log_probs = head(out.last_hidden_state[:, -1]).float().log_softmax(-1)
        newest, past = torch.multinomial(log_probs.exp(), 1), out.past_key_values
        sampled.append(log_probs.gather(1, newest))
        tokens = torch.cat([tokens, newest], 1)
    del past
    for dtype in (torch.bfloat16, torch.float32):
        decoder, head = decoder.to(dtype), head.to(dtype)
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        whole = head(hidden).float().log_softmax(-1).gather(2, tokens[:, prompt:, None])[..., 0]
        log_ratio = whole - torch.cat(sampled, 1)
        k3 = log_ratio.exp() - 1 - log_ratio
        print(f"| {family} | {dtype} | {float(k3.mean()):.2e} | {float(k3.max()):.2e} |", flush=True)


if __name__ == "__main__":
    main()
