"""Reward functions of one's own, and of TRL, verl and EasyR1.

The foreign functions have the parameters, the results and the structure of public ones; each says of which.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

import pytest

from vlmrl.config.reward import ImportedTerm
from vlmrl.errors import ConfigError, UserFault
from vlmrl.rewards.base import Attempt, RewardError, Score, Scored, SeenImage
from vlmrl.rewards.imported import imported
from vlmrl.types import Image, Message, StopReason, Video

T = TypeVar("T")

PROMPT = (
    Message.of("system", "Answer in a box."),
    Message.of("user", Image("a picture"), "How many?"),
)


def attempts(*completions: str, **columns: Any) -> list[Attempt]:
    """The attempts of a group at a row whose answer is 5."""
    return [
        Attempt(
            rollout_id=f"train/000001/00/{number:02d}",
            problem_id="train.parquet:7:0123abcd",
            prompt=PROMPT,
            completion=completion,
            answer=completion,
            reference="5",
            columns=columns,
            images=(SeenImage(640, 480, 320, 240),),
            completion_ids=tuple(range(number + 3)),
        )
        for number, completion in enumerate(completions)
    ]


def in_a_thread(call: Callable[[], T]) -> Awaitable[T]:
    return asyncio.to_thread(call)


@pytest.fixture
def module() -> Iterator[ModuleType]:
    made = ModuleType("rewards_of_users")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


@pytest.fixture
def scored(module: ModuleType) -> Callable[..., Sequence[Score]]:
    """Score attempts by a function, as a run does."""

    def scored(function: Any, given: list[Attempt], **args: Any) -> Sequence[Score]:
        module.fn = function  # type: ignore[attr-defined]
        term = ImportedTerm(target="rewards_of_users:fn", args=args)
        return asyncio.run(imported(term, "reward.terms.fn", in_a_thread).score(given))

    return scored


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_function_of_one_attempt(scored: Any) -> None:
    def fn(attempt: Attempt) -> float | None:
        return None if attempt.completion == "" else float(attempt.completion == attempt.reference)

    assert scored(fn, attempts("5", "6", "")) == [1.0, 0.0, None]


def test_a_function_of_a_group(scored: Any) -> None:
    """Called once, so that it can compare the siblings."""
    calls = []

    def fn(attempts: list[Attempt]) -> list[float]:
        calls.append(len(attempts))
        longest = max(len(attempt.completion) for attempt in attempts)
        return [len(attempt.completion) / longest for attempt in attempts]

    assert scored(fn, attempts("a", "ab")) == [0.5, 1.0]
    assert calls == [2]


def test_an_async_function_of_several_attempts_waits_for_all_at_once(scored: Any) -> None:
    """Each waits for the other, as calls of a server that answers in batches would."""
    both = threading.Barrier(2)

    async def fn(attempt: Attempt) -> float:
        await asyncio.to_thread(both.wait, 10)
        return float(attempt.completion)

    assert scored(fn, attempts("1", "2")) == [1.0, 2.0]


def test_a_function_that_blocks_runs_outside_the_event_loop(scored: Any) -> None:
    both = threading.Barrier(2)

    def fn(attempt: Attempt) -> float:
        both.wait(10)
        return float(attempt.completion)

    assert scored(fn, attempts("1", "2")) == [1.0, 2.0]


def test_args_are_keyword_arguments(scored: Any) -> None:
    def fn(attempt: Attempt, scale: float, offset: float = 1.0) -> float:
        return scale * float(attempt.completion) + offset

    assert scored(fn, attempts("2"), scale=10.0) == [21.0]
    assert scored(fn, attempts("2"), scale=10.0, offset=0.0) == [20.0]


def test_a_class_keeps_state(scored: Any) -> None:
    class Seen:
        def __init__(self, most: int = 1) -> None:
            self.most = most
            self.seen: set[str] = set()

        def __call__(self, attempt: Attempt) -> float:
            self.seen.add(attempt.completion)
            return float(len(self.seen) <= self.most)

    assert scored(Seen, attempts("a", "a")) == [1.0, 1.0]
    assert sum(scored(Seen, attempts("a", "b", "c"), most=2)) == 2.0


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────


def think_format_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """The head of trl/rewards/format_rewards.py: think_format_reward."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.startswith("<think>") and text.count("</think>") == 1) for text in texts]


def accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """The head of trl/rewards/accuracy_rewards.py: accuracy_reward. It abstains where the solution is no number."""
    contents = [completion[0]["content"] for completion in completions]
    return [float(content == sol) if sol.isdigit() else None for content, sol in zip(contents, solution, strict=True)]


def get_length_reward(max_len: int) -> Callable[..., list[float]]:
    """A factory like trl/rewards/accuracy_rewards.py: get_cosine_scaled_reward, which reads `completion_ids`."""

    class LengthReward:
        def __call__(self, completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return [min(len(ids) / max_len, 1.0) for ids in completion_ids]

    return LengthReward()


def test_functions_of_trl(scored: Any) -> None:
    assert scored(think_format_reward, attempts("<think>a</think> 5", "5")) == [1.0, 0.0]
    assert scored(accuracy_reward, attempts("5", "6", solution="5")) == [1.0, 0.0]
    assert scored(accuracy_reward, attempts("5", solution="five")) == [None]
    assert scored(get_length_reward, attempts("a", "b"), max_len=4) == [0.75, 1.0]


def test_the_reference_stands_in_for_a_column_that_the_row_lacks(scored: Any) -> None:
    """The answer of the row has another name in its data set than the function has for it."""
    assert scored(accuracy_reward, attempts("5", "6", answer="something else")) == [1.0, 0.0]


def test_what_trl_gives(scored: Any) -> None:
    """Messages as dictionaries, and each column as a list."""
    given: dict[str, Any] = {}

    def fn(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        given.update(kwargs, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    scored(fn, attempts("a", "b", source="web", prompt=[{"role": "user", "content": "How many?"}]))
    assert given["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    assert given["prompts"][0] == [
        {"role": "system", "content": "Answer in a box."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
    ]
    assert given["completion_ids"] == [[0, 1, 2], [0, 1, 2, 3]]
    assert given["source"] == ["web", "web"]
    assert given["solution"] == ["5", "5"]
    assert "prompt" not in given


def test_trl_functions_see_that_a_video_is_shown(scored: Any) -> None:
    given: list[Any] = []

    def fn(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        given.append(prompts[0][0]["content"])
        return [0.0] * len(completions)

    (attempt,) = attempts("a")
    shown = (Message.of("user", Video("a.mp4"), "Which way?"),)
    scored(fn, [dataclasses.replace(attempt, prompt=shown)])
    assert given == [[{"type": "video"}, {"type": "text", "text": "Which way?"}]]


def test_texts_where_trl_gives_texts(scored: Any) -> None:
    """Where the prompt of the data set is a text and no image is shown, and where the function says so."""

    def fn(prompts, completions, **kwargs):  # type: ignore[no-untyped-def] # as people write it
        return [float(len(completion)) for completion in completions]

    def says_so(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    textual = [
        Attempt(each.rollout_id, each.problem_id, PROMPT[:1], each.completion, None, "5", {"prompt": "How many?"}, ())
        for each in attempts("abc", "ab")
    ]
    assert scored(fn, textual) == [3.0, 2.0]
    assert scored(says_so, attempts("abc", "ab")) == [3.0, 2.0]


# ── verl ────────────────────────────────────────────────────────────────────────────────────────────────────


def verl_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """The head that verl's NaiveRewardManager calls (verl/utils/reward_score/__init__.py: default_compute_score)."""
    assert isinstance(extra_info, dict)
    if data_source != extra_info.get("expected", "train.parquet"):
        raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
    return 1.0 if solution_str == ground_truth else 0.0


def geo3k_score(predict_str: str, ground_truth: str, use_boxed: bool = True, format_score: float = 0.1) -> float:
    """The head of verl/utils/reward_score/geo3k.py: compute_score."""
    right = predict_str == (f"\\boxed{{{ground_truth}}}" if use_boxed else ground_truth)
    return (1.0 - format_score) * right + format_score * ("boxed" in predict_str)


def gsm8k_score(
    solution_str: str, ground_truth: str, method: str = "strict", format_score: float = 0.0, score: float = 1.0
) -> float:
    """The head of verl/utils/reward_score/gsm8k.py: compute_score."""
    return score if solution_str == ground_truth else format_score


def math_batch_score(
    data_sources: list[str], solution_strs: list[str], ground_truths: list[str], extra_infos: list[Any]
) -> list[float]:
    """The head of verl/utils/reward_score/math_batch.py, which its BatchRewardManager calls."""
    assert len(data_sources) == len(extra_infos)
    return [float(solution == truth) for solution, truth in zip(solution_strs, ground_truths, strict=True)]


def test_functions_of_verl(scored: Any) -> None:
    assert scored(verl_score, attempts("5", "6")) == [1.0, 0.0]
    row = attempts("5", data_source="hiyouga/geometry3k", extra_info={"expected": "hiyouga/geometry3k"})
    assert scored(verl_score, row) == [1.0]
    assert scored(geo3k_score, attempts("\\boxed{5}", "\\boxed{6}", "5")) == [1.0, 0.1, 0.0]
    assert scored(geo3k_score, attempts("5"), use_boxed=False, format_score=0.0) == [1.0]
    assert scored(gsm8k_score, attempts("5", "6"), format_score=0.25) == [1.0, 0.25]
    assert scored(math_batch_score, attempts("5", "6")) == [1.0, 0.0]


def test_dictionaries_and_tuples_as_verl_takes_them(scored: Any) -> None:
    """`score` is the value; the other numbers are metrics, and texts are left out."""

    def fn(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> Any:
        right = solution_str == ground_truth
        return {"score": float(right), "acc": right, "pred": solution_str}

    assert scored(fn, attempts("5", "6")) == [Scored(1.0, {"acc": True}), Scored(0.0, {"acc": False})]
    assert scored(lambda solution_str, ground_truth: (0.5, "why"), attempts("5")) == [0.5]


# ── EasyR1 ──────────────────────────────────────────────────────────────────────────────────────────────────


def math_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    """The head and the results of EasyR1/examples/reward_function/math.py: compute_score, of `reward_type=batch`."""
    assert isinstance(reward_inputs, list)
    return [r1v_score(reward_input, format_weight) for reward_input in reward_inputs]


def r1v_score(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    """The head and the results of EasyR1/examples/reward_function/r1v.py: compute_score, of
    `reward_type=sequential`."""
    assert isinstance(reward_input, dict)
    is_boxed = float("boxed" in reward_input["response"])
    is_right = float(reward_input["ground_truth"] in reward_input["response"])
    mean = is_right + format_weight * (is_boxed - is_right)
    return {"overall": mean, "format": is_boxed, "accuracy": is_right, "length": reward_input["response_length"]}


def older_math_score(predicts: list[str], ground_truths: list[str], format_weight: float = 0.1) -> list[Any]:
    """The head of the same file before `reward_inputs`."""
    return [
        {"overall": float(truth in predict), "format": format_weight}
        for predict, truth in zip(predicts, ground_truths, strict=True)
    ]


def test_functions_of_easyr1(scored: Any) -> None:
    right, wrong = "\\boxed{5}", "6"
    assert scored(math_score, attempts(right, wrong)) == [
        Scored(1.0, {"format": 1.0, "accuracy": 1.0, "length": 3}),
        Scored(0.0, {"format": 0.0, "accuracy": 0.0, "length": 4}),
    ]
    assert scored(r1v_score, attempts("5")) == [Scored(0.5, {"format": 0.0, "accuracy": 1.0, "length": 3})]
    assert scored(r1v_score, attempts("5"), format_weight=0.25)[0].value == 0.75
    assert scored(older_math_score, attempts(right, wrong), format_weight=0.5) == [
        Scored(1.0, {"format": 0.5}),
        Scored(0.0, {"format": 0.5}),
    ]
    assert scored(lambda predict, ground_truth: predict == ground_truth, attempts("5", "6")) == [True, False]


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


def raises(attempt: Attempt) -> float:
    if attempt.completion == "exit":
        sys.exit(3)
    return 1 / int(attempt.completion)


async def raises_later(attempt: Attempt) -> float:
    return raises(attempt)


@pytest.mark.parametrize("fn", [raises, raises_later])
def test_an_attempt_that_fails_leaves_the_others(scored: Any, fn: Any) -> None:
    first, second, third = scored(fn, attempts("0", "2", "exit"))
    assert second == 0.5
    assert isinstance(first, UserFault)
    assert isinstance(third, UserFault)
    assert first.text.startswith("rewards_of_users:fn() raised ZeroDivisionError")
    assert "1 / int(attempt.completion)" in (first.traceback or "")
    assert third.text.startswith("rewards_of_users:fn() raised SystemExit: 3")
    assert isinstance(first, RewardError)
    assert first.stop_reason is StopReason.REWARD_ERROR


def test_a_function_of_a_group_fails_for_the_group(scored: Any) -> None:
    def fn(completions: Any, **kwargs: Any) -> list[float]:
        raise KeyError("bbox")

    with pytest.raises(RewardError, match=r"^rewards_of_users:fn\(\) raised KeyError: 'bbox'"):
        scored(fn, attempts("a", "b"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "returned 1 values for the 2 attempts of a group"), (None, "raised TypeError"), (0.5, "raised TypeError")],
)
def test_a_group_needs_one_value_per_attempt(scored: Any, returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        scored(lambda completions, **kwargs: returned, attempts("a", "b"))


def test_a_dictionary_without_a_value(scored: Any) -> None:
    (fault,) = scored(lambda attempt: {"accuracy": 1.0}, attempts("a"))
    assert fault.text == (
        "rewards_of_users:fn() returned a dictionary with the keys ['accuracy'], none of which is the value: call it "
        "score or overall or reward"
    )


def test_a_column_that_the_row_lacks(scored: Any) -> None:
    def fn(completions: Any, boxes: Any) -> list[float]:
        return [0.0] * len(completions)

    assert scored(fn, attempts("a", boxes=[1])) == [0.0]
    message = r"fn\(\) takes boxes, and the row has no such column \(it has width, height\)"
    with pytest.raises(RewardError, match=message):
        scored(fn, attempts("a", width=1, height=2))


# ── refused at the start ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (lambda text: 0.0, {}, r"is called as fn\(text\), which is the form of no reward function that is known"),
        (lambda: 0.0, {}, r"is called as fn\(\), which is the form of no reward"),
        (lambda attempt, scale: 0.0, {}, r"has the parameters of ours and in addition scale, which nothing fills"),
        (lambda attempt: 0.0, {"scale": 1}, r"reward\.terms\.fn\.args\.scale is no parameter of rewards_of_users:fn"),
        (lambda solution_str, ground_truth, judge: 0.0, {}, r"parameters of verl and in addition judge"),
        (5, {}, r"is a int, not a reward function"),
    ],
)
def test_what_cannot_be_called_is_refused(scored: Any, fn: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(fn, attempts("a"), **args)


def test_the_refusal_names_the_forms_that_are_known(scored: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        scored(lambda response: 0.0, attempts("a"))
    for form in ("fn(attempt) (ours)", "fn(completions, **columns) (TRL)", "extra_info=None) (verl)", "(EasyR1)"):
        assert form in str(caught.value)


def test_a_class_that_raises_is_refused_with_its_line(scored: Any) -> None:
    class Broken:
        def __init__(self) -> None:
            raise FileNotFoundError("vocabulary.txt")

        def __call__(self, attempt: Attempt) -> float:
            return 0.0

    with pytest.raises(ConfigError, match=r"reward\.terms\.fn\.target=rewards_of_users:fn: .*vocabulary\.txt"):
        scored(Broken, attempts("a"))


def test_the_log_says_which_form_was_recognized(scored: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vlmrl.rewards.imported"):
        scored(think_format_reward, attempts("a"))
    assert caplog.messages == [
        "reward.terms.fn: rewards_of_users:fn is called as a reward function of this form: fn(completions, **columns)"
    ]
