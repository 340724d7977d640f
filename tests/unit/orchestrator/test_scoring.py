"""Score the rollouts of a group by reward terms: what a term sees, what a rollout is paid, and what a failure costs."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from support.rollout_builders import image, rollout, turn
from support.rollout_builders import prompt as prompt_of
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.reward import ExactTerm, ExtractConfig, Extraction, FormatTerm, RewardConfig
from vlmrl.config.task import ColorCodewordConfig, MixtureConfig
from vlmrl.orchestrator.advantages import assign_advantages, mark_dropped
from vlmrl.orchestrator.metrics import mean_reward, rollout_metrics
from vlmrl.orchestrator.scoring import Scheme, Scorer
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.rewards.base import Attempt, PerAttempt, RewardError, Score, Scored, SeenImage
from vlmrl.rewards.imported import Imported
from vlmrl.rewards.loading import Term
from vlmrl.rewards.signatures import signature_of
from vlmrl.types import DropReason, Group, ImageItem, Message, Placeholder, Prompt, Rollout, StopReason


@dataclass(frozen=True)
class Row:
    answer: Any = "5"
    columns: Mapping[str, Any] = field(default_factory=dict)
    id: str = "row 0"


@dataclass(frozen=True)
class Plain:
    """A problem without an answer, whose task scores it."""

    id: str = "row 0"


@dataclass
class Fixed:
    """A term that returns the same scores for each group, and keeps what it saw."""

    scores: Sequence[Score]
    seen: list[Sequence[Attempt]] = field(default_factory=list)

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        self.seen.append(attempts)
        return list(self.scores)


def term(name: str, reward: Any, weight: float = 1.0) -> Term:
    return Term(name, weight, str.strip, reward)


def group_of(*texts: str, problem: Any = None, own: float = 0.0) -> Group:
    """Siblings of one turn that answer `texts`, and whose task pays `own`."""
    rollouts = []
    for index, text in enumerate(texts):
        made = rollout(index)
        made.turns = [turn(prompt_of([1, 2], [10]), [10], text=text)]
        made.reward = own
        rollouts.append(made)
    return Group("row 0", rollouts, Row() if problem is None else problem)


def score(group: Group, *terms: Term, task_weight: float = 1.0) -> Group:
    asyncio.run(Scorer(Scheme(terms, task_weight)).score(group))
    return group


def rewards(group: Group) -> list[float]:
    return [rollout.reward for rollout in group.rollouts]


# ── what a rollout is paid ──────────────────────────────────────────────────────────────────────────────────


def test_weights_times_values_are_added() -> None:
    group = score(
        group_of("a", "b"),
        term("first", Fixed([1.0, 0.0]), weight=0.75),
        term("second", Fixed([1.0, 1.0]), weight=-0.25),
    )
    assert rewards(group) == [0.5, -0.25]
    assert [rollout.rewards for rollout in group.rollouts] == [
        {"first": 1.0, "second": 1.0},
        {"first": 0.0, "second": 1.0},
    ]


def test_a_term_that_abstains_is_left_out() -> None:
    """As in TRL: the other terms are not scaled up."""
    group = score(group_of("a", "b"), term("first", Fixed([None, 1.0])), term("second", Fixed([1.0, 1.0]), weight=0.5))
    assert rewards(group) == [0.5, 1.5]
    assert group.rollouts[0].rewards == {"first": None, "second": 1.0}


def test_the_reward_of_the_task_is_a_term_with_a_weight() -> None:
    group = score(group_of("a", problem=Plain(), own=0.5), term("first", Fixed([1.0])), task_weight=2.0)
    assert rewards(group) == [2.0]


def test_a_task_that_scores_itself_keeps_its_reward_where_every_term_abstains() -> None:
    group = score(group_of("a", problem=Plain(), own=0.5), term("first", Fixed([None])))
    assert (group.rollouts[0].reward, group.rollouts[0].dropped) == (0.5, None)


def test_where_every_term_abstains_the_rollout_has_no_reward() -> None:
    """It is dropped under its own name, and neither compared with its siblings nor counted in any mean."""
    group = score(group_of("a", "b", "c"), term("first", Fixed([None, 1.0, 0.0])))
    algorithm = AlgorithmConfig()
    assign_advantages(group, algorithm)
    mark_dropped(group, algorithm, image_token_ids=(), version=3, max_staleness=0)
    assert [rollout.dropped for rollout in group.rollouts] == [DropReason.NO_REWARD, None, None]
    advantages = [rollout.turns[0].advantage for rollout in group.rollouts]
    assert advantages == pytest.approx([0.0, 1.0, -1.0], abs=1e-5), "the mean of the other two is 0.5"
    metrics = rollout_metrics([group], algorithm.filters)
    assert (metrics["reward/mean"], metrics["reward/first"]) == (0.5, 0.5)
    assert metrics["rollouts/dropped/no_reward"] == 1
    assert mean_reward(group.rollouts) == 0.5
    assert mean_reward(group.rollouts[:1]) == 0.0


def test_metrics_of_a_term() -> None:
    made = Fixed([Scored(1.0, {"accuracy": 0.5}), Scored(None, {"accuracy": True})])
    group = score(group_of("a", "b"), term("fn", made), term("other", Fixed([0.0, 0.0])))
    assert rewards(group) == [1.0, 0.0]
    assert [rollout.metrics for rollout in group.rollouts] == [
        {"share_correct": 0.5, "fn/accuracy": 0.5},
        {"share_correct": 0.5, "fn/accuracy": 1.0},
    ]
    assert rollout_metrics([group], AlgorithmConfig().filters)["task/fn/accuracy"] == 0.75


@pytest.mark.parametrize("value", [True, np.float32(0.5), np.int64(1), 1])
def test_numbers_of_any_kind(value: Any) -> None:
    (paid,) = rewards(score(group_of("a"), term("fn", Fixed([value]))))
    assert (paid, type(paid)) == (float(value), float)


def test_without_terms_nothing_changes() -> None:
    group = score(group_of("a", own=0.5))
    assert (group.rollouts[0].reward, group.rollouts[0].rewards) == (0.5, {})
    assert not Scorer().has_terms


def test_a_data_set_without_terms_has_no_reward() -> None:
    """Alone, and next to a task of a mixture that scores itself."""
    data = DatasetConfig(path="rows.jsonl")
    mixture = MixtureConfig(tasks={"rows": data, "colors": ColorCodewordConfig()})
    for task, name, dropped in (
        (data, "", DropReason.NO_REWARD),
        (mixture, "rows", DropReason.NO_REWARD),
        (mixture, "colors", None),
    ):
        group = group_of("a")
        group.rollouts[0].task = name
        asyncio.run(scorer_of(RewardConfig(), task).score(group))
        assert group.rollouts[0].dropped is dropped, (task, name)


# ── what a term sees ────────────────────────────────────────────────────────────────────────────────────────


def test_a_term_sees_the_last_answer_and_all_before_it() -> None:
    made = rollout()
    made.turns[0].text, made.turns[1].text = "first answer", "last answer"
    seen = Fixed([1.0])
    score(Group("red-green", [made], Row(answer="7", columns={"unit": "cm"})), term("fn", seen))
    ((attempt,),) = seen.seen
    assert [(message.role, len(message.content)) for message in attempt.prompt] == [
        ("user", 3),
        ("assistant", 1),
        ("user", 2),
    ]
    assert attempt.prompt[1] == Message.of("assistant", "first answer")
    assert (attempt.completion, attempt.answer) == ("last answer", "last answer")
    assert (attempt.reference, attempt.columns) == ("7", {"unit": "cm"})
    assert (attempt.rollout_id, attempt.problem_id) == ("train/000001/00/00", "red-green")
    assert attempt.completion_ids == (200, 201, 202)
    assert attempt.images == (SeenImage(8, 8, 8, 8),) * 3


def test_a_term_sees_both_sizes_of_an_image() -> None:
    shown = ImageItem("ab", np.zeros((480, 640, 3), np.uint8), {}, 2, processed_size=(320, 256))
    made = rollout()
    prompt = Prompt(np.array([1, 99, 99]), (Placeholder(1, 2, "ab"),), (shown,))
    made.turns = [turn(prompt, [])]
    seen = Fixed([1.0])
    score(Group("row", [made], Row()), term("fn", seen))
    assert seen.seen[0][0].images == (SeenImage(640, 480, 320, 256),)
    assert image(10).processed_size is None


def test_a_problem_without_an_answer_has_no_reference() -> None:
    seen = Fixed([1.0])
    score(group_of("a", problem=Plain()), term("fn", seen))
    assert (seen.seen[0][0].reference, seen.seen[0][0].columns) == (None, {})


def test_rollouts_that_failed_are_not_scored() -> None:
    group = group_of("a", "b", "c")
    group.rollouts[0].stop_reason = StopReason.TASK_ERROR
    group.rollouts[1].turns = []
    seen = Fixed([1.0])
    score(group, term("fn", seen))
    assert [attempt.completion for attempt in seen.seen[0]] == ["c"]
    assert [rollout.rewards for rollout in group.rollouts] == [{}, {}, {"fn": 1.0}]


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


class Raises:
    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        raise KeyError("bbox")


def test_a_term_that_raises_costs_the_group() -> None:
    group = score(group_of("a", "b", own=0.5), term("fine", Fixed([1.0, 1.0])), term("fn", Raises()))
    for each in group.rollouts:
        assert (each.stop_reason, each.reward) == (StopReason.REWARD_ERROR, 0.0)
        assert (each.error or "").startswith("reward.terms.fn: the reward raised KeyError: 'bbox'")
        assert "KeyError" in (each.traceback or "")
        assert each.rewards == {"fine": 1.0}


def test_a_function_of_one_attempt_costs_that_rollout() -> None:
    reward = PerAttempt(lambda attempt: 1 / int(attempt.completion))
    group = score(group_of("0", "2"), term("fn", reward))
    assert [rollout.stop_reason for rollout in group.rollouts] == [StopReason.REWARD_ERROR, StopReason.TERMINATED]
    assert rewards(group) == [0.0, 0.5]


def test_a_score_may_be_a_fault() -> None:
    fault = RewardError("the server answered 500", "a traceback")
    group = score(group_of("a", "b"), term("judge", Fixed([fault, 0.5])))
    assert (group.rollouts[0].error, group.rollouts[0].traceback) == (
        "reward.terms.judge: the server answered 500",
        "a traceback",
    )
    assert rewards(group) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, "the value is nan, which is not a finite number"),
        (-math.inf, "the value is -inf, which is not a finite number"),
        ("0.5", "the value is '0.5', which is not a finite number"),
        ([1.0], "the value raised TypeError"),
        (Scored(1.0, {"accuracy": math.nan}), "the metric accuracy is nan, which is not a finite number"),
    ],
)
def test_a_value_that_is_no_number_is_a_bad_reward(value: Any, error: str) -> None:
    group = score(group_of("a", "b"), term("fn", Fixed([value, 1.0])))
    assert [rollout.stop_reason for rollout in group.rollouts] == [StopReason.BAD_REWARD, StopReason.TERMINATED]
    assert (group.rollouts[0].error or "").startswith(f"reward.terms.fn: {error}")


def test_a_sum_that_is_no_number_is_a_bad_reward() -> None:
    group = score(group_of("a"), term("fn", Fixed([3e38]), weight=10.0))
    assert (group.rollouts[0].stop_reason, group.rollouts[0].reward) == (StopReason.BAD_REWARD, 0.0)


def test_a_term_that_returns_too_few_scores_costs_the_group() -> None:
    group = score(group_of("a", "b"), term("fn", Fixed([1.0])))
    assert {rollout.stop_reason for rollout in group.rollouts} == {StopReason.REWARD_ERROR}


def test_a_problem_whose_columns_raise_costs_its_group() -> None:
    class Broken:
        id = "row 0"
        answer = "5"

        @property
        def columns(self) -> Mapping[str, Any]:
            raise OSError("the file is gone")

    group = score(group_of("a", "b", problem=Broken()), term("fn", Fixed([1.0, 1.0])))
    assert {rollout.stop_reason for rollout in group.rollouts} == {StopReason.TASK_ERROR}


# ── terms of the config ─────────────────────────────────────────────────────────────────────────────────────


def scorer_of(reward: RewardConfig, task: Any) -> Scorer:
    return Scorer.of(reward, task, TaskThreads().run)


def test_terms_share_the_extraction_or_have_their_own() -> None:
    config = RewardConfig(
        {
            "exact": ExactTerm(weight=0.5),
            "line": ExactTerm(extract=ExtractConfig(Extraction.last_line), weight=0.25),
            "format": FormatTerm(pattern="boxed"),
        },
        extract=ExtractConfig(Extraction.boxed),
    )
    group = group_of("\\boxed{5}\n6", "\\boxed{6}\n5", "5")
    asyncio.run(scorer_of(config, ColorCodewordConfig()).score(group))
    assert [rollout.rewards for rollout in group.rollouts] == [
        {"exact": 1.0, "line": 0.0, "format": 1.0},
        {"exact": 0.0, "line": 1.0, "format": 1.0},
        {"exact": 0.0, "line": 1.0, "format": 0.0},
    ]
    assert rewards(group) == [1.5, 1.25, 0.25]


def test_an_extraction_that_takes_too_long_costs_its_rollout() -> None:
    config = RewardConfig({"exact": ExactTerm()}, extract=ExtractConfig(Extraction.regex, pattern="^((a|aa)+|5)$"))
    group = group_of("a" * 79 + "!", "5")
    asyncio.run(scorer_of(config, ColorCodewordConfig()).score(group))
    assert [rollout.stop_reason for rollout in group.rollouts] == [StopReason.REWARD_ERROR, StopReason.TERMINATED]
    assert rewards(group) == [0.0, 1.0]


def test_the_tasks_of_a_mixture_have_their_own_terms() -> None:
    """A task without terms of its own has those of the run."""
    own = ColorCodewordConfig(reward=RewardConfig({"format": FormatTerm()}, task_weight=0.0))
    mixture = MixtureConfig(tasks={"a": own, "b": ColorCodewordConfig()})
    scorer = scorer_of(RewardConfig({"exact": ExactTerm()}), mixture)
    names = {}
    for task in ("a", "b"):
        group = group_of("5", own=0.5)
        group.rollouts[0].task = task
        asyncio.run(scorer.score(group))
        names[task] = group.rollouts[0].rewards, group.rollouts[0].reward
    assert names == {"a": ({"format": 0.0}, 0.0), "b": ({"exact": 1.0}, 1.5)}


def test_the_terms_of_the_task_replace_those_of_the_run() -> None:
    own = ColorCodewordConfig(reward=RewardConfig({"format": FormatTerm()}))
    scorer = scorer_of(RewardConfig({"exact": ExactTerm()}), own)
    group = group_of("5")
    asyncio.run(scorer.score(group))
    assert group.rollouts[0].rewards == {"format": 0.0}


def test_terms_of_one_group_and_groups_work_at_the_same_time() -> None:
    """Four scores wait for each other; one after the other they would wait for ever."""

    async def scored() -> None:
        all_four = asyncio.Barrier(4)

        class Waits:
            async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
                async with asyncio.timeout(10):
                    await all_four.wait()
                return [1.0] * len(attempts)

        scorer = Scorer(Scheme((term("first", Waits()), term("second", Waits()))))
        groups = [group_of("a"), group_of("b")]
        await asyncio.gather(*map(scorer.score, groups))
        assert [rewards(group) for group in groups] == [[2.0], [2.0]]

    asyncio.run(scored())


def test_functions_that_block_work_at_the_same_time_for_several_groups() -> None:
    """Each waits for the other group's, in the threads of a run."""
    both = threading.Barrier(2)

    def fn(completions: list[Any], **kwargs: Any) -> list[float]:
        both.wait(10)
        return [1.0] * len(completions)

    async def scored() -> None:
        reward = Imported(fn, signature_of(fn), {}, "module:fn", TaskThreads().run)  # type: ignore[arg-type]
        groups = [group_of("a"), group_of("b")]
        await asyncio.gather(*map(Scorer(Scheme((term("fn", reward),))).score, groups))
        assert [rewards(group) for group in groups] == [[1.0], [1.0]]

    asyncio.run(scored())


def test_a_rollout_without_scores_has_none() -> None:
    assert Rollout.unplayed("train/000001/00/00", "train", 0, 0).rewards == {}
