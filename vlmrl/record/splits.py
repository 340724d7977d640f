"""Which rollouts a record belongs to: the `split` of a rollout and the name of its evaluation set.

train                                   a training rollout
eval_sampled, eval_greedy               the main held-out evaluation
eval_ood_sampled, eval_ood_greedy       the set `orchestrator.eval.sets.ood`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

RecordedSplit: TypeAlias = str
"""`train`, `eval_<kind>` or `eval_<set>_<kind>`."""

Decoding: TypeAlias = Literal["sampled", "greedy"]

RESERVED = frozenset({"main", "reward", "reward_greedy", "task", "rollouts", "inference", "wire", "by_task"})
"""Names that no set may have: `eval/<name>` means something else in metrics.jsonl."""

EVAL_SPLIT = re.compile(r"eval(?:_(?P<name>.+))?_(?P<decoding>sampled|greedy)")


def eval_split(name: str, decoding: Decoding) -> RecordedSplit:
    """The split of the rollouts of an evaluation set; "" is the main evaluation.

    >>> eval_split("", "greedy"), eval_split("ood", "sampled")
    ('eval_greedy', 'eval_ood_sampled')
    """
    return f"eval_{name}_{decoding}" if name else f"eval_{decoding}"


def set_of(split: RecordedSplit) -> str | None:
    """The name of the evaluation set of a split; "" for the main evaluation, None for training rollouts.

    >>> set_of("eval_greedy"), set_of("eval_far_away_sampled"), set_of("train")
    ('', 'far_away', None)
    """
    found = EVAL_SPLIT.fullmatch(split)
    return None if found is None else found["name"] or ""


def label_of(split: RecordedSplit) -> str:
    """A split of an evaluation in words.

    >>> label_of("eval_greedy"), label_of("eval_ood_sampled")
    ('greedy', 'ood sampled')
    """
    return split.removeprefix("eval_") if not set_of(split) else f"{set_of(split)} {split.rpartition('_')[2]}"


def set_rewards(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The mean reward of each set in the metrics of an evaluation: sampled, or greedy where a set is greedy only.

    >>> set_rewards({"eval/reward": 0.5, "eval/ood/reward": 0.25, "eval/ood/reward_greedy": 0.0, "eval/task/reward": 1})
    {'ood': 0.25}
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        match key.split("/"):
            case ["eval", name, "reward" | "reward_greedy"] if name not in RESERVED and value is not None:
                found.setdefault(name, value)
    return found


def is_greedy(split: RecordedSplit) -> bool:
    """Whether the rollouts of a split were decoded greedily.

    >>> is_greedy("eval_ood_greedy"), is_greedy("eval_greedy_sampled")
    (True, False)
    """
    found = EVAL_SPLIT.fullmatch(split)
    return found is not None and found["decoding"] == "greedy"
