"""Tasks as a user writes them; a copy lies in the folder in which the tests run commands.

Sound           answers are scored by their length, so that siblings differ
SomeFaults      one problem in six is sound, each of the others goes wrong in its own way
BadDemonstrations   one demonstration in four is sound
AllFaults       every rollout raises
AllTooLong      no first prompt fits
EqualRewards    there is nothing to learn from
Constant        every rollout has the reward `args.score`
Poison          rewards that are finite, in a loss that is not
LateImages      problems from `args.first_image` on show an image, the ones before it only text
Noise           a sound task whose pictures are noise, which takes much room on the disk
Table           40 rows: bad ones, held-out ones, and solved, hopeless and learnable ones
Gated           color_codeword, but a problem can be held until a test lets it go
Blindfolded     color_codeword with every pixel zeroed, and an answer that needs none: it is always the same
"""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmrl import BadRow, Image, Message, NotInSplit, Reply, Split, Task, Text
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.orchestrator.supervised import FIRST_PROBLEM
from vlmrl.tasks.color_codeword import CodewordProblem, ColorCodeword, ColorCodewordEnv

KINDS = ("sound", "no_image", "raises", "nan", "too_long", "equal")


@dataclass(frozen=True)
class Row:
    """A dataset row."""

    split: str
    index: int
    kind: str

    @property
    def id(self) -> str:
        return f"{self.split}/{self.index}/{self.kind}"


class Say:
    """An env with one turn about one image."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def reset(self) -> tuple[Message, ...]:
        image: Any = np.full((32, 32, 3), self.row.index % 256, np.uint8)
        if self.row.kind == "no_image":
            image = b"GIF89a, or so it says"
        if self.row.kind == "noise":
            image = np.random.default_rng([self.row.index, self.row.split == "eval"]).integers(
                0, 256, (256, 256, 3), np.uint8
            )
        if self.row.kind == "text":
            return (Message.of("user", f"Say anything. {self.row.index}"),)
        text = "Say anything." * (500 if self.row.kind == "too_long" else 1)
        return (Message.of("user", text, Image(image)),)

    def step(self, completion: str) -> Reply:
        if self.row.kind == "raises":
            raise LookupError(f"no score for problem {self.row.index}")
        reward = {"nan": math.nan, "equal": 0.5, "poison": 3e38 * (-1) ** len(completion)}
        score = reward.get(self.row.kind, len(completion) % 4 / 4)
        return Reply(turn_reward=score, reward=score, done=True, metrics={"length": len(completion)})


class Sound(Task):
    """A minimal task."""

    kinds: ClassVar[tuple[str, ...]] = ("sound",)

    def __init__(self, config: Any, *, seed: int) -> None:
        self.shift = config.args.get("shift", 0)

    def problem(self, split: Split, index: int) -> Row:
        return Row(split, index + self.shift, self.kinds[index % len(self.kinds)])

    def env(self, problem: Row) -> Say:
        return Say(problem)

    def demonstration(self, problem: Row, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        sound = dataclasses.replace(problem, kind="sound")
        return (*Say(sound).reset(), Message.of("assistant", f"anything {seed % 10}"))

    def texts(self) -> tuple[str, ...]:
        return ("Say anything.",)


class Noise(Sound):
    kinds = ("noise",)


class SomeFaults(Sound):
    kinds = KINDS


class BadDemonstrations(Sound):
    """One demonstration in four is sound; `args.repaired` makes all of them so."""

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.repaired = config.args.get("repaired", False)

    def demonstration(self, problem: Row, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        sound = super().demonstration(problem, random_answers=random_answers, seed=seed)
        match problem.index % 4 * (not self.repaired):
            case 1:
                raise LookupError(f"no answer to {problem.index}")
            case 2:
                return sound[:-1]
            case 3:
                return (*sound[:-1], Message.of("assistant", "anything " * 2000))
        return sound


class AllFaults(Sound):
    kinds = ("raises",)


class AllTooLong(Sound):
    kinds = ("too_long",)


class EqualRewards(Sound):
    kinds = ("equal",)


class Constant(Sound):
    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.score: float = config.args["score"]

    def env(self, problem: Row) -> Say:
        env = Say(problem)
        env.step = lambda completion: Reply(done=True, reward=self.score)  # type: ignore[method-assign]
        return env


class Poison(Sound):
    kinds = ("poison",)


class LateImages(Sound):
    """The first problems of RL and of supervised steps show no image."""

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.first_image: int = config.args["first_image"]

    def problem(self, split: Split, index: int) -> Row:
        return Row(split, index, "sound" if index % FIRST_PROBLEM >= self.first_image else "text")

    def demonstration(self, problem: Row, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return (*Say(problem).reset(), Message.of("assistant", f"anything {seed % 10}"))


class Table(Sound):
    """A pass is 40 rows: rows 9, 19, … are held out, rows 3, 13, … are bad, and rows 5, 15, … are too long."""

    def num_rows(self, split: Split) -> int:
        return 40

    def problem(self, split: Split, index: int) -> Row:
        row = index % 40
        if (row % 10 == 9) != (split == "eval"):
            raise NotInSplit
        if row % 10 == 3:
            raise BadRow("the answer is empty", source="table.csv", row=row)
        return Row("table", row, "too_long" if row % 10 == 5 else ("solved", "hopeless", "learnable")[row % 3])

    def env(self, problem: Row) -> Any:
        return Rated(problem)


class Rated(Say):
    """Scores by the kind of the row."""

    def step(self, completion: str) -> Reply:
        known = {"solved": 1.0, "hopeless": 0.0}
        return Reply(done=True, reward=known.get(self.row.kind, float(len(completion) % 2)))


class Gated(ColorCodeword):
    """color_codeword that stops at training problem `args.hold`, or in the `args.hold_round`-th round of held-out
    problems: it writes the file `reached` in the folder `args.gate` and waits until the file `open` appears there. It
    scores no answer to an RL problem before (a later step's problems are made ahead), and makes no supervised one."""

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(ColorCodewordConfig(max_turns=config.max_turns), seed=seed)
        self.hold: int = config.args.get("hold", -1)
        self.hold_round: int = config.args.get("hold_round", -1)
        self.rounds = 0
        self.first = self.held = ""
        self.gate = Path(config.args.get("gate", "."))

    def problem(self, split: Split, index: int) -> CodewordProblem:
        is_held = split == "train" and index == self.hold
        if is_held and index >= FIRST_PROBLEM:
            self.wait()
        problem = super().problem(split, index)
        if is_held:
            self.held = problem.id
        if split == "eval" and index == 0:
            self.first = problem.id
        return problem

    def env(self, problem: CodewordProblem) -> Any:
        if problem.id == self.first:
            self.rounds += 1
            if self.rounds == self.hold_round:
                self.wait()
        env = super().env(problem)
        return Held(env, self.wait) if problem.id == self.held else env

    def wait(self) -> None:
        (self.gate / "reached").touch()
        while not (self.gate / "open").exists():
            time.sleep(0.01)


class Held:
    """An env that waits before it scores an answer."""

    def __init__(self, env: ColorCodewordEnv, wait: Callable[[], None]) -> None:
        self.env, self.wait = env, wait
        self.reset = env.reset

    def step(self, completion: str) -> Reply:
        self.wait()
        return self.env.step(completion)


class Blindfolded(ColorCodeword):
    """The reward rises because the answer can be guessed; the images are black."""

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(ColorCodewordConfig(max_turns=config.max_turns, images_per_turn=1), seed=seed)

    def problem(self, split: Split, index: int) -> CodewordProblem:
        return dataclasses.replace(super().problem(split, index), codeword="C")

    def env(self, problem: CodewordProblem) -> Any:
        return Blindfold(super().env(problem))


class Blindfold:
    """An env whose images are all black."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self) -> tuple[Message, ...]:
        return tuple(Message(message.role, tuple(map(self.zeroed, message.content))) for message in self.env.reset())

    def step(self, completion: str) -> Reply:
        reply: Reply = self.env.step(completion)
        return reply

    @staticmethod
    def zeroed(part: Text | Image) -> Text | Image:
        return Image(np.zeros_like(np.asarray(part.source))) if isinstance(part, Image) else part


def sometimes(attempt: Any) -> float | None:
    """A reward term that abstains for every third problem, and scores all siblings of another one equally."""
    kind = zlib.crc32(attempt.problem_id.encode()) % 3
    return None if kind == 0 else kind / 2


def by_length(attempt: Any) -> float:
    """A reward term that differs with any change of the policy."""
    return len(attempt.completion) % 7 / 7
