"""Check that a record of rollouts/ is a rollout as a run writes it, before anything computes with it.

A run folder may have been edited or damaged, or come from a stranger. Readers index arrays of equal length
and open files named after hashes, so all of this is checked here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from vlmrl.record.files import is_number
from vlmrl.record.sampling_text import is_sampling
from vlmrl.record.tool_fields import FIELDS, is_fields, is_tools

MAX_INT64 = 2**63 - 1
"""Largest token id, offset and policy version that an array can store."""


def is_rollout(record: Any) -> bool:
    """Whether `record` has the keys and types of `vlmrl.record.rollouts.RolloutRecord`; more keys are allowed."""
    if not _has(record, ROLLOUT) or not all(_is_text_or_none(record.get(name)) for name in ("stdout", "stderr")):
        return False
    if not _are_videos(record.get("videos", {})):  # old records lack them
        return False
    previous: Mapping[str, Any] | None = None
    for turn in record["turns"]:
        if not _is_turn(turn, previous):
            return False
        previous = turn
    return True


def _is_turn(turn: Any, previous: Mapping[str, Any] | None) -> bool:
    if not _has(turn, TURN) or (previous is None and turn["prompt_offset"] != 0):
        return False
    count = len(turn["completion_ids"])
    if len(turn["logprobs"]) != count or len(turn["versions"]) != count:
        return False
    if not isinstance(turn.get("starts_over", False), bool) or not is_tools(turn.get("tools", [])):
        return False
    if not _is_text_or_none(turn.get("stop")) or not is_sampling(turn.get("sampling")):
        return False
    if not _are_supports(turn.get("support_sizes"), turn.get("support_ids"), count):
        return False
    for name in ("trainer_logprobs", "entropies"):  # old records lack them
        value = turn.get(name)
        if value is not None and not (_numbers(value) and len(value) == count):
            return False
    return all(_is_message(message) for message in turn["messages"])


def _are_supports(sizes: Any, ids: Any, count: int) -> bool:
    """Whether these are the supports of `count` tokens; both are None without any, and old records lack them."""
    if sizes is None or ids is None:
        return sizes is None and ids is None
    return (
        _counts(sizes)
        and _counts(ids)
        and len(sizes) == count
        and min(sizes, default=0) >= 0
        and sum(sizes) == len(ids)
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), list)
        and all(map(_is_part, message["content"]))
        and is_fields([{name: message[name] for name in FIELDS if name in message}], 1)
    )


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return part.get("type") in ("image", "video") and (part.get("hash") is None or _is_hash(part["hash"]))


def _are_videos(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_hash(hash) and _is_video(video) for hash, video in value.items())


def _is_video(video: Any) -> bool:
    return _has(video, VIDEO) and len(video["frames"]) == len(video["times"]) and all(map(isfinite, video["times"]))


def _is_hash(value: Any) -> bool:
    """A hash names a file in images/, so it must not lead out of that folder."""
    return isinstance(value, str) and value.isascii() and value.replace("_", "").replace("-", "").isalnum()


def _has(record: Any, checks: Mapping[str, Callable[[Any], bool]]) -> bool:
    return isinstance(record, dict) and all(name in record and check(record[name]) for name, check in checks.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT64


def _counts(value: Any) -> bool:
    return isinstance(value, list) and (not value or (set(map(type, value)) == {int} and _in_range(value)))


def _in_range(values: list[int]) -> bool:
    return min(values) >= -1 and max(values) <= MAX_INT64


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int, float, type(None)}


def _placeholders(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(
            isinstance(place, list)
            and len(place) in (3, 4)  # old records have no gaps
            and _counts(place[:2])
            and _is_hash(place[2])
            and all(_gaps(gaps, place[1]) for gaps in place[3:])
            for place in value
        )
    )


def _gaps(value: Any, length: int) -> bool:
    """Whether the gaps of a placeholder of `length` tokens are in it, in ascending order."""
    if not isinstance(value, list) or not all(isinstance(gap, list) and len(gap) == 2 for gap in value):
        return False
    ends = [0]
    for gap in value:
        if not _counts(gap) or gap[0] <= ends[-1] or gap[1] < 1:
            return False
        ends.append(gap[0] + gap[1])
    return len(ends) == 1 or ends[-1] < length


def _metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


ROLLOUT: Mapping[str, Callable[[Any], bool]] = {
    "rollout_id": _is_text,
    "problem_id": _is_text,
    "step": _is_count,
    "split": _is_text,
    "index": _is_count,
    "reward": is_number,
    "metrics": _metrics,
    "stop_reason": _is_text,
    "dropped": _is_text_or_none,
    "error": _is_text_or_none,
    "seconds": is_number,
    "turns": _is_list,
}
"""Key of a rollout → what its value must be."""


def _hashes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_hash, value))


def _digests(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(name) and _is_text(digest) for name, digest in value.items())


VIDEO: Mapping[str, Callable[[Any], bool]] = {
    "frames": _hashes,
    "times": lambda value: _numbers(value) and None not in value,
    "fps": lambda value: isinstance(value, float) and isfinite(value) and value > 0,
    "tensors": _digests,
}
"""Key of a video → what its value must be."""

TURN: Mapping[str, Callable[[Any], bool]] = {
    "branch": _is_count,
    "messages": _is_list,
    "prompt_offset": _is_count,
    "prompt_token_ids": _counts,
    "placeholders": _placeholders,
    "completion_ids": _counts,
    "logprobs": _numbers,
    "versions": _counts,
    "finish_reason": _is_text,
    "text": _is_text,
    "reward": is_number,
    "advantage": is_number,
}
"""Key of a turn → what its value must be."""
