"""Reward functions as users write them, or bring them from TRL, verl and EasyR1. Each pays an answer that is right."""

from __future__ import annotations

import asyncio
import re
from typing import Any


def ours(attempt: Any, least_width: int = 40) -> float | None:
    """It sees the picture, as it is and as the model saw it."""
    (image,) = attempt.images
    assert (image.width, image.height) == (least_width, 20)
    assert image.processed_width % 8 == image.processed_height % 8 == 0
    assert [message.role for message in attempt.prompt] == ["user"]
    return None if attempt.completion == "" else float(attempt.completion.strip() == attempt.reference)


async def later(attempt: Any) -> float:
    await asyncio.sleep(0.001)
    return float(attempt.completion.strip() == attempt.reference)


def of_trl(prompts: Any, completions: list[Any], answer: list[str], level: list[int], **kwargs: Any) -> list[float]:
    """The columns `answer` and `level` are lists."""
    assert all(prompt[-1]["content"][0] == {"type": "image"} for prompt in prompts)
    assert len(level) == len(completions) == len(kwargs["completion_ids"])
    contents = [completion[0]["content"] for completion in completions]
    return [float(content.strip() == truth) for content, truth in zip(contents, answer, strict=True)]


def of_verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    assert data_source == "rows.jsonl"
    return {"score": float(solution_str.strip() == ground_truth), "length": len(solution_str), "pred": solution_str}


def of_easyr1(reward_inputs: list[dict[str, Any]], format_weight: float = 0.0) -> list[dict[str, float]]:
    rights = [float(each["response"].strip() == each["ground_truth"]) for each in reward_inputs]
    return [{"overall": right * (1 - format_weight), "accuracy": right} for right in rights]


class Counting:
    """It keeps what it has seen."""

    def __init__(self, most: int = 10**6) -> None:
        self.most = most
        self.seen = 0

    def __call__(self, attempt: Any) -> float:
        self.seen += 1
        assert self.seen <= self.most
        return float(attempt.completion.strip() == attempt.reference)


def sometimes_raises(attempt: Any) -> float:
    if attempt.completion.strip() == "1":
        raise LookupError(f"no score for {attempt.problem_id}")
    return float(attempt.completion.strip() == attempt.reference)


def abstains(attempt: Any) -> float | None:
    return None if re.search("[0-4]", attempt.completion) else 0.5
