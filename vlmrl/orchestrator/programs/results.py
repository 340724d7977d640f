"""What a program says of its episode: a number, or a JSON object with a reward.

0.5
{"reward": 0.5, "metrics": {"steps": 3}}
{"error": "the page did not load"}          the rollout is a fault of the task
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from vlmrl.errors import safe_repr, safe_text
from vlmrl.tasks.base import Reply
from vlmrl.tasks.border import BadRewardError, TaskCodeError, checked_reply

LONGEST_QUOTE = 200
"""Characters of a bad result that the message quotes."""


@dataclass(frozen=True)
class Result:
    """The reward and the metrics of an episode."""

    reward: float
    metrics: dict[str, float]
    rewards: dict[str, float] = field(default_factory=dict)
    """The parts of the reward by name; empty where the program tells none."""
    lanes: frozenset[str] | None = None
    """The lanes of requests (`ChatRequest.lane`) that are trained on; None for all."""


UNPAID = Result(0.0, {})
"""Where reward terms score the answer, or a budget ended the episode before it had a result."""


def result_in(text: str, where: str) -> Result:
    """The result that a text holds. Raises `BadRewardError` for a text that is none, and `TaskCodeError` where the
    program reports an error.

    >>> result_in('{"reward": 1, "metrics": {"steps": 3}}', "its last line")
    Result(reward=1.0, metrics={'steps': 3.0}, rewards={}, lanes=None)
    >>> result_in("done", "its end")
    Traceback (most recent call last):
    vlmrl.tasks.border.BadRewardError: its end is 'done', which is neither a number nor a JSON object with a reward
    """
    if not text.strip():
        raise BadRewardError(f"{where} is empty: print a number, or a JSON object with a reward, at the end")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = _number(text)
    if isinstance(value, dict) and value.get("error") is not None:
        raise TaskCodeError(f"{where} reports an error: {safe_text(value['error'])[:10_000]}")
    if isinstance(value, dict) and "reward" in value:
        return _checked(where, value["reward"], value.get("metrics") or {})
    if isinstance(value, int | float):
        return _checked(where, value, {})
    quote = safe_repr(text.strip()[:LONGEST_QUOTE])
    raise BadRewardError(f"{where} is {quote}, which is neither a number nor a JSON object with a reward")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def _number(text: str) -> float | None:
    """A number that Python writes and JSON does not: `nan`, `inf`, `1e400`."""
    try:
        return float(text)
    except ValueError:
        return None


def _checked(where: str, reward: Any, metrics: Any) -> Result:
    reply = checked_reply(where, Reply(done=True, reward=reward, metrics=metrics))
    return Result(reply.reward, reply.metrics)
