"""The limits of mode=bench: the least time of sampling against a count token by token, and the two measured speeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmrl.runs.bench.limits import Answer, SamplingCosts, Speeds, _with_memory, measure_speeds, sampling_seconds

COSTS = SamplingCosts(weight_bytes=900.0, cache_bytes=7.0, row_flops=40.0, head_flops=11.0)


def token_by_token(answers: list[Answer], speeds: Speeds) -> float:
    """What each decode step reads and computes, one after the other."""
    seconds = 0.0
    for wave in sorted({answer.wave for answer in answers}):
        own = [answer for answer in answers if answer.wave == wave]
        fresh = {answer.prompt: answer.fresh_tokens for answer in own}
        seconds += sum(fresh.values()) * COSTS.row_flops / speeds.product_flops
        reads = flops = 0.0
        for place in range(max(answer.new_tokens for answer in own)):
            going = [answer for answer in own if answer.new_tokens > place]
            reads += COSTS.weight_bytes
            reads += COSTS.cache_bytes * sum({answer.prompt: answer.prompt_tokens for answer in going}.values())
            reads += COSTS.cache_bytes * place * len(going)
            flops += len(going) * (COSTS.row_flops + COSTS.head_flops)
        seconds += max(reads / speeds.copy_bytes, flops / speeds.product_flops)
    return seconds


@pytest.mark.parametrize("speeds", [Speeds("", 1e3, 1e3), Speeds("", 1e6, 1e3), Speeds("", 1e2, 1e6)])
def test_the_least_time_of_sampling(speeds: Speeds) -> None:
    random = np.random.default_rng(0)
    answers = []
    for step, turn, group in np.ndindex(2, 2, 3):
        prompt = int(random.integers(1, 800))
        for _ in range(5):
            new = int(random.integers(1, 60))
            answers.append(Answer((str(step), turn), 10 * step + group, prompt, prompt // 2, new))
    expected = token_by_token(answers, speeds)
    assert sampling_seconds(answers, COSTS, speeds) == pytest.approx(expected, rel=1e-12)
    assert sampling_seconds(answers, COSTS, speeds, devices=4) == pytest.approx(expected / 4, rel=1e-12)


def test_siblings_read_their_prompt_once() -> None:
    speeds = Speeds("", 1e9, 1.0)
    alone = [Answer(("0", 0), number, 1000, 1000, 10) for number in range(8)]
    siblings = [Answer(("0", 0), 0, 1000, 1000, 10) for _ in range(8)]
    more = sampling_seconds(alone, COSTS, speeds) - sampling_seconds(siblings, COSTS, speeds)
    assert more == pytest.approx(7 * 1000 * 10 * COSTS.cache_bytes, rel=1e-3)


def test_speeds_are_those_of_this_machine() -> None:
    """A product of 2 × 512³ operations takes between a microsecond and ten seconds, and so does a copy."""
    found = measure_speeds(torch.device("cpu"), torch.float32)
    assert 2.0 * 512**3 / 10 < found.product_flops < 2.0 * 512**3 / 1e-6
    assert 2.0 * (1 << 26) / 10 < found.copy_bytes < 2.0 * (1 << 26) / 1e-6
    assert "torch threads" in found.device


def test_a_smaller_product_where_there_is_no_memory_for_a_large_one() -> None:
    def speed(side: int) -> float:
        if side > 2:
            raise torch.OutOfMemoryError("no memory")
        return float(side)

    assert _with_memory(speed, (4, 3, 2, 1)) == 2.0
    with pytest.raises(torch.OutOfMemoryError):
        _with_memory(speed, (4, 3))
