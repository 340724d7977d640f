"""The border: what a task hands over is made plain, or refused as a fault of one rollout."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vlmrl.errors import UserFault
from vlmrl.tasks.base import BadRow, NoProblem, NotInSplit, Reply, StepInfo
from vlmrl.tasks.border import (
    BadRewardError,
    TaskCodeError,
    checked_id,
    checked_messages,
    checked_prompt,
    checked_reply,
    get_num_rows,
    get_problem,
)
from vlmrl.tasks.demonstrations import NoDemonstrationsError, get_demonstration
from vlmrl.tasks.open_env import OpenEnv
from vlmrl.types import Image, Message, StopReason, Text, ToolCall, Video


class Name(enum.StrEnum):
    accuracy = "accuracy"


class Evil(str):
    """A text whose own methods raise."""

    def __str__(self) -> str:
        raise RuntimeError("str")

    __repr__ = __str__

    def encode(self, *_: Any) -> bytes:
        raise RuntimeError("encode")


class EvilNumber(float):
    def __abs__(self) -> float:
        raise RuntimeError("abs")

    def __float__(self) -> float:
        raise SystemExit(3)


SURROGATES = ["a\ud83d", "\udcff", "ok " * 100 + "\ud800"]


def user(*parts: Any) -> tuple[Message, ...]:
    return (Message("user", parts),)


TEXTS = ["", "plain", "日本 😀", Name.accuracy, np.str_("x"), Evil("evil"), "a\0b\u2028"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_text_becomes_a_plain_str(text: str) -> None:
    ((part,),) = (message.content for message in checked_messages("reset()", user(Text(text)), ("user",)))
    assert isinstance(part, Text)
    found = [checked_id("problem('train', 0)", text), part.text, *checked_reply("step()", reply(text)).metrics]
    assert [type(one) for one in found] == [str] * 3
    assert all(one.encode() == str.__str__(text).encode() for one in found)


def test_what_a_message_has_besides_its_content_is_kept_and_made_plain() -> None:
    call = ToolCall(Evil("zoom"), {Name.accuracy: (1, Evil("x"))}, "1")
    given = (
        Message("assistant", (), (call,), reasoning=Evil("small")),
        Message("tool", (Text("x"),), tool_call_id=np.str_("1"), name=Evil("zoom")),
    )
    called, result = checked_messages("reset()", given, ("assistant", "tool"))
    assert called == Message("assistant", (), (ToolCall("zoom", {"accuracy": [1, "x"]}, "1"),), reasoning="small")
    assert result == Message("tool", (Text("x"),), tool_call_id="1", name="zoom")
    assert [type(each) for each in (called.reasoning, result.name, called.tool_calls[0].name)] == [str] * 3


@pytest.mark.parametrize(
    ("beside", "problem"),
    [
        ({"tool_calls": ["zoom"]}, "not a tuple of ToolCall"),
        ({"tool_calls": ("zoom",)}, "not a tuple of ToolCall"),
        ({"tool_calls": (ToolCall("zoom", {"a": float("nan")}),)}, "are not JSON"),
        ({"tool_calls": (ToolCall("zoom", {"a": {1, 2}}),)}, "are not JSON"),
        ({"tool_calls": (ToolCall("zoom", {"a": SURROGATES[0]}),)}, "are not JSON"),
        ({"tool_calls": (ToolCall("zoom", "a"),)}, "arguments are no mapping"),  # type: ignore[arg-type]
        ({"tool_calls": (ToolCall(1, {}),)}, "not texts"),  # type: ignore[arg-type]
        ({"name": 1}, "name=1, not a str"),
        ({"tool_call_id": None}, "tool_call_id=None, not a str"),
        ({"reasoning": SURROGATES[1]}, "lone surrogate"),
    ],
)
def test_what_cannot_be_rendered_beside_the_content_is_refused(beside: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskCodeError, match=problem):
        checked_messages("reset()", (Message("user", (Text("x"),), **beside),), ("user",))


def reply(metric: Any = "m", **changes: Any) -> Reply:
    return Reply(**{"done": True, "metrics": {metric: 1.0}, **changes})


@pytest.mark.parametrize("text", SURROGATES, ids=range(len(SURROGATES)))
def test_a_lone_surrogate_is_refused_wherever_it_stands(text: str) -> None:
    message = "has the lone surrogate "
    with pytest.raises(TaskCodeError, match=message):
        checked_id("problem('train', 0)", text)
    with pytest.raises(TaskCodeError, match=rf"a text of a user message of reset\(\) {message}"):
        checked_prompt("reset()", user(Text(text)))
    with pytest.raises(BadRewardError, match=message) as caught:
        checked_reply("step()", reply(text))
    assert caught.value.text.isascii()


@pytest.mark.parametrize("text", [None, 5, b"ab", ["a"], Text("a")])
def test_a_text_that_is_not_a_str_is_refused(text: Any) -> None:
    with pytest.raises(TaskCodeError, match="a user message whose text is "):
        checked_prompt("reset()", user(Text(text)))


@pytest.mark.parametrize("name", [1, None, b"a", 1.5, ("a",)])
def test_a_metric_whose_name_is_not_a_str_is_a_bad_reward(name: Any) -> None:
    with pytest.raises(BadRewardError, match="a metric called "):
        checked_reply("step()", reply(name))


NUMBERS = [1, True, np.True_, np.float32(0.5), np.int8(3), Fraction(1, 3), 3e38, 1e-30]
NO_NUMBERS = [math.nan, math.inf, 1e39, 10**400, 10**5000, "1.0", None, 1j, Decimal(1), [1], np.ones(1), EvilNumber(1)]


@pytest.mark.parametrize("place", ["turn_reward", "reward"])
@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_become_floats(place: str, value: Any) -> None:
    checked = checked_reply("step()", reply(**{place: value}))
    assert (type(getattr(checked, place)), getattr(checked, place)) == (float, float(value))


def test_a_metric_may_be_an_array_without_axes() -> None:
    """numpy gives one where a reader expects a number: `np.where(right, 1.0, 0.0)`."""
    metrics = {"share": np.where(True, 0.5, 0.0), "count": np.array(3), "all": np.array([1, 2]).all(), "flag": np.True_}
    assert checked_reply("step()", reply(metrics=metrics)).metrics == {"share": 0.5, "count": 3, "all": 1, "flag": 1}
    for value in (np.array(math.nan), np.array("1.0"), np.array(None), np.ones(1)):
        with pytest.raises(BadRewardError, match="returned metric 'share'="):
            checked_reply("step()", reply(metrics={"share": value}))


@pytest.mark.parametrize("metric", ["m", "reward", "turn_reward", Name.accuracy])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_metric_may_have_any_name_and_is_looked_at(metric: str, value: Any) -> None:
    """One called `reward` must not stand in for the reward, nor the reward for it."""
    with pytest.raises(BadRewardError) as caught:
        checked_reply("step()", reply(metrics={metric: value}))
    assert caught.value.stop_reason is StopReason.BAD_REWARD
    with pytest.raises(BadRewardError):
        checked_reply("step()", reply(reward=value, metrics={metric: 1.0}))


@pytest.mark.parametrize("done", ["False", "", 1, 0, None, np.array([1, 0])])
def test_done_is_a_bool(done: Any) -> None:
    with pytest.raises(TaskCodeError, match="not a bool"):
        checked_reply("step()", reply(done=done))


HISTORY = (Message.of("system", "s"), Message.of("user", "a", Image(3)), Message.of("assistant", "b"))


def test_a_history_is_checked_as_a_prompt_is() -> None:
    again = (*HISTORY, Message.of("tool", enum_text := Name.accuracy))
    reply = checked_reply("step()", Reply(history=again))
    assert (reply.messages, reply.history) == ((), (*HISTORY, Message.of("tool", str(enum_text))))
    assert reply.history is not None
    assert type(reply.history[-1].content[0].text) is str  # type: ignore[union-attr]
    assert checked_reply("step()", Reply(done=True, history=HISTORY)).history is None  # ignored


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply(history=HISTORY), "step()'s history does not end with a user message"),
        (Reply(history=()), "step()'s history returned no message"),
        (Reply(history="seen"), "step()'s history returned a str, not a tuple of Message"),  # type: ignore[arg-type]
        (Reply(history=HISTORY[:2], messages=HISTORY[1:2]), "step() returned both history and messages"),
    ],
)
def test_a_history_that_the_policy_cannot_answer_is_refused(reply: Reply, problem: str) -> None:
    with pytest.raises(TaskCodeError) as fault:
        checked_reply("step()", reply)
    assert fault.value.text.startswith(problem)


@pytest.mark.parametrize("done", [True, np.True_])
def test_done_may_be_numpys(done: Any) -> None:
    assert checked_reply("step()", reply(done=done)).done is True


def test_images_are_handed_on_as_they_are() -> None:
    image = Image(object())
    (message,) = checked_prompt("reset()", (Message("user", (image, Text("?"))),))
    assert message.content[0] is image


def video_of(part: Any) -> Video:
    (message,) = checked_prompt("reset()", (Message("user", (part, Text("?"))),))
    found = message.content[0]
    assert type(found) is Video
    return found


class EvilVideo(Video):
    """A video whose own methods raise."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __hash__(self) -> int:
        raise RuntimeError("hash")


def test_videos_become_plain_and_plain_ones_are_handed_on_as_they_are() -> None:
    source = object()
    for plain in (Video(source), Video(source, fps=8.0), Video(source, times=(0.0, 0.5)), Video(source, fps=8)):
        assert video_of(plain) is plain
    rate: Any = np.float32(8)
    stamps: Any = np.array([0, 0.5])
    made = video_of(EvilVideo(source, fps=rate, times=stamps))
    assert made.source is source
    assert (type(made.fps), made.fps, made.times) == (float, 8.0, (0.0, 0.5))
    times: Any = [Fraction(1, 2), np.int64(1)]
    assert video_of(Video(source, times=times)).times == (0.5, 1.0)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (Video("a.mp4", fps=math.nan), "video whose fps is nan, not a finite number"),
        (Video("a.mp4", fps=math.inf), "video whose fps is inf, not a finite number"),
        (Video("a.mp4", fps="8"), "video whose fps is '8', not a finite number"),  # type: ignore[arg-type]
        (Video("a.mp4", fps=-8.0), "video of fps=-8.0: it must be above 0"),
        (Video("a.mp4", fps=0), "video of fps=0: it must be above 0"),
        (Video("a.mp4", fps=EvilNumber(8)), "float() of reset() returned a user message with a video whose fps raised"),
        (Video("a.mp4", times=(0.0, math.nan)), "of whose times one is nan"),
        (Video("a.mp4", times=("0", "1")), "of whose times one is '0'"),  # type: ignore[arg-type]
        (Video("a.mp4", times=(1.0, 0.5)), "whose times are not ascending from 0: [1, 0.5]"),
        (Video("a.mp4", times=(-1.0, 0.5)), "whose times are not ascending from 0: [-1, 0.5]"),
        (Video("a.mp4", times=0.5), "whose times are a float, not a list of at most 65536"),  # type: ignore[arg-type]
        (Video("a.mp4", times=iter([0.0])), "whose times are a list_iterator, not"),  # type: ignore[arg-type]
        (Video("a.mp4", times=[0.0] * 65537), "not a list of at most 65536 numbers"),
    ],
)
def test_videos_that_are_refused(part: Video, problem: str) -> None:
    with pytest.raises(TaskCodeError) as fault:
        video_of(part)
    assert problem in fault.value.text


class Hostile:
    """A task each of whose methods runs `act`."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def problem(self, split: str, index: int) -> Any:
        return self.act()

    def env(self, problem: Any) -> Any:
        return self

    def reset(self) -> Any:
        return self.act()

    def step(self, completion: str) -> Any:
        return self.act()

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> Any:
        return self.act()


class BadTextError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class Property:
    @property
    def id(self) -> str:
        raise BadTextError

    content = role = done = id


class LyingReply(Reply):
    @property
    def turn_reward(self) -> float:
        raise KeyError("turn_reward")

    @turn_reward.setter
    def turn_reward(self, value: float) -> None: ...


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


@pytest.mark.parametrize(
    "act",
    [
        *(raising(e) for e in (ValueError("no"), SystemExit(0), GeneratorExit(), BadTextError(), StopIteration())),
        raising(ExceptionGroup("two", [KeyError(1), KeyError("\ud800")])),
        lambda: None,
        Property,
        lambda: LyingReply(done=True),
        lambda: (Message(Unequal(), ()),),  # type: ignore[arg-type]
        lambda: (Message("user", Unequal()),),  # type: ignore[arg-type]
        lambda: reply(done=False, messages=Unequal()),
    ],
)
def test_whatever_a_task_does_is_a_fault_with_a_text(act: Callable[[], Any]) -> None:
    task: Any = Hostile(act)
    for call in (
        lambda: get_problem(task, "train", 0),
        lambda: OpenEnv(task, task).reset(),
        lambda: OpenEnv(task, task).step("x", StepInfo.of_text("x", 1)),
        lambda: get_demonstration(task, task, random_answers=True, seed=0),
    ):
        with pytest.raises(UserFault) as caught:
            call()
        assert isinstance(caught.value, TaskCodeError)
        assert caught.value.text.encode()


def test_a_task_without_demonstrations_is_told_apart() -> None:
    task: Any = Hostile(raising(NotImplementedError("it is not defined")))
    with pytest.raises(NoDemonstrationsError, match="is not defined"):
        get_demonstration(task, task, random_answers=True, seed=0)


# ── indices without a problem ───────────────────────────────────────────────────────────────────────────────


class EvilBadRow(BadRow):
    def __init__(self, reason: str, source: str) -> None:
        super().__init__("", source=source)
        self.reason = reason

    def __str__(self) -> str:
        raise RuntimeError("str")


class Unmade(BadRow):
    def __init__(self) -> None:
        pass


class Rows:
    """A task that raises what it was made with."""

    def __init__(self, error: BaseException, rows: Any = None) -> None:
        self.error, self.rows = error, rows

    def problem(self, split: str, index: int) -> Any:
        raise self.error

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> Any:
        raise self.error

    def num_rows(self, split: str) -> Any:
        return self.rows


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (BadRow("no answer", source="a.csv", row=4), BadRow, "a.csv row 4: no answer"),
        (EvilBadRow(Evil("evil\ud83d"), source="a"), BadRow, "a: evil\\ud83d"),
        (BadRow("r", row=np.int64(3)), BadRow, "row 3: r"),  # type: ignore[arg-type]
        (NotInSplit("hash 3"), NotInSplit, "hash 3"),
        (NoProblem("gone"), NoProblem, "gone"),
    ],
    ids=range(5),
)
def test_no_problem_passes_the_fence_as_a_plain_exception(raised: Any, kind: type[Any], text: str) -> None:
    task: Any = Rows(raised)
    for call in (
        lambda: get_problem(task, "train", 0),
        lambda: get_demonstration(task, None, random_answers=False, seed=0),  # type: ignore[arg-type]
    ):
        with pytest.raises(NoProblem) as found:
            call()
        assert type(found.value) is kind
        assert str(found.value) == text
        assert found.value.__context__ is None, "it would keep the frames of the user's code alive"
        if isinstance(found.value, BadRow):
            assert type(found.value.reason) is type(found.value.source) is str
            assert type(found.value.row) in (int, type(None))


@pytest.mark.parametrize("raised", [Unmade(), BadRow("r", row="4"), KeyError("row")])  # type: ignore[arg-type]
def test_what_is_no_proper_absence_is_a_fault(raised: Any) -> None:
    task: Any = Rows(raised)
    with pytest.raises(TaskCodeError):
        get_problem(task, "train", 0)


def test_the_number_of_rows() -> None:
    missing: Any = object()
    assert get_num_rows(missing, "train") is None
    for rows, plain in ((None, None), (5, 5), (np.int64(7), 7)):
        task: Any = Rows(KeyError(), rows)
        assert get_num_rows(task, "train") == plain
    for wrong in (0, -1, True, 2.5, "10", Evil("3")):
        task = Rows(KeyError(), wrong)
        with pytest.raises(TaskCodeError, match="not a positive int or None"):
            get_num_rows(task, "eval")
