"""What a batch of rollouts says about itself, under the keys of the run directory's contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmrl.config.algorithm import FilterConfig, FilterMode
from vlmrl.orchestrator.filters import filters_in
from vlmrl.orchestrator.rollout import bridge_break_rate
from vlmrl.types import Group, Rollout


def rollout_metrics(groups: Sequence[Group], filters: FilterConfig) -> dict[str, float]:
    """Rewards, stop and drop reasons, bridge breaks, tokens, images and the task's own figures.

    `rollouts/filtered/<filter>` counts what a filter found, 0.0 where it found nothing; it is there for filters that
    are on.

    Faulty rollouts count in `rollouts/total` and by reason, and are left out of the reward and task figures: a broken
    image is not a wrong answer.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sound = [rollout for rollout in rollouts if not rollout.stop_reason.is_fault]
    rewards = np.array([rollout.reward for rollout in sound])
    flat = [group for group in groups if len({rollout.reward for rollout in group.rollouts}) <= 1]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    dropped = Counter(rollout.dropped for rollout in rollouts if rollout.dropped is not None)
    metrics = {
        "reward/mean": float(rewards.mean()) if len(rewards) else 0.0,
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "groups/equal_reward": len(flat) / len(groups) if groups else 0.0,
        "rollouts/total": float(len(rollouts)),
        "rollouts/dropped": float(sum(dropped.values())),
        "bridge_break_rate": bridge_break_rate(rollouts),
        "tokens/prompt": float(sum(len(turn.prompt.token_ids) for turn in turns)),
        "tokens/completion": float(sum(len(turn.completion.token_ids) for turn in turns)),
        "images/distinct": float(len({image.hash for turn in turns for image in turn.prompt.images})),
    }
    metrics |= {f"rollouts/dropped/{reason}": float(count) for reason, count in sorted(dropped.items())}
    stops = Counter(rollout.stop_reason for rollout in rollouts)
    metrics |= {f"rollouts/stop/{reason}": float(count) for reason, count in sorted(stops.items())}
    filtered = Counter(reason for rollout in rollouts for reason in rollout.filtered)
    on = filters_in(filters, FilterMode.track, FilterMode.drop)
    metrics |= {f"rollouts/filtered/{reason}": float(filtered[reason]) for reason in on}
    return metrics | mean_task_metrics(sound)


def throughput_metrics(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """`throughput/tokens_per_s`: tokens of the batch's rollouts, prompts and completions, over the whole step."""
    last = [rollout.turns[-1] for group in groups for rollout in group.rollouts if rollout.turns]
    tokens = sum(len(turn.prompt.token_ids) + len(turn.completion.token_ids) for turn in last)
    return {"throughput/tokens_per_s": tokens / seconds}


def time_metrics(started: float, rolled_out: float, prepared: float, trained: float, synced: float) -> dict[str, float]:
    """Seconds of a step and of its phases, from the clock at their ends. Between `rolled_out` and `prepared` samples
    are made, and the blind control is measured where it is due (`time/vision_gap`). overlap.py says what waits in it.

    >>> time_metrics(0.0, 1.0, 1.5, 3.5, 4.0)
    {'time/step': 4.0, 'time/rollout': 1.0, 'time/train': 2.0, 'time/sync': 0.5}
    """
    return {
        "time/step": synced - started,
        "time/rollout": rolled_out - started,
        "time/train": trained - prepared,
        "time/sync": synced - trained,
    }


def mean_task_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`task/<key>`: the mean over the rollouts that report the key."""
    keys = sorted({key for rollout in rollouts for key in rollout.metrics})
    return {
        f"task/{key}": float(np.mean([rollout.metrics[key] for rollout in rollouts if key in rollout.metrics]))
        for key in keys
    }
