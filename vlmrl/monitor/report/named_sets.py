"""What the page and the comparison of a sweep show of a run's evaluation sets, as plain JSON.

keys of metrics.jsonl ─▶ named_sets ─▶ scores of each set, and its results by the values of a column
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vlmrl.record.splits import RESERVED

SET_KEY = re.compile(
    r"eval/(?P<name>[^/]+)/"
    r"(?P<score>reward|reward_greedy|pass@[0-9]+|pass_greedy|maj@[0-9]+|problems|truncated|truncated_greedy|faults|unscored"
    r"|by/(?P<column>.+)/(?P<value>[^/]*))",
    re.DOTALL,
)
"""A key of a named set in metrics.jsonl. The value of a column has no slash (`eval_scores.shown_value`)."""


def named_sets(keys: Iterable[str]) -> list[dict[str, Any]]:
    """The evaluation sets among the keys of metrics.jsonl, in their order. Lists of pairs keep the order of values,
    which JavaScript's objects do not for numbers.

    >>> named_sets(["eval/reward", "eval/ood/reward", "eval/ood/by/size/10", "eval/ood/by/size/9", "eval/task/reward"])
    [{'name': 'ood', 'scores': {'reward': 'eval/ood/reward'}, 'by': \
[['size', [['10', 'eval/ood/by/size/10'], ['9', 'eval/ood/by/size/9']]]]}]
    """
    scores: dict[str, dict[str, str]] = {}
    columns: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for key in keys:
        found = SET_KEY.fullmatch(key)
        if found is None or found["name"] in RESERVED:
            continue
        of_set = scores.setdefault(found["name"], {})
        if found["column"] is None:
            of_set[found["score"]] = key
        else:
            columns.setdefault(found["name"], {}).setdefault(found["column"], []).append((found["value"], key))
    return [
        {
            "name": name,
            "scores": of_set,
            "by": [[column, [list(pair) for pair in pairs]] for column, pairs in columns.get(name, {}).items()],
        }
        for name, of_set in scores.items()
    ]
