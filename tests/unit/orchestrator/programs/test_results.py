"""What a program may say of its episode."""

from __future__ import annotations

import pytest

from vlmrl.orchestrator.programs.results import Result, last_line, result_in
from vlmrl.tasks.border import BadRewardError, TaskCodeError
from vlmrl.types import StopReason


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("0.5", Result(0.5, {})),
        (" -2 ", Result(-2.0, {})),
        ("true", Result(1.0, {})),
        ('{"reward": 1}', Result(1.0, {})),
        (
            '{"reward": 0.25, "metrics": {"steps": 3, "won": true}, "note": "x"}',
            Result(0.25, {"steps": 3.0, "won": 1.0}),
        ),
        ('{"reward": 1, "metrics": null, "error": null}', Result(1.0, {})),
    ],
)
def test_results(text: str, result: Result) -> None:
    assert result_in(text, "it") == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty: print a number"),
        ("done", "it is 'done', which is neither a number nor"),
        ("nan", "it returned reward=nan, which is not a finite number"),
        ("1e400", "it returned reward=inf, which is not a finite number"),
        ('"0.5"', """it is '"0.5"', which is neither"""),
        ("[1]", "it is '\\[1\\]', which is neither"),
        ("null", "it is 'null', which is neither"),
        ("{}", "it is '{}', which is neither"),
        ('{"reward": "high"}', "it returned reward='high', which is not a finite number"),
        ('{"reward": null}', "it returned reward=None, which is not a finite number"),
        ('{"reward": 1, "metrics": {"a": "b"}}', "it returned metric 'a'='b'"),
        ("x" * 1000, "it is 'x{200}', which"),
    ],
)
def test_what_is_no_result(text: str, message: str) -> None:
    with pytest.raises(BadRewardError, match=message) as raised:
        result_in(text, "it")
    assert raised.value.stop_reason is StopReason.BAD_REWARD


def test_metrics_that_are_no_object_are_refused() -> None:
    with pytest.raises(TaskCodeError, match=r"it returned metrics=\[1\], not a dict"):
        result_in('{"reward": 1, "metrics": [1]}', "it")


def test_an_error_is_a_fault_of_the_task_and_no_bad_reward() -> None:
    with pytest.raises(TaskCodeError, match="it reports an error: the page did not load") as raised:
        result_in('{"error": "the page did not load", "reward": 1}', "it")
    assert raised.value.stop_reason is StopReason.TASK_ERROR


def test_the_last_line_is_the_last_that_is_not_empty() -> None:
    assert [last_line(text) for text in ("", "a\n", "a\nb\n\n \n", "a\r\n0.5\r\n")] == ["", "a", "b", "0.5"]
