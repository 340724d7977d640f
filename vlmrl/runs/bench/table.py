"""What mode=bench shows: rows of its tables, and the content of bench.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmrl.preflight.estimate.plan import size, span
from vlmrl.runs.bench.activity import SAMPLING
from vlmrl.runs.bench.finding import STANDS_OUT, Advice
from vlmrl.runs.bench.measured import Measured


def part_rows(found: Measured) -> dict[str, str]:
    """What a step takes, and each part with its share."""
    seconds, parts = found.step_seconds, found.parts()
    rows = {
        "step": f"{_time(found.median_step)} (median of {len(seconds)}, {_time(min(seconds))} to "
        f"{_time(max(seconds))}); shares are of the mean, {_time(found.times.step)}"
    }
    if found.is_asynchronous:
        rows["step"] += "; rollouts go on while the trainer works, so the parts add up to more"
    return rows | {name: f"{found.share(part):6.1%}  {_time(part)}" for name, part in parts.items()}


def limit_rows(found: Measured) -> dict[str, str]:
    """Sampling, training, the whole step and memory, each beside its limit or its plan."""
    speeds, tokens, memory = found.speeds, found.tokens, found.memory
    return {
        "device": f"{speeds.device}: product {_rate(speeds.product_flops, 'FLOP/s')}, copy "
        f"{_rate(speeds.copy_bytes, 'B/s')}, both measured now",
        "rollouts": _rollouts(found),
        "sampling": _sampling(found),
        "training": f"{_rate(found.train_share * speeds.product_flops, 'FLOP/s')} a rank, {found.train_share:.1%} of "
        f"the product; {tokens.trained / max(found.times.training, 1e-9):,.0f} trained tokens/s",
        "packing": f"{tokens.rows:,.0f} rows for {tokens.sampled:,.0f} sampled tokens "
        f"({tokens.rows / max(1.0, tokens.sampled):.2f} rows each), {1 - tokens.rows / max(1.0, tokens.unpacked):.0%} "
        f"fewer than one by one; {round(tokens.micro_batches, 1):g} micro-batches, the largest of {tokens.largest:,} "
        "rows",
        "whole step": f"{found.share(found.least_step):.2f}: {_bound(found)} as measured would take "
        f"{_time(found.least_step)}",
        "memory": _memory(found),
        "keys and values": f"{size(memory.cache)} for the distinct tokens of a step, in the model's dtype",
    }


def _rollouts(found: Measured) -> str:
    tokens = found.tokens
    text = f"{tokens.rollouts:.0f} a step, {tokens.turns:.1f} turns each, {tokens.sampled:,.0f} sampled tokens"
    if found.has_random_weights:
        return f"{text}; the weights are random, so {tokens.cut:.0%} of the answers ran to their token budget"
    return f"{text}; {tokens.cut:.0%} of the answers ran to their token budget"


def _sampling(found: Measured) -> str:
    text = f"{found.sampling_speed:,.0f} tokens/s while the engine has a request"
    if found.least_sampling is None:
        return f"{text}; no limit, because servers on a CPU use other threads than those that were measured"
    limit = found.tokens.sampled / max(found.least_sampling, 1e-12)
    return f"{text}, {found.sampling_speed / limit:.1%} of the {limit:,.0f} that reading weights and cache allows"


def _bound(found: Measured) -> str:
    if not found.is_asynchronous:
        return "rollouts and training, one after the other,"
    longer = "rollouts" if found.rollouts >= found.times.training else "training"
    return f"the longer of rollouts and training, {longer},"


def _memory(found: Measured) -> str:
    memory = found.memory
    where = "of the GPU" if memory.is_gpu else "of the process, with Python and its libraries,"
    text = f"peak {size(memory.peak)} {where} of {size(memory.total)}"
    if memory.is_gpu:
        text += f", and {size(memory.process)} of the host"
    planned = memory.planned
    if planned is None or planned.peak is None or planned.full_peak is None:
        return f"{text}; the plan knows no sizes of this model"
    text += f"; the plan says {span(planned.peak, planned.full_peak)}"
    more = memory.peak - min(max(memory.peak, planned.peak), planned.full_peak)
    return text + (f", {size(abs(more))} {'less' if more > 0 else 'more'}" if more else "")


def verdict_rows(found: Measured, advice: Sequence[Advice]) -> dict[str, str]:
    """What bounds the step, and what to set; the last lines of a bench."""
    name, seconds = largest(found)
    rows = {"bounded by": f"{name}: {found.share(seconds):.0%} of a step{_beside_its_limit(found, name)}"}
    for number, each in enumerate(advice, 1):
        settings = " ".join(each.settings) or "(no key)"
        rows[f"{number}."] = f"{settings}: {each.finding}"
    if not advice:
        rows["set"] = f"nothing: no part above {STANDS_OUT:.0%} of a step has a setting that would make it faster"
    return rows


def _beside_its_limit(found: Measured, part: str) -> str:
    if part == "training":
        return f", at {found.train_share:.1%} of what products reach on this device"
    if part == "sampling" and found.least_sampling is not None:
        limit = found.least_sampling / max(found.times.kinds[SAMPLING], 1e-9)
        return f", at {limit:.1%} of what reading weights and cache allows"
    return ""


def largest(found: Measured) -> tuple[str, float]:
    """The part that bounds a step, and its seconds. In an asynchronous run that is the largest part of the side that
    does not wait."""
    parts = found.parts()
    waits = {name: parts.pop(name) for name in ("the trainer waits", "the engine waits") if name in parts}
    trainer = ("preparing the batch", "training", "weight sync", "recording")
    if waits:
        rollouts_bound = waits["the trainer waits"] >= waits["the engine waits"]
        parts = {name: part for name, part in parts.items() if (name in trainer) is not rollouts_bound}
    return max(parts.items(), key=lambda part: part[1])


def as_json(found: Measured, advice: Sequence[Advice]) -> dict[str, Any]:
    """The content of bench.json. Seconds are per step, on average; shares are of a step."""
    config, tokens, memory, planned = found.config, found.tokens, found.memory, found.memory.planned
    name, seconds = largest(found)
    return {
        "run": {
            "model": config.model.name,
            "dtype": config.model.dtype.value,
            "random_weights": found.has_random_weights,
            "task": config.task.target,
            "inference": config.inference.kind,
            "weight_sync": config.weight_sync.kind,
            "max_staleness": config.orchestrator.max_staleness,
            "ranks": found.ranks,
        },
        "device": {
            "name": found.speeds.device,
            "product_flops": found.speeds.product_flops,
            "copy_bytes_per_s": found.speeds.copy_bytes,
        },
        "step_s": {"median": found.median_step, "mean": found.times.step, "each": list(found.step_seconds)},
        "parts_s": found.parts(),
        "shares": {part: found.share(value) for part, value in found.parts().items()},
        "tokens": {
            "rollouts": tokens.rollouts,
            "turns": tokens.turns,
            "cut": tokens.cut,
            "sampled": tokens.sampled,
            "trained": tokens.trained,
            "rows": tokens.rows,
            "unpacked": tokens.unpacked,
            "tree_rows": tokens.tree_rows,
            "distinct": tokens.distinct,
            "micro_batches": tokens.micro_batches,
            "largest_micro_batch": tokens.largest,
        },
        "sampling": {"tokens_per_s": found.sampling_speed, "least_s": found.least_sampling},
        "training": {"flops": found.train_flops, "share_of_product": found.train_share},
        "whole_step": {"least_s": found.least_step, "share": found.share(found.least_step)},
        "memory": {
            "peak_bytes": memory.peak,
            "total_bytes": memory.total,
            "process_bytes": memory.process,
            "planned_bytes": None if planned is None else planned.peak,
            "planned_full_bytes": None if planned is None else planned.full_peak,
            "cache_bytes": memory.cache,
            "is_gpu": memory.is_gpu,
        },
        "bounded_by": {"part": name, "share": found.share(seconds)},
        "advice": [
            {"settings": list(each.settings), "finding": each.finding, "share": found.share(each.seconds)}
            for each in advice
        ],
    }


def _time(seconds: float) -> str:
    """
    >>> _time(0.0123), _time(1.5), _time(75.0)
    ('12.3 ms', '1.50 s', '75.0 s')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _rate(count: float, unit: str) -> str:
    """
    >>> _rate(7.77e14, "FLOP/s"), _rate(4.1e12, "B/s"), _rate(12.0, "B/s")
    ('777 TFLOP/s', '4.1 TB/s', '12 B/s')
    """
    for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            value = count / factor
            return f"{value:.{0 if value >= 100 else 1}f} {name}{unit}"
    return f"{count:.0f} {unit}"
