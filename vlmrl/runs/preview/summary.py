"""The preview as JSON, for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlmrl.errors import safe_text
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.runs.preview.grading import Graded
from vlmrl.runs.preview.result import Preview
from vlmrl.runs.preview.sample import Counts, Sample

LISTED = 1000
"""Refused rows that the file lists."""


def write_json(path: Path, seen: Preview) -> None:
    """Write preview.json. Raises VlmrlError where the disk does not take it."""
    content = {
        "data": seen.data,
        "splits": {split: _split(sample) for split, sample in seen.samples.items()},
        "rewards": {name: _graded(grade) for sample in seen.samples.values() for name, grade in sample.graded.items()},
        "answers": [dataclasses.asdict(answer) for answer in seen.answers],
        "shared": shared(seen.samples["train"].counts, seen.samples["eval"].counts),
        "findings": [dataclasses.asdict(finding) for finding in seen.findings],
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, orjson.dumps(_safe(content), option=options))


def _split(sample: Sample) -> dict[str, Any]:
    counts = sample.counts
    return {
        "rows": sample.num_rows,
        "looked_at": sample.looked_at,
        "is_whole": sample.is_whole,
        "problems": len(counts.tokens),
        "in_other_split": sample.in_other_split,
        "refused": len(sample.refused),
        "refused_rows": [dataclasses.asdict(each) for each in sample.refused[:LISTED]],
        "prompt_tokens": spread(counts.tokens),
        "image_tokens": spread(counts.image_tokens),
        "image_widths": spread(counts.widths),
        "image_heights": spread(counts.heights),
        "different": {
            "texts": len(counts.by_text),
            "pixels": len(counts.by_pixels),
            "texts_and_pixels": len(counts.by_both),
        },
    }


def shared(train: Counts, held_out: Counts) -> dict[str, int]:
    """Problems of the evaluation whose texts, pixels, or both are in the training split as well."""
    pairs = {
        "texts": (train.by_text, held_out.by_text),
        "pixels": (train.by_pixels, held_out.by_pixels),
        "texts_and_pixels": (train.by_both, held_out.by_both),
    }
    return {name: sum(count for key, count in mine.items() if key in theirs) for name, (theirs, mine) in pairs.items()}


def spread(numbers: Sequence[int]) -> dict[str, float]:
    """The least, the median, the 99th percentile and the greatest; empty without numbers.

    >>> spread([1, 2, 30])
    {'least': 1, 'median': 2.0, 'p99': 29.44, 'greatest': 30}
    """
    if not numbers:
        return {}
    median, p99 = np.percentile(numbers, [50, 99]).tolist()
    return {"least": min(numbers), "median": round(median, 2), "p99": round(p99, 2), "greatest": max(numbers)}


def _graded(grade: Graded) -> dict[str, Any]:
    return {
        name: {"reference": grade.best(name), "as_written": grade.bare(name), "empty": grade.empty[name]}
        for name in grade.empty
    }


def _safe(value: Any) -> Any:
    """A copy with texts that can be encoded; keys as well."""
    match value:
        case dict():
            return {safe_text(name): _safe(each) for name, each in value.items()}
        case list() | tuple():
            return [_safe(each) for each in value]
        case str():
            return safe_text(value)
    return value
