"""A task whose envs write down each time one of them is opened and closed, in every kind of episode.

The index of a problem says what its envs do (`KINDS`). The record is a folder with one file per event, so it also
counts the envs of worker processes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl import Image, Message, Reply, StepInfo, Task

KINDS = (
    "done",
    "cut",
    "full",
    "max_turns",
    "raises",
    "raises in reset",
    "bad reward",
    "bad image",
    "async",
    "async raises",
)
"""What an env does, by the index of its problem. The kinds that hang or end the process are asked for by name."""

TURNS = 2


@dataclass(frozen=True)
class Kind:
    """A problem."""

    id: str


class Counted:
    """An env that plays `TURNS` turns, or what its kind says."""

    number = itertools.count()

    def __init__(self, kind: str, events: Path) -> None:
        self.kind, self.events = kind, events
        self.name = f"{kind}-{os.getpid()}-{next(self.number)}"
        self.infos: list[StepInfo] = []
        self.note("opened")

    def note(self, event: str) -> None:
        number = len(list(self.events.glob(f"{event} {self.name}*")))
        (self.events / f"{event} {self.name} {number}").touch()

    def reset(self) -> Any:
        if self.kind == "raises in reset":
            raise KeyError("reset")
        if self.kind == "slow in reset":
            time.sleep(0.5)
        if self.kind == "hangs in reset":
            threading.Event().wait()
        return (Message.of("user", self.kind, self.frame(0)),)

    def frame(self, turn: int) -> Image:
        return Image(np.full((4, 4, 3), turn, np.uint8))

    def step(self, completion: str, info: StepInfo) -> Any:
        self.infos.append(info)
        turn = info.turn
        if self.kind == "raises":
            raise KeyError("step")
        if self.kind == "exits":
            os._exit(7)
        if self.kind == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.kind == "hangs":
            threading.Event().wait()
        if self.kind == "slow":
            self.note("stepping")
            time.sleep(0.5)
        if self.kind == "bad reward":
            return Reply(done=True, reward=float("nan"))
        image = Image(np.zeros((4, 4), np.uint8)) if self.kind == "bad image" else self.frame(turn)
        done = turn == TURNS and self.kind != "max_turns"
        text = "and now?" * (9 if self.kind == "full" else 1)
        return Reply(done=done, reward=1.0, messages=() if done else (Message.of("user", text, image),))

    def close(self) -> None:
        self.note("closed")


class AsyncCounted(Counted):
    """The same with coroutines."""

    async def reset(self) -> Any:
        await asyncio.sleep(0)
        return super().reset()

    async def step(self, completion: str, info: StepInfo) -> Any:
        await asyncio.sleep(0)
        if self.kind == "async raises":
            raise KeyError("step")
        if self.kind == "async hangs":
            await asyncio.get_running_loop().create_future()
        return super().step(completion, info)

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().close()


class CountedTask(Task):
    """Problem n is of the kind `kinds[n]`."""

    def __init__(self, config: Any, *, seed: int) -> None:
        self.events = Path(config.args["events"])
        self.kinds: tuple[str, ...] = tuple(config.args.get("kinds", KINDS))

    def problem(self, split: str, index: int) -> Kind:
        return Kind(self.kinds[index % len(self.kinds)])

    def env(self, problem: Kind) -> Counted:
        return (AsyncCounted if problem.id.startswith("async") else Counted)(problem.id, self.events)

    def texts(self) -> tuple[str, ...]:
        return ("and now?", *KINDS)

    def demonstration(self, problem: Kind, *, random_answers: bool, seed: int) -> Any:
        raise NotImplementedError("it has no answers")


def counts(events: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each env was opened and closed."""
    found: dict[str, Counter[str]] = {"opened": Counter(), "closed": Counter()}
    for path in events.iterdir():
        event, _, rest = path.name.partition(" ")
        if event in found:
            found[event][rest.rpartition(" ")[0]] += 1
    return found["opened"], found["closed"]
