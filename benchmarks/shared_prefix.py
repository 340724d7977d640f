"""What decoding could do where siblings share their prompt: one step of a 2B decoder on a GPU, from random tensors.

    python benchmarks/shared_prefix.py [--shapes 16x16x1043x512,32x8x256x512] [--device cpu --size tiny]

A shape is groups × siblings × prompt × new tokens. Three ways to attend, in the same step, which is one CUDA graph:

    two parts   the prompt once for all siblings of a group, as dense products; each sibling's own tokens; both merged
                by their log-sum-exp (Hydragen, arXiv 2402.05099)
    one part    each sibling reads the prompt for itself
    nothing     no attention: what the rest of the step takes

The step is that of Qwen3's text decoder: 28 layers, then the head in float32 and a token drawn by a uniform number of
its own, with its logprob. Its tensors are random; the attention is held against one softmax in float64 before anything
is timed. A step's time is the mean over four lengths of the own part. `read` is the least that the attention has to
read, at the speed of a copy: the keys and values of its way.

`--offline CHECKPOINT` then gives the same shapes to `vllm.LLM.generate` (a model of that architecture, text prompts of
random ids that it has not seen, n = siblings, graphs, prefix cache), in a process of its own: the whole call with its
prefill, the median of three rounds. On a CPU, torch does what the kernels do, in the same parts.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 16
"""The least rows of a product on tensor cores."""
CHUNK = 128
"""Tokens of a chunk of the vocabulary."""
KEYS = 64
"""Keys of one product."""
LENGTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
"""Shares of the new tokens at which a step is timed."""
TIMED_STEPS = 20


@dataclass(frozen=True)
class Size:
    """A text decoder's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int


SIZES = {
    "2b": Size(28, 2048, 16, 8, 128, 6144, 151936),
    "tiny": Size(2, 64, 4, 2, 16, 128, 512),
}


@dataclass(frozen=True)
class Shape:
    """What is sampled."""

    groups: int
    siblings: int
    prompt: int
    new: int

    @classmethod
    def of(cls, text: str) -> Shape:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.groups}×{self.siblings}×{self.prompt}×{self.new}"

    @property
    def rows(self) -> int:
        return self.groups * self.siblings


# ── attention in two parts ──────────────────────────────────────────────────────────────────────────────────


class Attention:
    """Attention of one layer over random keys and values."""

    def __init__(self, size: Size, shape: Shape, way: str, device: str, dtype: torch.dtype, splits: int) -> None:
        self.size, self.shape, self.way, self.splits = size, shape, way, splits if way == "two parts" else 0
        prompt = shape.prompt if way == "one part" else 0
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        kv, d = size.kv_heads, size.head_size
        self.own = [torch.randn(shape.rows, kv, prompt + shape.new, d, **make) for _ in range(2)]
        self.shared = [torch.randn(shape.groups, kv, shape.prompt, d, **make) for _ in range(2)]
        if way == "one part":
            for own, shared in zip(self.own, self.shared, strict=True):
                own[:, :, : shape.prompt] = shared.repeat_interleave(shape.siblings, 0)
        parts = max(1, self.splits)
        self.part_out = torch.empty(parts, shape.rows, size.heads, d, device=device)
        self.part_lse = torch.empty(parts, shape.rows, size.heads, device=device)
        self.scale = math.log2(math.e) / math.sqrt(d)

    def __call__(self, query: Tensor, length: Tensor) -> Tensor:
        """query [rows, heads, d], length int32 [1] → [rows, heads, d]."""
        return self._by_kernels(query, length) if query.is_cuda else self._by_torch(query, int(length))

    def _by_kernels(self, query: Tensor, length: Tensor) -> Tensor:
        from shared_prefix_kernels import own_part, prefix_part

        size, shape = self.size, self.shape
        H, K, D = size.heads, size.kv_heads, size.head_size
        if self.splits:
            entries = shape.siblings * (H // K)
            rows = min(128, max(ROWS, 1 << (entries - 1).bit_length()))
            grid = (shape.groups * K, self.splits, -(-entries // rows))
            prefix_part[grid](
                query, *self.shared, self.part_out, self.part_lse, self.scale, shape.prompt, shape.siblings,
                shape.rows, self.splits, H, K, D, rows, KEYS, num_warps=4,
            )  # fmt: skip
        out = torch.empty_like(query)
        own_part[(shape.rows, K)](
            query, *self.own, length, self.part_out, self.part_lse, out, self.scale, self.own[0].shape[2],
            shape.rows, self.splits, H, K, D, ROWS, KEYS, num_warps=4,
        )  # fmt: skip
        return out

    def _by_torch(self, query: Tensor, length: int) -> Tensor:
        """The same parts and the same merging, for a machine without a GPU."""
        shape, d = self.shape, self.size.head_size
        by_group = query.view(shape.groups, shape.siblings, self.size.kv_heads, -1, d)
        parts: list[tuple[Tensor, Tensor, int]] = []
        if self.splits:
            keys, values = self.shared
            scores = torch.einsum("gskhd,gknd->gskhn", by_group, keys) * self.scale
            for part in scores.chunk(self.splits, -1):
                first = sum(each[2] for each in parts)
                found = torch.einsum("gskhn,gknd->gskhd", *_weights(part, values[:, :, first : first + part.shape[-1]]))
                parts.append((found.flatten(0, 1), _lse(part).flatten(0, 1), part.shape[-1]))
        own = query.view(shape.rows, self.size.kv_heads, -1, d)
        scores = torch.einsum("rkhd,rknd->rkhn", own, self.own[0][:, :, :length]) * self.scale
        found = torch.einsum("rkhn,rknd->rkhd", *_weights(scores, self.own[1][:, :, :length]))
        parts.append((found, _lse(scores), length))
        lse = torch.stack([each for _, each, _ in parts])
        weights = torch.exp2(lse - (lse * math.log(2)).logsumexp(0) / math.log(2))
        merged: Tensor = (torch.stack([out for out, _, _ in parts]) * weights[..., None]).sum(0)
        return merged.view_as(query)

    def bytes_read(self, new: float) -> float:
        """Bytes of keys and values that have to be read, with `new` tokens in each own part."""
        size, shape = self.size, self.shape
        each = 2 * size.kv_heads * size.head_size * self.own[0].element_size()
        prompts = {"two parts": shape.groups, "one part": shape.rows}[self.way] * shape.prompt
        return each * (prompts + shape.rows * new)

    def exact(self, query: Tensor, new: int) -> Tensor:
        """The same by one softmax in float64."""
        shape, group = self.shape, self.size.heads // self.size.kv_heads
        keys, values = (
            torch.cat([s.repeat_interleave(shape.siblings, 0), o[:, :, o.shape[2] - shape.new :][:, :, :new]], 2)
            .double()
            .repeat_interleave(group, 1)
            for s, o in zip(self.shared, self.own, strict=True)
        )
        scores = torch.einsum("bhd,bhnd->bhn", query.double(), keys) / math.sqrt(self.size.head_size)
        return torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), values)


def _weights(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return (scores * math.log(2)).softmax(-1), values


def _lse(scores: Tensor) -> Tensor:
    """Log-sum-exp to the base 2 over the keys."""
    return (scores * math.log(2)).logsumexp(-1) / math.log(2)


def check(size: Size, shape: Shape, device: str, dtype: torch.dtype, splits: int) -> dict[str, float]:
    """The largest difference of each way from one softmax in float64, in units of the output's root mean square."""
    found = {}
    small = Shape(min(2, shape.groups), shape.siblings, shape.prompt, shape.new)
    for way in ("two parts", "one part"):
        attention = Attention(size, small, way, device, dtype, splits)
        query = torch.randn(small.rows, size.heads, size.head_size, device=device, dtype=dtype)
        worst = 0.0
        for new in (1, small.new // 3, small.new):
            prompt = small.prompt if way == "one part" else 0
            length = torch.tensor([prompt + new], dtype=torch.int32, device=device)
            wanted = attention.exact(query, new)
            difference = (attention(query, length).double() - wanted).abs().max() / wanted.square().mean().sqrt()
            worst = max(worst, float(difference))
        found[way] = worst
    return found


# ── a decode step ───────────────────────────────────────────────────────────────────────────────────────────


class Decoder:
    """Qwen3's text decoder with random weights; one new token per row."""

    def __init__(self, size: Size, shape: Shape, way: str, device: str, dtype: torch.dtype, splits: int) -> None:
        self.size, self.way, self.rows = size, way, shape.rows

        def weights(*dims: int) -> Tensor:
            scale: float = dims[-1] ** -0.5
            return torch.randn(*dims, device=device, dtype=dtype) * scale

        q, kv = size.heads * size.head_size, size.kv_heads * size.head_size
        self.layers = [
            (weights(q + 2 * kv, size.hidden), weights(size.hidden, q), weights(2 * size.ffn, size.hidden),
             weights(size.hidden, size.ffn), Attention(size, shape, way, device, dtype, splits))
            for _ in range(size.layers)
        ]  # fmt: skip
        self.embedding = weights(size.vocabulary, size.hidden)
        self.scales = torch.ones(size.hidden, device=device, dtype=dtype)
        self.head_scales = torch.ones(size.head_size, device=device, dtype=dtype)
        compiled: Callable[[Any], Any] = torch.compile if device == "cuda" else lambda function: function
        self._before, self._rotate, self._gated = compiled(before), compiled(rotate), compiled(gated)
        self._sums = compiled(chunk_sums)

    def step(self, tokens: Tensor, length: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 [rows] → the next tokens int64 [rows] and their logprobs float32 [rows]."""
        size, residual = self.size, self.embedding[tokens]
        update = torch.zeros_like(residual)
        q, kv, d = size.heads * size.head_size, size.kv_heads * size.head_size, size.head_size
        for w_in, w_out, w_up, w_down, attention in self.layers:
            residual, normed = self._before(residual, update, self.scales)
            query, key, value = (normed @ w_in.t()).split([q, kv, kv], -1)
            query, key = self._rotate(query, key, self.head_scales, length, d)
            if self.way == "nothing":
                mixed = query
            else:
                place = (length - 1).long()
                attention.own[0].index_copy_(2, place, key.view(self.rows, size.kv_heads, 1, d))
                attention.own[1].index_copy_(2, place, value.reshape(self.rows, size.kv_heads, 1, d))
                mixed = attention(query, length)
            residual, normed = self._before(residual, mixed.view(self.rows, q) @ w_out.t(), self.scales)
            update = self._gated(normed @ w_up.t()) @ w_down.t()
        _, hidden = self._before(residual, update, self.scales)
        if hidden.is_cuda:
            logits = torch.mm(hidden, self.embedding.t(), out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.embedding.float().t()
        return draw(logits, uniform, self._sums)


def before(residual: Tensor, update: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Add an update, and RMSNorm of the sum."""
    residual = residual + update
    wide = residual.float()
    return residual, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(residual.dtype) * scales


def rotate(query: Tensor, key: Tensor, scales: Tensor, length: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Norms of each head and rotary positions → [rows, heads, d]."""
    angle = length.float() * 1e6 ** (-torch.arange(0, d, 2, device=query.device) / d)
    cos, sin = angle.cos(), angle.sin()
    found = []
    for each in (query, key):
        wide = each.reshape(len(each), -1, d).float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * scales
        a, b = wide.chunk(2, -1)
        found.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(each.dtype))
    return found[0], found[1]


def gated(both: Tensor) -> Tensor:
    """silu(gate) · up."""
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def chunk_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [rows, 1], and the probability of each chunk of the vocabulary [rows, chunks]."""
    lse = logits.logsumexp(-1, keepdim=True)
    return lse, (logits - lse).exp().view(len(logits), -1, CHUNK).sum(-1)


def draw(logits: Tensor, uniform: Tensor, sums: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A token per row by inverse transform sampling, first of a chunk, then in it; and its logprob."""
    lse, of_chunk = sums(logits)
    below = of_chunk.cumsum(-1)
    chunk = (below < uniform[:, None]).sum(-1, keepdim=True).clamp_max(below.shape[1] - 1)
    left = uniform[:, None] - below.gather(1, chunk) + of_chunk.gather(1, chunk)
    columns = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)
    logprobs = logits.gather(1, columns) - lse
    place = (logprobs.exp().cumsum(-1) < left).sum(-1, keepdim=True).clamp_max(CHUNK - 1)
    return columns.gather(1, place)[:, 0], logprobs.gather(1, place)[:, 0]


# ── timing ──────────────────────────────────────────────────────────────────────────────────────────────────


def seconds(run: Callable[[], object], device: str) -> float:
    """Median seconds of a call, as a CUDA graph where there is a GPU."""
    if device == "cpu":
        run()
        return 1.0
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(TIMED_STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_speed(device: str) -> float:
    """Bytes per second that a copy reads and writes."""
    count = 1 << (30 if device == "cuda" else 16)
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source), device)


def measure(size: Size, shape: Shape, way: str, args: argparse.Namespace, speed: float) -> tuple[float, str]:
    """Mean seconds of a step, and the rest of its line."""
    dtype = torch.bfloat16
    decoder = Decoder(size, shape, way, args.device, dtype, args.splits)
    tokens = torch.randint(size.vocabulary, (shape.rows,), device=args.device)
    uniform = torch.rand(shape.rows, device=args.device)
    length = torch.ones(1, dtype=torch.int32, device=args.device)
    times, shares = [], []
    query = torch.randn(shape.rows, size.heads, size.head_size, device=args.device, dtype=dtype)
    for share in LENGTHS:
        new = max(1, int(shape.new * share))
        length.fill_(new + (shape.prompt if way == "one part" else 0))
        times.append(seconds(lambda: decoder.step(tokens, length, uniform), args.device))
        if way != "nothing":
            attend = [layer[-1] for layer in decoder.layers]
            alone = seconds(lambda: [each(query, length) for each in attend], args.device)  # noqa: B023
            least = sum(each.bytes_read(new) for each in attend) / speed
            shares.append((alone, least))
    mean = statistics.mean(times)
    if not shares:
        return mean, "| – | – | – |"
    alone, least = (statistics.mean(each) for each in zip(*shares, strict=True))
    return mean, f"| {alone * 1e3:.2f} | {least * 1e3:.2f} | {least / alone:.2f} |"


def offline(checkpoint: str, shapes: list[Shape]) -> None:
    """Print the tokens per second of `vllm.LLM.generate`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint, dtype="bfloat16", max_model_len=2048, max_num_seqs=512, gpu_memory_utilization=0.85,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, disable_log_stats=True,
        logprobs_mode="processed_logprobs", limit_mm_per_prompt={"image": 0, "video": 0},
    )  # fmt: skip
    rng = random.Random(0)
    for shape in shapes:
        sampling = SamplingParams(
            n=shape.siblings, max_tokens=shape.new, ignore_eos=True, logprobs=0, detokenize=False, temperature=1.0
        )
        rates = []
        for _ in range(4):
            ids = [[rng.randrange(1000, 100000) for _ in range(shape.prompt)] for _ in range(shape.groups)]
            started = time.perf_counter()
            found = llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
            tokens = sum(len(each.token_ids) for request in found for each in request.outputs)
            rates.append(tokens / (time.perf_counter() - started))
        middle, span = statistics.median(rates[1:]), f"{min(rates[1:]):,.0f} to {max(rates[1:]):,.0f}"
        print(f"| {shape} | LLM.generate | {middle:,.0f} | {span} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="16x16x1043x512,32x16x1043x512,32x8x256x512,51x5x777x512,256x1x1043x512")
    parser.add_argument("--size", default="2b", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--offline", metavar="CHECKPOINT")
    parser.add_argument("--only-offline", action="store_true")
    args = parser.parse_args()
    shapes = [Shape.of(each) for each in args.shapes.split(",")]
    if args.only_offline:
        offline(args.offline, shapes)
        return
    size = SIZES[args.size]
    torch.manual_seed(0)
    speed = copy_speed(args.device)
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'}, torch {torch.__version__}; "
          f"a copy moves {speed / 1e12:.2f} TB/s")  # fmt: skip
    print("| shape | way | step ms | tokens/s | attention ms | read ms | share | largest error |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        errors = check(size, shape, args.device, dtype, args.splits)
        for way in ("two parts", "one part", "nothing"):
            step, rest = measure(size, shape, way, args, speed)
            error = f"{errors[way]:.1e}" if way in errors else "–"
            print(f"| {shape} | {way} | {step * 1e3:.2f} | {shape.rows / step:,.0f} {rest} {error} |", flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    if args.offline:
        print("\n| shape | side | tokens/s | of three rounds |\n|---|---|---|---|", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--only-offline"], check=True)


if __name__ == "__main__":
    main()
