"""How a client sampled a turn, as JSON in the column `turns.sampling`."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from vlmrl.record.files import is_number
from vlmrl.types import TurnSampling


def sampling_text(sampling: TurnSampling | None) -> str | None:
    """The JSON of a turn's sampling.

    >>> sampling_text(TurnSampling(0.7, top_k=5))
    '{"temperature":0.7,"top_p":1.0,"top_k":5,"seed":null}'
    """
    return None if sampling is None else orjson.dumps(dataclasses.asdict(sampling)).decode()


def is_sampling(value: Any) -> bool:
    """Whether `value`, read from JSON, is how a turn was sampled: None, or the fields of `TurnSampling`."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {field.name for field in dataclasses.fields(TurnSampling)}:
        return False
    temperature, top_p, top_k, seed = (value[name] for name in ("temperature", "top_p", "top_k", "seed"))
    return (
        (temperature is None or (is_number(temperature) and temperature >= 0))
        and is_number(top_p)
        and 0 < top_p <= 1
        and type(top_k) is int
        and 0 <= top_k < 2**31
        and (seed is None or (type(seed) is int and 0 <= seed < 2**63))
    )
