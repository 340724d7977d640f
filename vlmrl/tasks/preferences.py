"""Get the better and the worse answer to a problem from a task, checked.

task.preference ─▶ get_preference ─▶ Preference of plain messages
"""

from __future__ import annotations

from typing import Any

from vlmrl.errors import fenced
from vlmrl.tasks.base import HasPreferences, NoProblem, Preference, Problem, Task
from vlmrl.tasks.border import ANY_ROLE, TaskCodeError, checked_absence, checked_messages


class NoPreferencesError(TaskCodeError):
    """The task does not define `preference`; the text is that of its NotImplementedError."""


def preference_of(task: Task, problem: Any) -> Preference:
    """`task.preference`, unchecked. Raises NotImplementedError where the task does not define it."""
    if not isinstance(task, HasPreferences):
        raise NotImplementedError(
            f"{type(task).__name__} defines no preference(problem), so there are no pairs to learn from: define it, or "
            "set dpo.from_run=<folder of a run that recorded its rollouts>"
        )
    return task.preference(problem)


def get_preference(task: Task, problem: Problem) -> Preference:
    """`task.preference`, checked. Raises `NoPreferencesError` where the task does not define it, `NoProblem` where it
    does, and `TaskCodeError` for a value that the contract does not allow."""
    absent: NoProblem
    with fenced("preference()", TaskCodeError):
        try:
            return _checked(preference_of(task, problem))
        except NotImplementedError as error:
            raise NoPreferencesError(str(error) or "preference() raised NotImplementedError") from None
        except NoProblem as error:
            absent = checked_absence("preference()", error)
    raise absent


def _checked(pair: Preference) -> Preference:
    prompt = checked_messages("preference().prompt", pair.prompt, ANY_ROLE)
    (chosen,) = checked_messages("preference().chosen", (pair.chosen,), ("assistant",))
    (rejected,) = checked_messages("preference().rejected", (pair.rejected,), ("assistant",))
    if prompt[-1].role not in ("user", "tool"):
        raise TaskCodeError(
            f"preference().prompt ends with a message of role {prompt[-1].role}, so there is nothing to answer: end it "
            "with a user or tool message"
        )
    return Preference(prompt, chosen, rejected)
