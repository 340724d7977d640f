"""Rollout tokens trained per second on one GPU: tree and varlen packing beside a padded batch, in one run.

    python benchmarks/train_throughput.py [--sizes 2b,4b] [--shapes codeword,image,images,clip,stills] [--rows ROW,…]
    python benchmarks/train_throughput.py --sizes tiny --device cpu        rehearsal: the numbers mean nothing

A step is forward and backward over a whole batch in micro-batches, packing on the host and the transfer of pixels
included, the optimizer's step left out (it is the same for all). Rows:

    tree, varlen          the product's own, blocks compiled
    tree-ac               with activation checkpointing
    tree-eager, varlen-eager    blocks not compiled
    varlen-flex           samples side by side through FlexAttention instead of variable-length flash attention
    padded                rows padded to the longest of the micro-batch, every sample with its own images, through
                          transformers' own forward and its sdpa attention; logits from the first sampled token on
    padded-compiled       the same, blocks compiled

`computed` counts rows of the language model, padding too. MFU: floating-point operations of the computed rows
as mode=bench counts them (vlmrl/runs/bench/flops.py: matrix products alone, the vision tower's included, nothing for
recomputation or masked pairs) over the time, against a bf16 product of 8192 × 8192 matrices timed in the same run.
`loss` and `grad` (norm) are there to be compared: the rows of a shape are the same samples.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from training_batches import SHAPES, Shape, make_batch, model_config, policy_of

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.trainer import Packing
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.blocks import checkpoint_blocks, compile_blocks
from vlmrl.models.policy import Policy
from vlmrl.runs.bench.flops import Work, model_flops, patches_of
from vlmrl.runs.bench.limits import product_flops
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.loss import BatchTotals, LossTokens
from vlmrl.trainer.objective import policy_loss
from vlmrl.trainer.packing import pack_share
from vlmrl.trainer.shares import divide
from vlmrl.types import TrainingSample


@dataclass(frozen=True)
class Row:
    """A way to compute a batch."""

    packing: Packing | None
    """None: padded."""
    compiled: bool = True
    checkpointed: bool = False
    kernel: Kernel | None = None
    """None: as the trainer chooses."""
    extra: bool = False
    """By default in one shape of the 2B alone."""


ROWS = {
    "tree": Row(Packing.tree),
    "varlen": Row(Packing.varlen),
    "padded": Row(None, compiled=False),
    "varlen-flex": Row(Packing.varlen, kernel=Kernel.flex, extra=True),
    "padded-compiled": Row(None, extra=True),
    "tree-ac": Row(Packing.tree, checkpointed=True, extra=True),
    "tree-eager": Row(Packing.tree, compiled=False, extra=True),
    "varlen-eager": Row(Packing.varlen, compiled=False, extra=True),
}

HEAD = (
    "| size | shape | row | s/step | rollout tokens/s | computed rows | rows/s | TFLOP | MFU | peak GiB | loss | grad "
    "| micro-batches | first step s |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2b,4b")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument(
        "--rows",
        default="",
        help=f"of {', '.join(ROWS)}; by default the first three, and of 2b all in the shape `image`",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="0: 16384, on a GPU below 100 GiB 8192")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--groups", type=int, default=0, help="instead of the shape's own")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further row is begun after this")
    arguments = parser.parse_args()
    torch.set_num_threads(8 if arguments.device == "cuda" else 1)
    Bench(arguments).run()


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.started = time.perf_counter()
        self.gpu = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(0).total_memory if self.gpu else 0
        self.budget = arguments.micro_batch_tokens or (16384 if memory > 100 * 2**30 else 8192)
        self.peak = product_flops(self.device, torch.bfloat16)

    def run(self) -> None:
        name = torch.cuda.get_device_name(0) if self.gpu else platform.machine()
        print(
            f"python {' '.join(sys.argv)}\n{name}, torch {torch.__version__}, bf16 product "
            f"{self.peak / 1e12:.0f} TFLOP/s, micro-batches of {self.budget} tokens, groups of 16\n\n{HEAD}\n"
            f"|{'---|' * (HEAD.count('|') - 1)}",
            flush=True,
        )
        chosen = [name for name in self.arguments.rows.split(",") if name]
        for size in self.arguments.sizes.split(","):
            for compiled in (False, True):
                policy: Policy | None = None
                for shape_name in self.arguments.shapes.split(","):
                    shape = self.shape(shape_name, size)
                    samples: list[TrainingSample] = []
                    for row_name, row in ROWS.items():
                        if row.compiled is not compiled:
                            continue
                        is_extra = row.extra and (size, shape_name) != ("2b", "image")
                        if row_name not in chosen if chosen else is_extra:
                            continue
                        if time.perf_counter() - self.started > self.arguments.seconds:
                            print(f"| {size} | {shape_name} | {row_name} | not run: time is up |", flush=True)
                            continue
                        if policy is None:
                            dtype = Dtype.bfloat16 if self.gpu else Dtype.float32
                            config = model_config(size, dtype, self.arguments.device)
                            policy, renderer = policy_of(config)
                            if compiled:
                                compile_blocks(policy.model)
                        if not samples:
                            samples = make_batch(shape, renderer, policy.config.text_config.vocab_size)
                        self.row(size, shape_name, row_name, row, policy, samples)
                policy = None
                self.empty()

    def shape(self, name: str, size: str) -> Shape:
        shape = SHAPES[name]
        groups = self.arguments.groups or max(1, shape.groups // (1 if size == "2b" else 2))
        shape = replace(shape, groups=groups)
        if size == "tiny":
            shape = replace(shape, side=min(shape.side, 64), new_tokens=min(shape.new_tokens, 12), groups=2)
        return shape

    def row(
        self, size: str, shape: str, name: str, row: Row, policy: Policy, samples: Sequence[TrainingSample]
    ) -> None:
        self.empty()
        try:
            figures = self.measure(policy, row, samples)
        except torch.OutOfMemoryError:
            figures = "out of memory |"
        except Exception as error:  # noqa: BLE001  # a row that fails says so; the others are what the GPU's minutes are for
            figures = f"{type(error).__name__}: {str(error)[:300]!r} |"
        policy.model.zero_grad(set_to_none=True)
        print(f"| {size} | {shape} | {name} | {figures}", flush=True)

    def measure(self, policy: Policy, row: Row, samples: Sequence[TrainingSample]) -> str:
        kernel = row.kernel or policy.kernel(shared=row.packing is Packing.tree)
        if row.kernel is not None and not self.gpu:
            kernel = Kernel.blocks
        step: Callable[[], Step]
        with attention(policy, own=row.packing is None), checkpointed(policy, row.checkpointed):
            if row.packing is None:
                step = lambda: padded_step(policy, samples, self.budget)  # noqa: E731
            else:
                packing = row.packing
                step = lambda: packed_step(policy, samples, packing, kernel, self.budget)  # noqa: E731
            seconds: list[float] = []
            for number in range(self.arguments.steps + 1):
                policy.model.zero_grad(set_to_none=True)
                if self.gpu:
                    torch.cuda.synchronize()
                    if number == 1:
                        torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                done = step()
                if self.gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        squares = [p.grad.float().square().sum() for p in policy.model.parameters() if p.grad is not None]
        flops = model_flops(policy.model, done.work)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
        return (
            f"{median:.3f} | {done.tokens / median:.0f} | {done.work.rows} | {done.work.rows / median:.0f} "
            f"| {flops / 1e12:.1f} | {flops / median / self.peak:.1%} | {peak:.1f} | {done.loss:.5f} "
            f"| {float(torch.stack(squares).sum().sqrt()):.4f} | {done.micro_batches} | {seconds[0]:.1f} |"
        )

    def empty(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Step:
    """What a step did."""

    work: Work
    tokens: int
    """Loss tokens of the rollouts."""
    loss: float
    micro_batches: int


def packed_step(
    policy: Policy, samples: Sequence[TrainingSample], packing: Packing, kernel: Kernel, budget: int
) -> Step:
    """The product's own: what `LocalTrainer.train_step` does before the optimizer."""
    totals = BatchTotals(sum(int(s.loss_mask.sum()) for s in samples), len(samples), max_new_tokens=1024)
    share = divide(samples, packing, budget)[0]
    done = Step(Work(), totals.tokens, 0.0, len(share.passes))
    losses, pairs = [], []
    for batch in pack_share(share, packing, policy.positions, policy.device, kernel, policy.rules):
        logprobs, entropies = loss_logprobs(policy, batch, 1.0)
        tokens = LossTokens(logprobs, batch.inference_logprobs, batch.advantages, batch.sample_index, entropies)
        loss = policy_loss(tokens, totals, AlgorithmConfig()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        pairs.append((batch.position_ids[0] + 1).sum())
        done.work.rows += len(batch.token_ids)
        done.work.head_rows += len(batch.loss_rows)
        done.work.images += [n for item in batch.mm_items for n in patches_of(item)]
        done.work.features += sum(item.num_tokens for item in batch.mm_items)
    done.loss, done.work.pairs = float(torch.stack(losses).sum()), int(torch.stack(pairs).sum())
    return done


def padded_step(policy: Policy, samples: Sequence[TrainingSample], budget: int) -> Step:
    """A batch as trainers without packing make it; the model is called as transformers means it to be."""
    ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
    chunks: list[list[TrainingSample]] = []
    for sample in ordered:
        if not chunks or len(sample.token_ids) * (len(chunks[-1]) + 1) > budget:
            chunks.append([])
        chunks[-1].append(sample)
    totals = BatchTotals(sum(int(s.loss_mask.sum()) for s in samples), len(samples), max_new_tokens=1024)
    done = Step(Work(), totals.tokens, 0.0, len(chunks))
    losses = []
    for chunk in chunks:
        logprobs, mask, work = _padded_logprobs(policy, chunk)
        sampled, advantages = (
            torch.cat([torch.from_numpy(getattr(s, name)[s.loss_mask]) for s in chunk]).to(policy.device)
            for name in ("inference_logprobs", "advantages")
        )
        tokens = LossTokens(
            logprobs[mask],
            sampled,
            advantages,
            torch.cat([torch.full((int(s.loss_mask.sum()),), i) for i, s in enumerate(chunk)]).to(policy.device),
            entropies=torch.zeros_like(sampled),  # no loss here uses them
        )
        loss = policy_loss(tokens, totals, AlgorithmConfig()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        done.work.rows += work.rows
        done.work.pairs += work.pairs
        done.work.head_rows += work.head_rows
        done.work.images += work.images
        done.work.features += work.features
    done.loss = float(torch.stack(losses).sum())
    return done


def _padded_logprobs(policy: Policy, chunk: Sequence[TrainingSample]) -> tuple[Tensor, Tensor, Work]:
    longest = max(len(sample.token_ids) for sample in chunk)
    first = min(int(np.flatnonzero(sample.loss_mask)[0]) for sample in chunk)

    def padded(arrays: Sequence[np.ndarray]) -> Tensor:
        rows = [np.pad(array, (0, longest - len(array))) for array in arrays]
        return torch.from_numpy(np.stack(rows)).to(policy.device)

    images = [image for sample in chunk for image in sample.mm_items]
    pixels = {
        name: torch.from_numpy(np.concatenate([image.mm_kwargs[name] for image in images])).to(policy.device)
        for name in images[0].mm_kwargs
    }
    ids = padded([sample.token_ids for sample in chunk])
    out = policy.model(
        input_ids=ids,
        attention_mask=padded([np.ones(len(sample.token_ids), np.int64) for sample in chunk]),
        mm_token_type_ids=padded([sample.mm_token_type_ids for sample in chunk]),
        use_cache=False,
        logits_to_keep=longest - first + 1,
        **pixels,
    )
    log_probs = torch.log_softmax(out.logits[:, :-1].float(), -1)
    work = Work(
        rows=ids.numel(),
        pairs=len(chunk) * longest * (longest + 1) // 2,
        head_rows=out.logits.shape[0] * out.logits.shape[1],
        images=[count for image in images for count in patches_of(image)],
        features=sum(image.num_tokens for image in images),
    )
    mask = padded([sample.loss_mask for sample in chunk])[:, first:]
    return log_probs.gather(-1, ids[:, first:, None])[..., 0], mask, work


class attention:  # noqa: N801
    """transformers' own attention (`own`) or the product's, in both towers, while it lasts."""

    def __init__(self, policy: Policy, *, own: bool) -> None:
        configs = (policy.config.text_config, policy.config.vision_config)
        self.before = [(config, config._attn_implementation) for config in configs]
        self.own = own

    def __enter__(self) -> None:
        for config, _ in self.before:
            if self.own:
                config._attn_implementation = "sdpa"

    def __exit__(self, *_: object) -> None:
        for config, name in self.before:
            config._attn_implementation = name


class checkpointed:  # noqa: N801
    """Activation checkpointing while it lasts."""

    def __init__(self, policy: Policy, on: bool) -> None:
        self.model, self.on = policy.model, on

    def __enter__(self) -> None:
        if self.on:
            checkpoint_blocks(self.model)

    def __exit__(self, *_: object) -> None:
        if self.on:
            self.model.gradient_checkpointing_disable()


if __name__ == "__main__":
    main()
