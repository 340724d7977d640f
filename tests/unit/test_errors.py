"""The fence around the user's code: whatever is raised inside becomes a `UserFault` whose text can be written down."""

from __future__ import annotations

import asyncio
import enum
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest

from vlmrl.errors import (
    LONGEST_TEXT,
    LONGEST_TRACEBACK,
    EngineError,
    EngineLostError,
    TooManyFaultsError,
    UserFault,
    VlmrlError,
    describe,
    fenced,
    safe_repr,
    safe_text,
)


class Wordless(Exception):  # noqa: N818
    """Both of its texts need an attribute that nobody set."""

    def __str__(self) -> str:
        return str(self.detail)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return str(self.detail)  # type: ignore[attr-defined]


class Leaving(Exception):  # noqa: N818
    def __str__(self) -> str:
        sys.exit(0)


class NotText(Exception):  # noqa: N818
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Sly(str):
    """A string whose own methods raise."""

    def encode(self, *_: Any) -> bytes:
        raise RuntimeError("encode")

    def __str__(self) -> str:
        raise RuntimeError("str")

    def __format__(self, spec: str) -> str:
        raise RuntimeError("format")

    __repr__ = __str__


class SlyText(Exception):  # noqa: N818
    def __str__(self) -> str:
        return Sly("sly")


class Evil(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("name")


class Nameless(Exception, metaclass=Evil):  # noqa: N818
    pass


class Colour(enum.StrEnum):
    RED = "red"


class Shade(str, enum.Enum):  # noqa: UP042 — its str() is "Shade.DARK", unlike that of a StrEnum
    DARK = "dark"


RAISED: list[tuple[BaseException, str]] = [
    (ValueError("no row"), "ValueError: no row"),
    (KeyError("row"), "KeyError: 'row'"),
    (AssertionError(), "AssertionError"),
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (StopIteration("end"), "StopIteration: end"),
    (StopAsyncIteration(), "StopAsyncIteration"),
    (asyncio.CancelledError(), "CancelledError"),
    (MemoryError(), "MemoryError"),
    (BaseExceptionGroup("two", [SystemExit(1), ValueError()]), "BaseExceptionGroup: two (2 sub-exceptions)"),
    (OSError("broken \ud83d"), "OSError: broken \\ud83d"),
    (EngineError("raised by a task"), "EngineError: raised by a task"),
    (Wordless(), f"Wordless: <a {__name__}.Wordless without a text>"),
    (Leaving(), f"Leaving: <a {__name__}.Leaving without a text>"),
    (NotText(), f"NotText: <a {__name__}.NotText without a text>"),
    (SlyText(), "SlyText: sly"),
]


def raise_it(error: BaseException) -> None:
    raise error


def in_thread(work: Callable[[], Any]) -> Any:
    """The worker threads of a run are never the main thread, where Ctrl-C arrives."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize(
    ("error", "words"), RAISED, ids=[type.__repr__(type(e)).encode("ascii", "replace").decode() for e, _ in RAISED]
)
def test_whatever_is_raised_becomes_a_fault_with_words_and_a_traceback(error: BaseException, words: str) -> None:
    def play() -> UserFault:
        with pytest.raises(UserFault) as caught, fenced("step()"):
            raise_it(error)
        return caught.value

    fault = in_thread(play)
    assert fault.text.startswith(f"step() raised {words} (")
    assert fault.text.endswith(", in raise_it)")
    assert fault.traceback is not None
    assert "raise error" in fault.traceback or "without a text" in fault.traceback
    assert "in fenced" not in fault.traceback
    orjson.dumps([fault.text, fault.traceback, str(fault)])  # can be written


def test_a_fault_passes_unchanged_and_keeps_the_first_cause() -> None:
    class OtherFault(UserFault):
        pass

    with pytest.raises(OtherFault, match=r"^reset\(\) raised ValueError: x") as caught:  # noqa: SIM117
        with fenced("play"), fenced("reset()", OtherFault):
            raise ValueError("x")
    assert caught.value.__suppress_context__, "the original error would be printed, and its text may raise"
    with pytest.raises(UserFault) as same, fenced("play", OtherFault):
        raise UserFault("wrong type")
    assert (type(same.value), same.value.text, same.value.traceback) == (UserFault, "wrong type", None)


def test_a_fault_that_forgets_to_call_its_base_class_has_a_text() -> None:
    class Careless(UserFault):
        def __init__(self) -> None: ...

    assert (Careless().text, Careless().traceback) == ("", None)


def test_long_texts_and_deep_tracebacks_are_shortened() -> None:
    def deep(n: int) -> int:
        return deeper(n) + 1

    def deeper(n: int) -> int:
        return deep(n + 1) + 1

    with pytest.raises(UserFault) as recursion, fenced("step()"):
        deep(0)
    assert recursion.value.traceback is not None
    assert len(recursion.value.traceback) < LONGEST_TRACEBACK + 100
    with pytest.raises(UserFault) as long, fenced("step()"):
        raise ValueError("x" * 10_000_000)
    assert len(long.value.text) < LONGEST_TEXT + 200
    assert len(safe_repr("x" * 10_000_000)) < LONGEST_TEXT + 200


def test_the_event_loop_may_cancel_its_own_task_inside_the_fence() -> None:
    async def rendering() -> None:
        with fenced("rendering"):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(rendering())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

        async def raises_it_itself() -> None:
            with fenced("rendering"):
                raise asyncio.CancelledError

        with pytest.raises(UserFault, match="CancelledError"):
            await asyncio.create_task(raises_it_itself())

    asyncio.run(main())


def test_only_a_real_ctrl_c_passes() -> None:
    assert threading.current_thread() is threading.main_thread()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), fenced("demonstration()"):
        raise KeyboardInterrupt
    # A run handles the signal itself, so no KeyboardInterrupt is Python's.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with pytest.raises(UserFault), fenced("demonstration()"):
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\ud83d", "a\\ud83d"),
        (Colour.RED, "red"),
        (Shade.DARK, "dark"),
        (np.str_("name"), "name"),
        (Sly("sly"), "sly"),
        (5, "5"),
        (None, "None"),
        (b"\xff", "b'\\xff'"),
        (np.arange(3), "[0 1 2]"),
        (Wordless(), f"<a {__name__}.Wordless without a text>"),
        (type("Odd", (Wordless,), {"__module__": "m\ud83d"})(), "<a m\\ud83d.Odd without a text>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_text_of_any_value_is_a_plain_string_that_can_be_written(value: object, text: str) -> None:
    assert safe_text(value) == text
    assert type(safe_text(value)) is str
    assert type(safe_repr(value)) is str
    orjson.dumps([safe_text(value), safe_repr(value)])


def test_an_error_that_was_never_raised_has_no_place() -> None:
    assert describe(ValueError("x")) == "ValueError: x"
    nameless = describe(Nameless("x"))  # pytest itself cannot show one
    assert nameless == f"<a {__name__}.Nameless without a text>: x"
    assert describe(Wordless()) == f"Wordless: <a {__name__}.Wordless without a text>"


def test_the_place_in_the_tree() -> None:
    assert issubclass(EngineLostError, EngineError)
    assert issubclass(TooManyFaultsError, VlmrlError)
    assert TooManyFaultsError.exit_code == 1
    assert not issubclass(UserFault, VlmrlError), "a fault of the user's must never be taken for the end of the run"
