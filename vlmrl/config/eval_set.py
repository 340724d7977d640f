"""`eval_set`: one named set of held-out problems, `+eval_set@orchestrator.eval.sets.<name>=default`.

    python -m vlmrl +eval_set@orchestrator.eval.sets.ood=default orchestrator.eval.sets.ood.samples=8

A set has the keys `eval/<name>/…` in metrics.jsonl. docs/evaluation.md explains them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.fields import SMALLEST, Resume, setting
from vlmrl.config.task import TaskConfig


class EvalSplit(Enum):
    """Which problems of a task a set asks."""

    eval = "eval"
    """The held-out problems."""
    train = "train"
    """The training problems: what the policy knows of what it learned from."""


@dataclass
class EvalSet:
    """Problems of one task, and how the policy answers them."""

    task: TaskConfig | None = None
    """A task of the set's own, e.g. `+task@orchestrator.eval.sets.ood.task=dataset`. All rows of such a data set are
    asked, unless its `eval_path`, `eval_split` or `eval_fraction` says otherwise. None: the run's task."""
    split: EvalSplit = setting(EvalSplit.eval, on_resume=Resume.noted)
    """Which problems of the task are asked."""
    problems: int = setting(128, on_resume=Resume.noted, low=1, high=10**6, outside="the set asks nothing")
    """Problems of the split, from its first; all of it where it has fewer."""
    samples: int = setting(1, on_resume=Resume.noted, low=0, high=2**16, outside="it is not a number of answers")
    """Sampled rollouts per problem: the k of avg@k, pass@k and maj@k. 0 with `greedy=true` plays greedy ones only."""
    greedy: bool = setting(True, on_resume=Resume.noted)
    """Play each problem once more with greedy decoding."""
    temperature: float | None = setting(
        None, on_resume=Resume.noted, low=1e-9, high=1e6, outside="sampling is greedy, which `greedy` does"
    )
    """Divisor of the logits of sampled rollouts. None: `orchestrator.temperature`."""
    top_p: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=1, outside="no token can be sampled")
    """Nucleus sampling (arXiv 1904.09751): sample from the fewest most probable tokens whose probability sums to at
    least this. 1 samples from all."""
    top_k: int = setting(0, on_resume=Resume.noted, low=0, high=2**31 - 1, outside="it is not a number of tokens")
    """Sample from so many most probable tokens; 0 samples from all."""
    max_new_tokens: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**24, outside="the policy cannot answer"
    )
    """The most tokens of a completion. None: `orchestrator.max_new_tokens`."""
    by: list[str] = setting([], on_resume=Resume.noted)
    """Columns of the data set; the reward also stands under each value of them, `eval/<set>/by/<column>/<value>`."""
    pass_at: float = setting(
        1.0, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is not a reward that a policy can reach"
    )
    """The reward from which a rollout has passed, for pass@k and for pass rates."""
    every: int | None = setting(None, on_resume=Resume.noted, low=1, high=10**9, outside="it is not a number of steps")
    """Optimizer steps between evaluations of this set. None: `orchestrator.eval.every`."""

    @property
    def own_task(self) -> TaskConfig | None:
        """The task of the set's own as it is played: a data set without a held-out part of its own is held out as a
        whole, because nothing of it is trained on."""
        task = self.task
        if not isinstance(task, DatasetConfig) or (task.eval_path, task.eval_split, task.eval_fraction) != (None,) * 3:
            return task
        return dataclasses.replace(task, eval_path=task.path, eval_split=task.split)


def ks(samples: int) -> list[int]:
    """The k of pass@k: powers of two, and the number of samples.

    >>> ks(1), ks(8), ks(6)
    ([1], [1, 2, 4, 8], [1, 2, 4, 6])
    """
    return sorted({1 << power for power in range(samples.bit_length()) if 1 << power <= samples} | {samples})
