"""Where values of a user's task enter vlmrl: each is checked once, and only plain values go on.

    task.problem ─▶ get_problem ─▶ problem, id    env.reset ─▶ checked_prompt ─▶ messages
    task.num_rows ─▶ get_num_rows ─▶ int          env.step  ─▶ checked_reply  ─▶ Reply

open_env.py calls envs, and demonstrations.py makes demonstrations; both use the checks of this file.

A run and the check (`vlmrl.tasks.check`) judge by the same functions, `checked_*`: what a run would refuse, the check
reports in the same words. A `str` subclass (`np.str_`, `StrEnum`) becomes a `str`, a numpy number a `float`, so
everything that leaves this file can be rendered and written to a record.

Everything here may raise `TaskCodeError`, which costs one rollout (or one demonstration). The user's code runs inside
`fenced`, so whatever it raises becomes one too. Only a `NoProblem` of `problem` and `demonstration` passes, made plain.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from vlmrl.errors import UserFault, fenced, safe_repr, safe_text
from vlmrl.tasks.base import BadRow, NoProblem, NotInSplit, Problem, Reference, Reply, Split, Task
from vlmrl.types import Image, Message, Part, StopReason, Text, ToolCall, Video

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

ANY_ROLE: tuple[Role, ...] = ("system", "user", "assistant", "tool")
ANSWERED_ROLES: tuple[Role, ...] = ("user", "tool")
"""Roles of messages that a policy answers: the last one of a prompt, and all that `step` returns."""

MOST_FRAMES = 1 << 16
"""The most times of a video."""

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Rewards are stored as float32, where a larger one would be infinite."""


class TaskCodeError(UserFault):
    """The task's code raised, or returned something that its contract does not allow."""

    stop_reason: ClassVar[StopReason] = StopReason.TASK_ERROR


class BadRewardError(TaskCodeError):
    """A reward or a metric is not a finite number, or a metric's name is not text."""

    stop_reason: ClassVar[StopReason] = StopReason.BAD_REWARD


class TaskTimeoutError(TaskCodeError):
    """A call of the task's code did not return within `task.timeout_s`."""

    stop_reason: ClassVar[StopReason] = StopReason.TASK_TIMEOUT


# ── calls of the task ───────────────────────────────────────────────────────────────────────────────────────


def get_problem(task: Task, split: Split, index: int) -> tuple[Problem, str]:
    """`task.problem` and the problem's id as a plain text. Raises `NoProblem` where the task does."""
    where = f"problem({split!r}, {index})"
    absent: NoProblem
    with fenced(where, TaskCodeError):
        try:
            problem = task.problem(split, index)
            return problem, checked_id(where, problem.id)
        except NoProblem as error:
            absent = checked_absence(where, error)
    raise absent


def get_num_rows(task: Task, split: Split) -> int | None:
    """`task.num_rows`: indices of one pass over the split; None where they are endless, or where the task does not
    define the method."""
    where = f"num_rows({split!r})"
    with fenced(where, TaskCodeError):
        defined: Any = getattr(task, "num_rows", None)
        return None if defined is None else checked_num_rows(where, defined(split))


def get_reference(problem: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """The answer and the columns of a problem; None where it is no `Reference`."""
    with fenced("the problem's answer and columns", TaskCodeError):
        if not isinstance(problem, Reference):
            return None
        answer, columns = problem.answer, problem.columns
    _check(isinstance(columns, Mapping), f"the problem's columns are {_kind(columns)}, not a dict")
    return answer, columns


# ── checks, which a run and vlmrl.tasks.check share ─────────────────────────────────────────────────────────


def checked_id(where: str, value: Any) -> str:
    """A problem's id: text that a record can hold."""
    _check(isinstance(value, str), f"{where}.id is {safe_repr(value)}, not a str")
    return _plain(f"{where}.id", value)


def checked_absence(where: str, absent: NoProblem) -> NoProblem:
    """The same exception with plain texts, and without the frames of the task's code."""
    if isinstance(absent, NotInSplit):
        return NotInSplit(safe_text(absent))
    if not isinstance(absent, BadRow):
        return NoProblem(safe_text(absent))
    row: Any = absent.row
    _check(
        row is None or isinstance(row, (int, np.integer)),
        f"{where} raised BadRow with row={safe_repr(row)}, not an int",
    )
    return BadRow(safe_text(absent.reason), source=safe_text(absent.source), row=None if row is None else int(row))


def checked_num_rows(where: str, rows: Any) -> int | None:
    """The number of indices of one pass: a positive int, or None."""
    if rows is None:
        return None
    _check(
        isinstance(rows, (int, np.integer)) and not isinstance(rows, bool) and bool(rows >= 1),
        f"{where} returned {safe_repr(rows)}, not a positive int or None",
    )
    return int(rows)


def checked_prompt(where: str, messages: Any) -> tuple[Message, ...]:
    """The first messages of an episode, which end with one that the policy answers."""
    checked = checked_messages(where, messages, ANY_ROLE)
    last = checked[-1].role
    _check(
        last in ANSWERED_ROLES,
        f"{where} does not end with a user message for the policy to answer: its last message is of role {last}",
    )
    return checked


def checked_reply(where: str, reply: Any) -> Reply:
    """The env's answer, with plain bool, floats and texts. Raises `BadRewardError` for its numbers."""
    _check(isinstance(reply, Reply), f"{where} returned a {type(reply).__name__}, not a Reply")
    done, metrics = reply.done, reply.metrics
    _check(
        isinstance(done, (bool, np.bool_)),
        f"{where} returned done={safe_repr(done)}, not a bool: any text or array would count as True",
    )
    _check(isinstance(metrics, dict), f"{where} returned metrics={safe_repr(metrics)}, not a dict")
    return Reply(
        turn_reward=_number(where, "turn_reward", reply.turn_reward),
        done=bool(done),
        reward=_number(where, "reward", reply.reward),
        messages=() if done or reply.history is not None else _checked_reply_messages(where, reply.messages),
        metrics={_metric_name(where, name): _number(where, "metric", value, name) for name, value in metrics.items()},
        history=None if done or reply.history is None else _checked_history(where, reply),
    )


def _checked_reply_messages(where: str, messages: Any) -> tuple[Message, ...]:
    _check(messages != (), f"{where} returned no message although the episode is not done: the policy has no prompt")
    return checked_messages(where, messages, ANSWERED_ROLES)


def _checked_history(where: str, reply: Reply) -> tuple[Message, ...]:
    _check(
        reply.messages == (),
        f"{where} returned both history and messages, so it is not clear what the policy sees next: put the messages "
        "at the end of the history",
    )
    return checked_prompt(f"{where}'s history", reply.history)


def checked_messages(where: str, messages: Any, roles: tuple[Role, ...]) -> tuple[Message, ...]:
    """Messages of these roles, at least one, with plain texts. Images are kept as they are; of videos, `fps` and
    `times` become plain numbers."""
    _check(
        isinstance(messages, tuple) and all(isinstance(message, Message) for message in messages),
        f"{where} returned {_kind(messages)}, not a tuple of Message",
    )
    _check(bool(messages), f"{where} returned no message")
    return tuple(_checked_message(where, message, roles) for message in messages)


def _checked_message(where: str, message: Message, roles: tuple[Role, ...]) -> Message:
    role = next((role for role in roles if message.role == role), None)
    if role is None:
        allowed = " or ".join(roles)
        raise TaskCodeError(f"{where} returned a message of role {safe_repr(message.role)}, not {allowed}")
    _check(
        isinstance(message.content, tuple) and all(isinstance(part, (Text, Image, Video)) for part in message.content),
        f"{where} returned a {role} message with {_kind(message.content)}, not a tuple of Text, Image and Video",
    )
    content = tuple(_checked_part(where, role, part) for part in message.content)
    beside = {
        name: _plain(f"{name} of a {role} message of {where}", _text(where, name, getattr(message, name)))
        for name in ("tool_call_id", "name", "reasoning")
    }
    return Message(role, content, _checked_calls(where, role, message.tool_calls), **beside)


def _checked_calls(where: str, role: Role, calls: Any) -> tuple[ToolCall, ...]:
    _check(
        isinstance(calls, tuple) and all(isinstance(call, ToolCall) for call in calls),
        f"{where} returned a {role} message with tool_calls={safe_repr(calls)}, not a tuple of ToolCall",
    )
    return tuple(_checked_call(where, call) for call in calls)


def _checked_call(where: str, call: ToolCall) -> ToolCall:
    """The call with plain texts and numbers."""
    _check(
        isinstance(call.name, str) and isinstance(call.id, str) and isinstance(call.arguments, Mapping),
        f"{where} returned {safe_repr(call)}, whose name and id are not texts, or whose arguments are no mapping",
    )
    try:
        text = json.dumps([call.name, dict(call.arguments), call.id], ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskCodeError(
            f"{where} returned a tool call whose arguments are not JSON ({safe_text(error)}): {safe_repr(call)}"
        ) from None
    return ToolCall(*json.loads(text))


def _text(where: str, name: str, value: Any) -> str:
    _check(isinstance(value, str), f"{where} returned a message with {name}={safe_repr(value)}, not a str")
    text: str = value
    return text


def _checked_part(where: str, role: Role, part: Part) -> Part:
    if isinstance(part, Video):
        return _checked_video(where, role, part)
    if isinstance(part, Image):
        return part  # its pixels are decoded, and judged, by the renderer
    text: Any = part.text
    _check(
        isinstance(text, str),
        f"{where} returned a {role} message whose text is {safe_repr(text)}, a {type(text).__name__} and not a str",
    )
    plain = _plain(f"a text of a {role} message of {where}", text)
    return part if plain is text else Text(plain)


def _checked_video(where: str, role: Role, video: Video) -> Video:
    """The video with plain numbers; its frames are decoded, and judged, by the renderer. A renderer knows the parts it
    has seen by identity, so one that is plain already is returned as it is."""
    source, fps, times = video.source, video.fps, video.times
    what = f"{where} returned a {role} message with a video"
    plain_fps = None if fps is None else _seconds(f"{what} whose fps", fps)
    _check(
        plain_fps is None or plain_fps > 0,
        f"{what} of fps={safe_repr(fps)}: it must be above 0, or None for frames that are all shown",
    )
    plain_times = None
    if times is not None:
        _check(
            isinstance(times, (list, tuple, np.ndarray)) and len(times) <= MOST_FRAMES,
            f"{what} whose times are {_kind(times)}, not a list of at most {MOST_FRAMES} numbers of seconds",
        )
        plain_times = tuple(_seconds(f"{what}, of whose times one", each) for each in times)
        _check(
            all(low <= high for low, high in pairwise((0.0, *plain_times))),
            f"{what} whose times are not ascending from 0: {_short_list(plain_times)}",
        )
    is_plain = type(video) is Video and type(fps) in (int, float, type(None)) and type(times) in (tuple, type(None))
    return video if is_plain else Video(source, fps=plain_fps, times=plain_times)


def _seconds(what: str, value: Any) -> float:
    """A finite number."""
    number = math.nan
    if isinstance(value, numbers.Real):
        with fenced(f"float() of {what}", TaskCodeError):
            number = float(value)
    _check(math.isfinite(number), f"{what} is {safe_repr(value)}, not a finite number")
    return number


def _short_list(values: tuple[float, ...]) -> str:
    """
    >>> _short_list((0.0, 2.0, 1.0)), _short_list(tuple(map(float, range(9))))
    ('[0, 2, 1]', '[0, 1, 2, 3, 4, …]')
    """
    return f"[{', '.join(f'{value:g}' for value in values[:5])}{', …' if len(values) > 5 else ''}]"


def _plain(what: str, text: str) -> str:
    """The text as a `str` and no subclass of it. Refuses a lone surrogate, which no tokenizer and no file can hold."""
    plain = str.__str__(text)
    if not plain.isascii():
        try:
            plain.encode()
        except UnicodeEncodeError as error:
            found = ascii(plain[error.start : error.end])
            raise TaskCodeError(
                f"{what} has the lone surrogate {found} at character {error.start}, which is not valid Unicode: "
                "read the data as UTF-8 with errors='replace', or repair it"
            ) from None
    return plain


def _metric_name(where: str, name: Any) -> str:
    if not isinstance(name, str):
        raise BadRewardError(
            f"{where} returned a metric called {safe_repr(name)}, a {type(name).__name__} and not a str"
        )
    try:
        return _plain(f"a metric's name of {where}", name)
    except TaskCodeError as fault:
        raise BadRewardError(fault.text) from None


def _number(where: str, kind: str, value: Any, name: Any = None) -> float:
    """A reward or a metric as a float; `bool` and numpy's count as 0 or 1."""
    number = math.nan
    if name is not None and isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]  # np.where and np.mean give such a metric; a reward is compared, so it must be a number
    if isinstance(value, (numbers.Real, np.bool_)):
        with fenced(f"float() of {where}'s {kind}", BadRewardError):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
    if not abs(number) <= LARGEST_REWARD:  # NaN fails this comparison too
        called = kind if name is None else f"{kind} {safe_repr(name)}"
        raise BadRewardError(f"{where} returned {called}={safe_repr(value)}, which is not a finite number")
    return number


def _kind(value: Any) -> str:
    """
    >>> _kind([1, "a"]), _kind(None), _kind(())
    ('a list of int, str', 'None', 'a tuple of nothing')
    """
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(x).__name__ for x in value})) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"


def checked_texts(texts: Any) -> tuple[str, ...]:
    """What `Task.texts` returned, as plain texts."""
    _check(
        isinstance(texts, tuple) and all(isinstance(text, str) for text in texts),
        f"texts() returned {_kind(texts)}, not a tuple of str",
    )
    return tuple(_plain("a text of texts()", text) for text in texts)


def _check(holds: bool, problem: str) -> None:
    """Raise `TaskCodeError(problem)` unless `holds`."""
    if not holds:
        raise TaskCodeError(problem)
