"""What this machine could do: the speed of a large matrix product and of a copy, and how fast answers could be sampled.

Both speeds are measured where the run is measured, not read from a table of cards. The limit of sampling is what one
decode step after another must at least do, if all answers of a turn are decoded together:

    prefill   the tokens of the distinct prompts that no earlier turn has computed       operations / product speed
    decode    for each token place: all weights once, keys and values of every distinct prompt once,
              and each answer's own keys and values                                      bytes / copy speed,
              or the operations, where those take longer                                 operations / product speed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ROUNDS = 10
"""Times that a product and a copy are timed; the fastest counts."""

GPU_SIDES = (8192, 4096, 2048)
"""Rows and columns of the product on a GPU; the next one where there is no memory for it."""
CPU_SIDE = 512

GPU_COPY_BYTES = (1 << 30, 1 << 28, 1 << 26)
"""Bytes that are copied on a GPU, as above."""
CPU_COPY_BYTES = 1 << 26
"""More than the caches of a processor hold."""


@dataclass(frozen=True)
class Speeds:
    """What one device of this machine can do at most."""

    device: str
    """Its name, e.g. `NVIDIA H200`."""
    product_flops: float
    """Floating-point operations per second of a large matrix product in the model's dtype."""
    copy_bytes: float
    """Bytes per second that a large copy reads and writes."""


def measure_speeds(device: torch.device, dtype: torch.dtype) -> Speeds:
    """Measure both speeds on `device`, with as many threads as torch has. It takes about a second."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} torch threads"
    return Speeds(name, product_flops(device, dtype), copy_bytes(device))


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two large square matrices, the best of `ROUNDS`."""

    def speed(side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return 2.0 * side**3 / _fastest(lambda: a @ b, device)

    return _with_memory(speed, GPU_SIDES if device.type == "cuda" else (CPU_SIDE,))


def copy_bytes(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads and writes together, the best of `ROUNDS`."""

    def speed(size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2.0 * size / _fastest(lambda: target.copy_(source), device)

    return _with_memory(speed, GPU_COPY_BYTES if device.type == "cuda" else (CPU_COPY_BYTES,))


def _with_memory(speed: Callable[[int], float], sizes: Sequence[int]) -> float:
    """`speed` of the first size that there is memory for."""
    for size in sizes[:-1]:
        try:
            return speed(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return speed(sizes[-1])


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of `ROUNDS` calls."""
    best = float("inf")
    for _ in range(ROUNDS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, begin.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - began)
    return best


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """A completion, as the limit of sampling sees it."""

    wave: tuple[str, int]
    """The step and the number of the turn: the answers of a wave are decoded together."""
    prompt: int
    """Equal for equal prompts."""
    prompt_tokens: int
    fresh_tokens: int
    """Those of them that no earlier turn of the rollout has computed."""
    new_tokens: int


@dataclass(frozen=True)
class SamplingCosts:
    """What a token costs the engine."""

    weight_bytes: float
    """Weights that a decode step reads."""
    cache_bytes: float
    """Keys and values of one token."""
    row_flops: float
    """Operations of a token in the language model, without attention and head."""
    head_flops: float
    """Operations of its logits."""


def sampling_seconds(answers: Sequence[Answer], costs: SamplingCosts, speeds: Speeds, devices: int = 1) -> float:
    """The least seconds in which `devices` equal devices could sample `answers`, by the arithmetic at the top. Images
    cost nothing in it.

    Two answers of 4 and 2 tokens to one prompt of 100, where a token costs 1 byte of cache and the weights are 1000
    bytes: 4 × 1000 of weights, 4 × 100 of the prompt, 0 + 1 + 2 + 3 and 0 + 1 of their own.

    >>> costs = SamplingCosts(weight_bytes=1000, cache_bytes=1, row_flops=0, head_flops=0)
    >>> both = [Answer(("1", 0), 7, 100, 100, 4), Answer(("1", 0), 7, 100, 100, 2)]
    >>> sampling_seconds(both, costs, Speeds("", product_flops=1.0, copy_bytes=1.0))
    4407.0
    """
    waves: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        waves.setdefault(answer.wave, []).append(answer)
    return sum(_wave_seconds(wave, costs, speeds) for wave in waves.values()) / devices


def _wave_seconds(wave: Sequence[Answer], costs: SamplingCosts, speeds: Speeds) -> float:
    prompts: dict[int, list[Answer]] = {}
    for answer in wave:
        prompts.setdefault(answer.prompt, []).append(answer)
    tokens = sum(answer.new_tokens for answer in wave)
    own = sum(answer.new_tokens * (answer.new_tokens - 1) / 2 for answer in wave)
    shared = sum(each[0].prompt_tokens * max(a.new_tokens for a in each) for each in prompts.values())
    reads = costs.weight_bytes * max(answer.new_tokens for answer in wave) + costs.cache_bytes * (own + shared)
    decode = tokens * (costs.row_flops + costs.head_flops)
    prefill = sum(each[0].fresh_tokens for each in prompts.values()) * costs.row_flops
    return prefill / speeds.product_flops + max(reads / speeds.copy_bytes, decode / speeds.product_flops)
