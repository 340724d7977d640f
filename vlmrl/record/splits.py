"""Which rollouts a record belongs to: the `split` of a rollout and the name of its evaluation set.

train                                   a training rollout
eval_sampled, eval_greedy               the main held-out evaluation
eval_ood_sampled, eval_ood_greedy       the set `orchestrator.eval.sets.ood`
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

RecordedSplit: TypeAlias = str
"""`train`, `eval_<kind>` or `eval_<set>_<kind>`."""

Decoding: TypeAlias = Literal["sampled", "greedy"]

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


def is_greedy(split: RecordedSplit) -> bool:
    """Whether the rollouts of a split were decoded greedily.

    >>> is_greedy("eval_ood_greedy"), is_greedy("eval_greedy_sampled")
    (True, False)
    """
    found = EVAL_SPLIT.fullmatch(split)
    return found is not None and found["decoding"] == "greedy"
