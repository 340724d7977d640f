"""A task that goes wrong at random, in every place and way that is listed below, and writes each fault to a file of its
own: `injected/<number>.json` with what must be recorded of it.

Whatever is not in the tables is sound, also where it is odd: an id that is an `np.str_`, metric names that are a
`StrEnum`, a reward that is a fraction, and pictures that PIL opened once for all siblings.
"""

from __future__ import annotations

import asyncio
import decimal
import enum
import fractions
import itertools
import json
import math
import numbers
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vlmrl import Image, Message, Reply, Split, Task, Text
from vlmrl.errors import EngineLostError, UserFault
from vlmrl.types import ContractError

FIRST_DEMONSTRATION = 1 << 40


class Unspeakable(Exception):  # noqa: N818
    """Neither text can be made."""

    def __str__(self) -> str:
        return str(self.detail)  # type: ignore[attr-defined]

    __repr__ = __str__


class LeavingText(Exception):  # noqa: N818
    def __str__(self) -> str:
        sys.exit(0)


class Evil:
    """Whatever is done with it raises."""

    def _raise(self, *_: Any) -> Any:
        raise RuntimeError("do not touch \udcff")

    __getattr__ = __len__ = __iter__ = __eq__ = __float__ = __bool__ = __array__ = __str__ = __repr__ = _raise
    __hash__ = _raise


class EvilReal(Evil):
    """Passes for a number."""


numbers.Real.register(EvilReal)


class EvilTuple(tuple[Any, ...]):
    __slots__ = ()

    def __iter__(self) -> Any:
        raise SystemExit(0)


class EvilText(Text):
    @property
    def text(self) -> str:
        raise LeavingText

    def __init__(self) -> None: ...


def deep(n: int) -> int:
    return deep(n + 1) + 1


EXCEPTIONS: tuple[Callable[[], Any], ...] = (
    lambda: LookupError("no such row"),
    lambda: OSError("broken \udcff name"),
    lambda: SystemExit(0),
    KeyboardInterrupt,
    GeneratorExit,
    lambda: StopIteration(3),
    asyncio.CancelledError,
    MemoryError,
    Unspeakable,
    LeavingText,
    lambda: BaseExceptionGroup("two", [Unspeakable(), SystemExit(1)]),
    lambda: EngineLostError("so says the task"),
    lambda: ContractError("so says the task"),
    lambda: UserFault("so says the task"),
    lambda: AssertionError(),
    lambda: NotADirectoryError(20, "Not a directory", "a\0b"),
    lambda: ValueError("x" * 1_000_000),
)

IDS: tuple[Any, ...] = ("row \ud83d", 5, None, b"row", Evil())


def ask(*parts: Any) -> tuple[Message, ...]:
    return (Message("user", parts),)


MESSAGES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "list": lambda: [Message.of("user", "hi")],
    "empty": lambda: (),
    "evil": lambda: Evil(),
    "evil tuple": lambda: EvilTuple(ask(Text("hi"))),
    "Text(None)": lambda: ask(Text(None)),  # type: ignore[arg-type]
    "Text(5)": lambda: ask(Text(5)),  # type: ignore[arg-type]
    "Text(bytes)": lambda: ask(Text(b"hi")),  # type: ignore[arg-type]
    "Text(Evil)": lambda: ask(Text(Evil())),  # type: ignore[arg-type]
    "evil text": lambda: ask(EvilText()),
    "surrogate": lambda: ask(Text("half \ud83d")),
    "str part": lambda: ask("hi"),
    "part of another type": lambda: ask(Evil()),
    "content": lambda: (Message("user", "hi"),),  # type: ignore[arg-type]
    "role": lambda: (Message("robot", (Text("hi"),)),),  # type: ignore[arg-type]
    "evil role": lambda: (Message(Evil(), (Text("hi"),)),),  # type: ignore[arg-type]
}


def closed() -> PIL.Image.Image:
    picture = Path("closed.png")
    if not picture.exists():
        PIL.Image.new("RGB", (32, 32)).save(f"closed.{os.getpid()}.png")
        Path(f"closed.{os.getpid()}.png").replace(picture)
    with PIL.Image.open(picture) as image:
        return image


class ReadImage(Image):
    """Notes when it is read for the first time: an image is not shown at all after an answer that was cut."""

    def __init__(self, source: Any, note: Callable[[], None]) -> None:
        notes = iter([note])
        object.__setattr__(self, "_read", lambda: (next(notes, lambda: None)(), source)[1])

    @property
    def source(self) -> Any:
        return self._read()  # type: ignore[attr-defined]


IMAGES: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"GIF89a, or so it says",
    "nothing": lambda: None,
    "evil": lambda: Evil(),
    "missing": lambda: "no/such/file.png",
    "folder": lambda: ".",
    "device": lambda: "/dev/zero",
    "NUL": lambda: "a\0.png",
    "tilde": lambda: "~$x.png",
    "surrogate": lambda: "\udcff.png",
    "closed": closed,
    "float array": lambda: np.zeros((8, 8, 3)),
    "gray array": lambda: np.zeros((8, 8), np.uint8),
    "empty array": lambda: np.zeros((0, 8, 3), np.uint8),
    "truncated": lambda: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x20",
}

NO_NUMBERS: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, 10**400, 1e39, 1j, "1.0", None),
    *([1.0], decimal.Decimal(1), Evil(), EvilReal()),
)


class Measure(enum.StrEnum):
    LENGTH = "length"


class Row:
    """A problem; its id is read once."""

    def __init__(self, task: Fuzzed, split: Split, index: int, id: Any) -> None:
        self.task, self.split, self.index, self._id = task, split, index, id

    @property
    def id(self) -> Any:
        if isinstance(self._id, BaseException):
            raise self._id
        return self._id

    def sound(self) -> tuple[Message, ...]:
        picture: Any = np.full((32, 32, 3), self.index % 7, np.uint8)
        if self.index % 3 == 0:
            picture = self.task.pictures[self.index % len(self.task.pictures)]
        return (Message.of("user", "Say anything.", Image(picture)),)


class Attempt:
    """One env: every call may go wrong."""

    def __init__(self, row: Row) -> None:
        self.row, self.turn = row, 0

    def reset(self) -> Any:
        return self.row.task.messages(self.row, "reset", self.row.sound)

    def step(self, completion: str) -> Any:
        row, task = self.row, self.row.task
        self.turn += 1
        task.may_raise(row, "step")
        if found := task.draw(row, "reply", "task_error", (None, 5, Evil(), Reply(done="False"), Reply(done=1))):  # type: ignore[arg-type]
            return found[0]
        if found := task.draw(row, "reward", "bad_reward", NO_NUMBERS):
            name = task.random.choice(["turn_reward", "reward"])
            return Reply(**{"done": True, name: found[0]})
        if found := task.draw(row, "metric", "bad_reward", NO_NUMBERS):
            return Reply(done=True, metrics={task.random.choice(["reward", "turn_reward", "score"]): found[0]})
        if found := task.draw(row, "metric name", "bad_reward", ("half \ud83d", None, (1, 2), 3)):
            return Reply(done=True, metrics={found[0]: 1.0, "sound": 1.0})
        done = np.bool_(self.turn == 2)
        return Reply(
            turn_reward=fractions.Fraction(len(completion) % 4, 4),  # type: ignore[arg-type]
            reward=np.float32(len(completion) % 4 / 4),  # type: ignore[arg-type]
            done=done,  # type: ignore[arg-type]
            metrics={Measure.LENGTH: len(completion), np.str_("flag"): np.bool_(True)},  # type: ignore[dict-item]
            messages=() if done else task.messages(row, "step", lambda: (Message.of("user", "Again."),)),
        )


class Fuzzed(Task):
    """See the top of this file. `args.injected` is the folder of the files, `args.rate` the probability of a fault at
    each place, `args.siblings` the size of a group."""

    def __init__(self, config: Any, *, seed: int) -> None:
        self.folder = Path(config.args["injected"])
        self.folder.mkdir(exist_ok=True)
        self.rate: float = config.args["rate"]
        self.siblings: int = config.args["siblings"]
        self.random = random.Random(config.args["seed"])
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        for shade in range(3):
            PIL.Image.new("RGB", (32, 32), (shade, 9, 9)).save(self.folder / f"{shade}.png")
        self.pictures = [PIL.Image.open(self.folder / f"{shade}.png") for shade in range(3)]  # read when first used

    def draw(
        self, row: Row, place: str, stop_reason: str, choices: Any, times: int = 1, *, noted: bool = True
    ) -> tuple[Any] | None:
        """One of the choices; None if nothing goes wrong here. `noted`: and a file about it."""
        with self.lock:
            if self.random.random() >= self.rate:
                return None
            number = self.random.randrange(len(choices))
        if noted:
            self.note(row, place, stop_reason, times)
        return (choices[number],)

    def note(self, row: Row, place: str, stop_reason: str, times: int = 1) -> None:
        fault = {"split": row.split, "problem_index": row.index, "stop_reason": stop_reason}
        name = self.folder / f"{next(self.numbers):06d}.json"
        name.write_text(json.dumps({**fault, "place": place, "times": times}))

    def may_raise(self, row: Row, place: str, times: int = 1) -> None:
        if found := self.draw(row, place, "task_error", (*EXCEPTIONS, RecursionError), times):
            if found[0] is RecursionError:
                deep(0)
            raise found[0]()

    def messages(self, row: Row, place: str, sound: Callable[[], tuple[Message, ...]]) -> Any:
        """The messages of a call, in which the call, the messages or an image may go wrong."""
        self.may_raise(row, place)
        if found := self.draw(row, f"messages of {place}", "task_error", tuple(MESSAGES.values())):
            return found[0]()
        if found := self.draw(row, f"image of {place}", "image_error", tuple(IMAGES.values()), noted=False):
            image = ReadImage(found[0](), lambda: self.note(row, f"image of {place}", "image_error"))
            return (*sound()[:-1], Message.of("user", "Look: ", image, "!"))
        return sound()

    def problem(self, split: Split, index: int) -> Any:
        times = self.siblings if split == "train" else 2  # an evaluation plays it sampled and greedy
        times = times if index < FIRST_DEMONSTRATION else 1
        row = Row(self, split, index, np.str_(f"{split}/{index}"))
        self.may_raise(row, "problem", times)
        if found := self.draw(row, "id", "task_error", (*IDS, Unspeakable()), times):
            return Row(self, split, index, found[0])
        return row

    def env(self, problem: Row) -> Any:
        self.may_raise(problem, "env")
        return Attempt(problem)

    def demonstration(self, problem: Row, *, random_answers: bool, seed: int) -> Any:
        messages = self.messages(problem, "demonstration", problem.sound)
        if not isinstance(messages, tuple) or isinstance(messages, EvilTuple) or messages == ():
            return messages
        return (*messages, Message.of("assistant", f"anything {seed % 10}"))

    def texts(self) -> tuple[str, ...]:
        return ("Say anything. Again. Look: !",)
