"""The metrics of a batch of rollouts, compared with values counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from support.video_rollouts import frames_of, video, video_rollout
from vlmrl.config.algorithm import FilterConfig, FilterMode
from vlmrl.orchestrator.metrics import (
    chat_metrics,
    client_metrics,
    mean_task_metrics,
    rollout_metrics,
    support_metrics,
    throughput_metrics,
)
from vlmrl.types import (
    ChatUse,
    Completion,
    DropReason,
    Group,
    ImageItem,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Supports,
    Turn,
    TurnSampling,
)


def image(name: str) -> ImageItem:
    return ImageItem(name, np.zeros((1, 1, 3), np.uint8), {}, 1)


def turn(prompt_tokens: int, completion_tokens: int, *images: str, branch: int = 0) -> Turn:
    placeholders = tuple(Placeholder(i, 1, name) for i, name in enumerate(images))
    prompt = Prompt(np.arange(prompt_tokens), placeholders, tuple(map(image, images)))
    n = completion_tokens
    completion = Completion(np.arange(n), np.full(n, -1.0, np.float32), np.zeros(n, np.int64), "stop")
    return Turn(prompt, completion, "", [], branch, reward=0.0)


def rollout(
    reward: float,
    *turns: Turn,
    stop: StopReason = StopReason.TERMINATED,
    dropped: DropReason | None = None,
    **metrics: float,
) -> Rollout:
    filtered = (dropped,) if dropped is DropReason.ZERO_ADVANTAGE else ()
    return Rollout("r", "p", 0, list(turns), reward, metrics, stop, filtered=filtered, dropped=dropped)


def test_tokens_that_a_client_sampled_in_its_own_way_are_counted() -> None:
    """2 tokens of the run's own, 3 with another seed alone, 4 at another temperature, 5 greedy and 6 with top_k."""
    given = [None, TurnSampling(seed=3), TurnSampling(0.5), TurnSampling(0.0), TurnSampling(top_k=3)]
    turns = [replace(turn(10, tokens), sampling=sampling) for tokens, sampling in zip(range(2, 7), given, strict=True)]
    counted = {"tokens/client_sampled": 4.0 + 5.0 + 6.0, "tokens/unlearnable": 5.0 + 6.0}
    assert client_metrics([rollout(1.0, *turns[:3]), rollout(0.0, *turns[3:])]) == counted
    assert client_metrics([rollout(1.0, *turns[:2])]) == {}


def test_the_mean_size_of_supports_is_that_of_all_tokens_that_have_one() -> None:
    known = turn(10, 2), turn(10, 1), turn(10, 4)
    for each, supports in zip(known, ([[1, 2, 3], [4]], [[5, 6]]), strict=False):
        each.completion = replace(each.completion, supports=Supports.of(supports))
    assert support_metrics([rollout(1.0, *known[:2]), rollout(0.0, known[2])]) == {"support/mean": 2.0}
    assert support_metrics([rollout(0.0, known[2])]) == {}


GROUPS = [
    Group(
        "one",
        [
            rollout(1.0, turn(10, 2, "red"), turn(20, 3, "red", "blue"), share=1.0),
            rollout(0.0, turn(10, 2, "red"), turn(21, 4, "red", "green", branch=1), share=0.5, length=3.0),
            rollout(0.0, turn(10, 5, "red"), stop=StopReason.TASK_ERROR, dropped=DropReason.FAULT),
        ],
    ),
    Group(
        "two",
        [
            rollout(0.5, turn(8, 1), stop=StopReason.MAX_NEW_TOKENS, dropped=DropReason.ZERO_ADVANTAGE, share=0.0),
            rollout(0.5, stop=StopReason.CONTEXT_FULL, dropped=DropReason.EMPTY),
        ],
    ),
]


def test_every_metric() -> None:
    assert rollout_metrics(GROUPS, FilterConfig(zero_advantage=FilterMode.drop, gibberish=FilterMode.track)) == {
        "reward/mean": 0.5,  # of 1, 0, ½, ½; the fault does not count
        "reward/std": pytest.approx(math.sqrt(1 / 8)),
        "groups/equal_reward": 0.5,
        "rollouts/total": 5,
        "rollouts/dropped": 3,
        "rollouts/dropped/fault": 1,
        "rollouts/dropped/empty": 1,
        "rollouts/dropped/zero_advantage": 1,
        "rollouts/filtered/gibberish": 0,
        "rollouts/filtered/zero_advantage": 1,
        "rollouts/stop/terminated": 2,
        "rollouts/stop/task_error": 1,
        "rollouts/stop/max_new_tokens": 1,
        "rollouts/stop/context_full": 1,
        "bridge_break_rate": 0.5,
        "turns/bridged": 1,
        "tokens/prompt": 10 + 20 + 10 + 21 + 10 + 8,
        "tokens/completion": 2 + 3 + 2 + 4 + 5 + 1,
        "images/distinct": 3,
        "task/share": 0.5,
        "task/length": 3.0,
    }


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [Group("p", [])],
        [Group("p", [rollout(0.0, stop=StopReason.IMAGE_ERROR, dropped=DropReason.FAULT)] * 2)],
    ],
)
def test_a_batch_of_faults_does_not_divide_by_zero(groups: list[Group]) -> None:
    metrics = rollout_metrics(groups, FilterConfig())
    assert metrics["reward/mean"] == metrics["reward/std"] == metrics["tokens/prompt"] == 0.0
    assert metrics["rollouts/total"] == metrics["rollouts/dropped"] == sum(len(g.rollouts) for g in groups)


def test_throughput_counts_each_token_once() -> None:
    metrics = throughput_metrics(GROUPS, seconds=2.0)
    # The prompt of the last turn contains the earlier turns.
    assert metrics["throughput/tokens_per_s"] == ((20 + 3) + (21 + 4) + (10 + 5) + (8 + 1)) / 2


def test_task_metrics_are_means_over_the_rollouts_that_report_them() -> None:
    rollouts = [rollout(0, a=1.0, b=4.0), rollout(0, a=2.0), rollout(0)]
    assert mean_task_metrics(rollouts) == {"task/a": 1.5, "task/b": 4.0}
    assert mean_task_metrics([]) == {}


def test_the_requests_of_programs_are_added_up() -> None:
    played = [
        replace(rollout(0.0), chat_use=ChatUse(requests=5, repeated=1, refused=1, bridged=2, breaks=0)),
        replace(rollout(0.0), chat_use=ChatUse(requests=3, bridged=1, breaks=1)),
        rollout(0.0),
    ]
    assert chat_metrics(played) == {
        "endpoint/requests": 8.0,
        "endpoint/repeated": 1.0,
        "endpoint/refused": 1.0,
        "endpoint/bridged": 3.0,
        "endpoint/breaks": 1.0,
    }
    assert chat_metrics([rollout(0.0)]) == {}


def test_distinct_videos_and_their_frames_are_counted() -> None:
    """Siblings show the same; frames that two videos share count in each."""
    group = Group("p", [video_rollout(index=index) for index in range(2)])
    backwards = Group("q", [video_rollout((video(1, frames_of(1)[::-1]),))])
    found = rollout_metrics([group, backwards], FilterConfig())
    assert (found["videos/distinct"], found["videos/frames"], found["images/distinct"]) == (3, 12, 2)
    assert not [key for key in rollout_metrics(GROUPS, FilterConfig()) if key.startswith("videos/")]
