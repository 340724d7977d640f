"""Make demonstrations, and find which of their answers are the policy's.

task.demonstration ─▶ get_demonstration ─▶ messages, and how many of them reset() gives
"""

from __future__ import annotations

import itertools

from vlmrl.errors import fenced
from vlmrl.tasks.base import NoProblem, Problem, Task
from vlmrl.tasks.border import ANY_ROLE, TaskCodeError, checked_absence, checked_messages
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.types import Message, Text


class NoDemonstrationsError(TaskCodeError):
    """The task does not define `demonstration`; the text is that of its NotImplementedError."""


def get_demonstration(
    task: Task, problem: Problem, *, random_answers: bool, seed: int
) -> tuple[tuple[Message, ...], int]:
    """`task.demonstration`, and how many of its messages the prompt already gives.

    Assistant messages in that part (few-shot examples) are not the policy's, so they are nothing to learn. Where there
    may be any, `reset` of a new env tells. Raises `NoDemonstrationsError` where the task does not define
    `demonstration`, and `NoProblem` where it does.
    """
    absent: NoProblem | None = None
    with fenced("demonstration()", TaskCodeError):
        try:
            messages = task.demonstration(problem, random_answers=random_answers, seed=seed)
        except NotImplementedError as error:
            raise NoDemonstrationsError(str(error) or "demonstration() raised NotImplementedError") from None
        except NoProblem as error:
            absent = checked_absence("demonstration()", error)
        else:
            messages = checked_messages("demonstration()", messages, ANY_ROLE)
    if absent is not None:
        raise absent
    roles = [message.role for message in messages]
    given = 0
    if roles[-1] != "assistant" or roles.count("assistant") > 1:
        with OpenEnv(task, problem) as env:
            given = _equal_messages(messages, finished(env.reset()))
    if "assistant" not in roles[given:]:
        raise TaskCodeError(
            "demonstration() has no answer, because no assistant message follows the messages of reset(), so there is "
            "nothing to learn: end it with an assistant message"
        )
    return messages, given


def _equal_messages(messages: tuple[Message, ...], prompt: tuple[Message, ...]) -> int:
    """How many messages at the start of two conversations are equal, apart from the pixels of their images."""

    def content(message: Message) -> tuple[object, ...]:
        return (message.role, *(part.text if isinstance(part, Text) else None for part in message.content))

    pairs = itertools.takewhile(lambda pair: content(pair[0]) == content(pair[1]), zip(messages, prompt, strict=False))
    return sum(1 for _ in pairs)
