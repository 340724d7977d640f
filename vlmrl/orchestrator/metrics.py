"""Metrics that the orchestrator adds to a step, under their keys in metrics.jsonl.

Times of a step, with rollouts and training at the same time where `max_staleness` allows it:

    time/step            = time/rollout + (what is scored before it) + time/train + time/sync
    time/rollout         how long the trainer waited for this step's rollouts; all of their time in an on-policy run
    time/rollout_span    from when this step's rollouts may start to the end of the last one
    time/engine_idle     how long no training rollout was running, because the engine waited for the trainer

If rollouts are the bottleneck, time/engine_idle is near 0. If training is, time/rollout is near 0.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from vlmrl.config.algorithm import FilterConfig, FilterMode
from vlmrl.orchestrator.filters import filters_in
from vlmrl.types import DropReason, Group, Rollout


def rollout_metrics(groups: Sequence[Group], filters: FilterConfig) -> dict[str, float]:
    """Rewards, stop and drop reasons, bridge breaks, tokens, images and the task's own metrics of one batch.

    `rollouts/filtered/<filter>` counts the rollouts that a filter matched; the key is present for each enabled filter,
    0.0 where it matched none.

    Rollouts that failed, or that no reward term scored, count in `rollouts/total` and by reason, but not in the reward
    and task metrics: a broken image is not a wrong answer.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sound = [rollout for rollout in rollouts if has_reward(rollout)]
    rewards = np.array([rollout.reward for rollout in sound])
    equal = [group for group in groups if len({rollout.reward for rollout in group.rollouts}) <= 1]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    dropped = Counter(rollout.dropped for rollout in rollouts if rollout.dropped is not None)
    metrics = {
        "reward/mean": float(rewards.mean()) if len(rewards) else 0.0,
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "groups/equal_reward": len(equal) / len(groups) if groups else 0.0,
        "rollouts/total": float(len(rollouts)),
        "rollouts/dropped": float(sum(dropped.values())),
        "bridge_break_rate": bridge_break_rate(rollouts),
        "turns/bridged": float(bridged_turns(rollouts)),
        "tokens/prompt": float(sum(len(turn.prompt.token_ids) for turn in turns)),
        "tokens/completion": float(sum(len(turn.completion.token_ids) for turn in turns)),
        "images/distinct": float(len({image.hash for turn in turns for image in turn.prompt.images})),
    }
    if videos := {video.hash: video for turn in turns for video in turn.prompt.videos}:
        metrics["videos/distinct"] = float(len(videos))
        metrics["videos/frames"] = float(sum(len(video.frames) for video in videos.values()))
    metrics |= {f"rollouts/dropped/{reason}": float(count) for reason, count in sorted(dropped.items())}
    stops = Counter(rollout.stop_reason for rollout in rollouts)
    metrics |= {f"rollouts/stop/{reason}": float(count) for reason, count in sorted(stops.items())}
    filtered = Counter(reason for rollout in rollouts for reason in rollout.filtered)
    enabled = filters_in(filters, FilterMode.track, FilterMode.drop)
    metrics |= {f"rollouts/filtered/{reason}": float(filtered[reason]) for reason in enabled}
    of_tasks = by_task(rollouts, means_of)
    return (
        metrics
        | history_metrics(rollouts)
        | client_metrics(rollouts)
        | support_metrics(rollouts)
        | env_metrics(rollouts)
        | tool_metrics(rollouts)
        | chat_metrics(rollouts)
        | replay_metrics(rollouts)
        | mean_rewards(sound)
        | mean_task_metrics(sound)
        | of_tasks
    )


def by_task(
    rollouts: Sequence[Rollout], metrics_of: Callable[[Sequence[Rollout]], dict[str, float]]
) -> dict[str, float]:
    """`by_task/<name>/<key>`: the metrics of the rollouts of each task of a mixture, and `rollouts/total`, their
    number. Empty in a run of one task."""
    found: dict[str, float] = {}
    for name in sorted({rollout.task for rollout in rollouts} - {""}):
        own = [rollout for rollout in rollouts if rollout.task == name]
        metrics = metrics_of(own) | {"rollouts/total": float(len(own))}
        found |= {f"by_task/{name}/{key}": value for key, value in metrics.items()}
    return found


def means_of(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Reward, values of the reward terms and the task's own metrics, over the rollouts that have a reward."""
    sound = [rollout for rollout in rollouts if has_reward(rollout)]
    mean = float(np.mean([rollout.reward for rollout in sound])) if sound else 0.0
    return {"reward/mean": mean} | mean_rewards(sound) | mean_task_metrics(sound)


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Mean reward. A fault counts as 0.0, because the problem was not solved; a rollout that no reward term scored does
    not count. 0.0 where none counts."""
    rewards = [rollout.reward for rollout in rollouts if rollout.dropped is not DropReason.NO_REWARD]
    return float(np.mean(rewards)) if rewards else 0.0


def task_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The metrics of one task of a mixture in an evaluation."""
    return {"reward": mean_reward(rollouts)} | mean_rewards(rollouts) | mean_task_metrics(rollouts)


def has_reward(rollout: Rollout) -> bool:
    """Whether a rollout's reward says how good it was: it is no fault, and the task or a reward term scored it."""
    return not rollout.stop_reason.is_fault and rollout.dropped is not DropReason.NO_REWARD


def replay_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`rollouts/replayed`: how often a rollout was played again because a server of the run or a worker process of
    envs was lost. Empty where none was."""
    replayed = sum(rollout.replayed for rollout in rollouts)
    return {"rollouts/replayed": float(replayed)} if replayed else {}


def client_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`tokens/client_sampled` and `tokens/unlearnable`: tokens that a client sampled in its own way, and those of them
    that cannot be learned from (`Turn.is_learnable`). Empty where there are none."""
    turns = [turn for rollout in rollouts for turn in rollout.turns if turn.sampling and turn.sampling.reshapes]
    if not turns:
        return {}
    lengths = [(len(turn.completion.token_ids), turn.is_learnable) for turn in turns]
    return {
        "tokens/client_sampled": float(sum(length for length, _ in lengths)),
        "tokens/unlearnable": float(sum(length for length, is_learnable in lengths if not is_learnable)),
    }


def support_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`support/mean`: from how many tokens a token was sampled, on average over those that were sampled from a
    truncated distribution. Empty where none was."""
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    sizes = [turn.completion.supports.sizes for turn in turns if turn.completion.supports is not None]
    return {"support/mean": float(np.concatenate(sizes).mean())} if sizes else {}


def env_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`env/…_ms`: mean milliseconds of a reset, of a step, and of waiting for a free thread or worker, over all calls.
    Empty where no env was called."""
    times = [rollout.env_time for rollout in rollouts]
    resets, steps = sum(time.resets for time in times), sum(time.steps for time in times)
    totals = {
        "env/reset_ms": (sum(time.reset_s for time in times), resets),
        "env/step_ms": (sum(time.step_s for time in times), steps),
        "env/queue_ms": (sum(time.queue_s for time in times), resets + steps),
    }
    return {key: 1000 * seconds / calls for key, (seconds, calls) in totals.items() if calls}


def bridge_break_rate(rollouts: Sequence[Rollout]) -> float:
    """Share of later turns (all but the first of each rollout) whose prompt could not extend the turn before it. Turns
    that start over, because the env replaced the conversation, are none of them.

    0.0 where there are no later turns.
    """
    forks = sum(max(0, rollout.num_branches - 1) for rollout in rollouts)
    return (forks - _num_starting_over(rollouts)) / max(1, _num_later_turns(rollouts))


def bridged_turns(rollouts: Sequence[Rollout]) -> int:
    """Number of later turns whose prompt extends the turn before it, token for token."""
    return sum(later.branch == turn.branch for rollout in rollouts for turn, later in pairwise(rollout.turns))


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`tools/…`: tool calls per rollout, and shares of the calls. Empty in a run without tools."""
    uses = [rollout.tool_use for rollout in rollouts if rollout.tool_use is not None]
    if not uses:
        return {}
    calls = sum(use.calls for use in uses)
    shares = {"broken": sum(use.broken for use in uses), "errors": sum(use.errors for use in uses)}
    names = sorted({name for use in uses for name in use.by_name})
    return {
        "tools/calls": calls / len(uses),
        "tools/rollouts": sum(use.calls > 0 for use in uses) / len(uses),
        **{f"tools/{name}": count / max(1, calls) for name, count in shares.items()},
        "tools/timeouts": float(sum(use.timeouts for use in uses)),
        "tools/seconds": sum(use.seconds for use in uses) / max(1, calls),
        **{f"tools/calls/{name}": sum(use.by_name.get(name, 0) for use in uses) / len(uses) for name in names},
    }


def chat_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`endpoint/…`: the requests of foreign programs. Empty where no program played."""
    uses = [rollout.chat_use for rollout in rollouts if rollout.chat_use is not None]
    names = ("requests", "repeated", "refused", "bridged", "breaks")
    return {f"endpoint/{name}": float(sum(getattr(use, name) for use in uses)) for name in names} if uses else {}


def history_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`history_cut_rate`: the share of later turns that start over, because the env replaced the conversation
    (`Reply.history`). Empty where none does."""
    count = _num_starting_over(rollouts)
    return {"history_cut_rate": count / _num_later_turns(rollouts)} if count else {}


def _num_later_turns(rollouts: Sequence[Rollout]) -> int:
    return sum(max(0, len(rollout.turns) - 1) for rollout in rollouts)


def _num_starting_over(rollouts: Sequence[Rollout]) -> int:
    return sum(turn.starts_over for rollout in rollouts for turn in rollout.turns)


def mean_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`reward/<term>`: the mean value of each reward term, before its weight, over the rollouts in which it does not
    abstain."""
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.rewards.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {f"reward/{name}": float(np.mean(values[name])) for name in sorted(values)}


def mean_task_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`task/<key>`: the mean over the rollouts that report the key."""
    keys = sorted({key for rollout in rollouts for key in rollout.metrics})
    return {
        f"task/{key}": float(np.mean([rollout.metrics[key] for rollout in rollouts if key in rollout.metrics]))
        for key in keys
    }


def throughput_metrics(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """`throughput/tokens_per_s`: tokens of the batch's rollouts (prompts and completions, each token once) divided by
    the seconds of the whole step."""
    last = [rollout.turns[-1] for group in groups for rollout in group.rollouts if rollout.turns]
    tokens = sum(len(turn.prompt.token_ids) + len(turn.completion.token_ids) for turn in last)
    return {"throughput/tokens_per_s": tokens / seconds}


def time_metrics(started: float, rolled_out: float, prepared: float, trained: float, synced: float) -> dict[str, float]:
    """Seconds of a step and of its phases, from clock readings at the end of each phase.

    Between `rolled_out` and `prepared` the samples are made and scored, where a run does so: by a reference
    (`time/reference`), with other images (`time/vision_advantage`), and by the blind control (`time/vision_gap`).

    >>> time_metrics(0.0, 1.0, 1.5, 3.5, 4.0)
    {'time/step': 4.0, 'time/rollout': 1.0, 'time/train': 2.0, 'time/sync': 0.5}
    """
    return {
        "time/step": synced - started,
        "time/rollout": rolled_out - started,
        "time/train": trained - prepared,
        "time/sync": synced - trained,
    }


class Overlap:
    """Measures how long the rollouts of each step run and how long no rollout runs at all."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spans: dict[int, float] = {}
        self._running_steps = 0
        self._idle_since = clock()
        self._idle = 0.0

    @contextmanager
    def rolling_out(self, step: int) -> Iterator[None]:
        """Enter this while the rollouts of `step` run. Several steps may run at once."""
        started = self._clock()
        if not self._running_steps:
            self._idle += started - self._idle_since
        self._running_steps += 1
        try:
            yield
        finally:
            ended = self._clock()
            self._spans[step] = ended - started
            self._running_steps -= 1
            if not self._running_steps:
                self._idle_since = ended

    def reset_idle(self) -> None:
        """Set the idle time to 0, so that an evaluation or the start of the run does not count."""
        self._idle, self._idle_since = 0.0, self._clock()

    def metrics(self, step: int) -> dict[str, float]:
        """Seconds that the rollouts of `step` took (they must have ended), and seconds without any rollout since the
        last call or `reset_idle`.

        >>> now = iter([0.0, 1.0, 5.0, 7.0]).__next__
        >>> overlap = Overlap(now)
        >>> with overlap.rolling_out(1):  # from second 1 to 5
        ...     pass
        >>> overlap.metrics(1)  # at second 7
        {'time/rollout_span': 4.0, 'time/engine_idle': 3.0}
        """
        now = self._clock()
        idle = self._idle + (now - self._idle_since if not self._running_steps else 0.0)
        self._idle, self._idle_since = 0.0, now
        return {"time/rollout_span": self._spans.pop(step), "time/engine_idle": idle}
