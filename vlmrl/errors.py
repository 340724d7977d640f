"""The exceptions that vlmrl raises for its users, the exit code of the process for each, and the fence around the
user's code.

    VlmrlError                     exit 1: the run started and failed
    ├── ConfigError (ValueError)   exit 2: the config cannot run; the message names key, consequence and remedy
    ├── ModelError                 a model that cannot be loaded, built or matched to the config
    ├── TaskError                  a task that breaks its contract (see vlmrl.tasks)
    ├── TooManyFaultsError         the user's code or data fails so often that going on teaches nothing
    ├── BadRowsError               rows of the data cannot be used, and the config says that the run stops there
    ├── CheckpointError            a checkpoint that is corrupt or belongs to another run
    ├── EngineError                the inference engine failed
    │   └── EngineLostError        a request was lost because a server ended; its rollout is played again
    ├── RankError                  a rank of the trainer ended; the message says which and why
    ├── ParityError                mode=doctor and mode=replay: a comparison failed; the message names its lines
    ├── NonFiniteLossError         the loss or gradient is NaN or infinite; the message names the samples
    └── Interrupted                Ctrl-C or SIGTERM; a checkpoint is saved, the message says how to continue

The fence: wherever the user's code runs or the user's data is read, the caller enters `fenced`. Whatever is raised
inside becomes a `UserFault`, which costs one rollout (or one demonstration) and never the run: it becomes the rollout's
`stop_reason`, `error` and `traceback`, and is counted (`vlmrl.types.StopReason`).

    with fenced("step()"):
        reply = env.step(text)      # the user's code may raise anything, also while its error is put into words

Our own code stays outside, so that a bug of vlmrl (an `assert`) ends the run with its traceback.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback as tracebacks
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class VlmrlError(Exception):
    """Base class of every error that vlmrl raises for its users."""

    exit_code = 1


class ConfigError(VlmrlError, ValueError):
    """The config cannot run. The message says `key=value`, the consequence, and what to set instead."""

    exit_code = 2


class ModelError(VlmrlError):
    """A model cannot be loaded, built, or matched to the config."""


class TaskError(VlmrlError):
    """A task breaks the contract of `vlmrl.tasks.base` in every rollout, not just in one."""


class TooManyFaultsError(VlmrlError):
    """The user's code or data failed in every rollout for some steps, or in more rollouts than `task.max_fault_rate`.
    The message has the most frequent reason and the command that lists the faults."""


class BadRowsError(VlmrlError):
    """Rows of the data cannot be used: one with `task.bad_rows=fail`, more than `task.max_bad_row_rate`, or every row
    of a split. The message has the most frequent reason."""


class CheckpointError(VlmrlError):
    """A checkpoint is corrupt or incomplete, or belongs to a run with another config."""


class EngineError(VlmrlError):
    """The inference engine failed. Where only one request failed, the rollout records the error and the run goes on."""


class EngineLostError(EngineError):
    """A request was lost because a server of the run ended. That is no fault of the user, so the rollout is played
    again and counted apart from faults."""


class RankError(VlmrlError):
    """A rank of the trainer ended, so the others cannot continue. The message names the rank and its host, and quotes
    its last output."""


class ParityError(VlmrlError):
    """Engine and trainer differ (mode=doctor), or a recorded batch cannot be reproduced (mode=replay). The message
    names the lines of the table that failed."""


class NonFiniteLossError(VlmrlError):
    """The loss or the gradient norm is not finite. The message lists the samples of the batch."""


class Interrupted(VlmrlError):  # noqa: N818 — not an error: the run was told to stop
    """The run stopped on request. The message says where its checkpoint is and how to continue."""


# ── the fence around the user's code and data ───────────────────────────────────────────────────────────────

LONGEST_TEXT = 10_000
"""Characters of an error's text; of a longer one the middle is left out."""

LONGEST_TRACEBACK = 20_000
"""Characters of a traceback; of a longer one (deep recursion) the middle is left out."""


class UserFault(Exception):  # noqa: N818 — a fault of the user's code or data, not an error of vlmrl
    """User code or user data failed. Costs one rollout (or one demonstration), never the run."""

    text: str = ""
    """What failed, in UTF-8 that can be written to any file."""
    traceback: str | None = None
    """The formatted traceback of the original exception; None where the user's code returned something wrong."""

    def __init__(self, text: str, traceback: str | None = None) -> None:
        super().__init__(text)
        self.text = safe_text(text)
        self.traceback = traceback


@contextmanager
def fenced(doing: str, fault: type[UserFault] = UserFault) -> Iterator[None]:
    """Turn whatever the block raises into `fault`, whose text begins with `doing`. The user's code may raise anything,
    also SystemExit. A `UserFault` passes unchanged, so the innermost fence names the cause.

    Ctrl-C and the cancellation of the event loop's own task are not the user's, and pass.

    >>> with fenced("step()"):
    ...     {}["colour"]
    Traceback (most recent call last):
    vlmrl.errors.UserFault: step() raised KeyError: 'colour' (<doctest vlmrl.errors.fenced[0]>:2, in <module>)
    """
    try:
        yield
    except UserFault:
        raise
    except BaseException as error:
        if _is_not_the_users(error):
            raise
        # Without the original as context: it would keep the frames of the user's code alive, and its text may raise.
        raise fault(f"{doing} raised {describe(error)}", _format_traceback(error, _inside(error))) from None


def describe(error: BaseException) -> str:
    """The type, the words and the place of an error. Never raises, whatever `__str__` does.

    >>> describe(ValueError("no such row"))
    'ValueError: no such row'
    """
    return headline(error) + _made_text(lambda: _place(error), error)


def headline(error: BaseException) -> str:
    """The type and the words of an error, without its place. Never raises, whatever `__str__` does.

    >>> headline(KeyError("colour"))
    "KeyError: 'colour'"
    """
    name = _made_text(lambda: type(error).__name__, error)
    return _shortened(": ".join(filter(None, (name, safe_text(error)))), LONGEST_TEXT)


def format_error(error: BaseException) -> str:
    """The traceback of an error as Python prints it, shortened: its words may quote a whole batch. Never raises."""
    return _format_traceback(error, error.__traceback__)


def safe_text(value: object) -> str:
    """The text of any value of the user's, for records and messages. Never raises, and can always be encoded: a lone
    surrogate is written as its escape. A str subclass counts as the plain string that it holds.

    >>> safe_text("a" + chr(0xD83D)), safe_text(5)
    ('a\\\\ud83d', '5')
    """
    return _made_text(lambda: str.__str__(value) if isinstance(value, str) else str(value), value)


def safe_repr(value: object) -> str:
    """`repr(value)`, as safe as `safe_text`, to quote a value in a message.

    >>> safe_repr("a"), safe_repr(1.5)
    ("'a'", '1.5')
    """
    return _shortened(_made_text(lambda: repr(value), value), LONGEST_TEXT)


def _made_text(make: Callable[[], str], value: object) -> str:
    try:
        return _encodable(make())
    except BaseException:  # noqa: BLE001 — the user's `__str__` may raise anything
        name = object.__repr__(value).partition(" object at ")[0].lstrip("<")
        return f"<a {_encodable(name)} without a text>"


def _encodable(text: str) -> str:
    """`text` with escapes for lone surrogates. `str.__str__` makes a plain string of a subclass, whose own methods may
    be the user's code as well."""
    return str.__str__(text).encode("utf-8", "backslashreplace").decode()


def _place(error: BaseException) -> str:
    """` (file:line, in function)` of the innermost frame; empty without a traceback. Reads no source file."""
    frame, line = None, 0
    step = error.__traceback__
    while step is not None:
        frame, line, step = step.tb_frame, step.tb_lineno, step.tb_next
    return "" if frame is None else f" ({frame.f_code.co_filename}:{line}, in {frame.f_code.co_name})"


def _inside(error: BaseException) -> TracebackType | None:
    """The traceback without the frame of `fenced` itself."""
    return error.__traceback__ and error.__traceback__.tb_next


def _format_traceback(error: BaseException, outermost: TracebackType | None) -> str:
    made = _made_text(lambda: "".join(tracebacks.format_exception(type(error), error, outermost)), error)
    return _shortened(made, LONGEST_TRACEBACK)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"


def _is_not_the_users(error: BaseException) -> bool:
    """Whether the event loop cancelled its own task, or the person at the keyboard pressed Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
    asyncio = sys.modules.get("asyncio")  # importing it here would slow down `--help`
    if asyncio is None or not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread, so the user's code raised it
        return False
    return task is not None and task.cancelling() > 0
