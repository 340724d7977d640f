"""The contract check. `Counting` keeps every rule; each of its children breaks one, and that one is reported."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

import vlmrl
from vlmrl import BadRow, Env, Image, Message, NotInSplit, Reply, Split, StepInfo, Task, Text, Video
from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.check import check_task, command, find, print_findings
from vlmrl.tasks.color_codeword import ColorCodeword
from vlmrl.tasks.contract.rules import RULES

MAX_TURNS = 2
NO_CONFIG: Any = None


@dataclass
class Dots:
    """A question in two turns: how many dots are there, and how many with one more?"""

    id: str
    count: int


class CountingEnv:
    def __init__(self, problem: Dots) -> None:
        self.count = problem.count
        self.turn = 0

    def picture(self) -> Any:
        pixels = np.zeros((8, 64, 3), np.uint8)
        pixels[4, 2 * np.arange(self.count % 32)] = 255
        pixels[0, :, 2] = self.count
        return pixels

    def reset(self) -> tuple[Message, ...]:
        return Message.of("system", "Count."), Message.of("user", Image(self.picture()), "How many?")

    def step(self, completion: str) -> Reply:
        right = float(completion == str(self.count + self.turn))
        self.turn += 1
        if self.turn == MAX_TURNS:
            return Reply(right, done=True, reward=right, metrics={"right": right})
        return Reply(right, done=False, messages=(Message.of("user", "And one more?"),))


class Counting(Task):
    def __init__(self, config: object = NO_CONFIG, *, seed: int = 0) -> None:
        self.seed = seed

    def problem(self, split: Split, index: int) -> Dots:
        count = random.Random(f"{self.seed} {split} {index}").randrange(100) + (0 if split == "train" else 100)
        return Dots(str(count), count)

    def env(self, problem: Dots) -> Env:
        return CountingEnv(problem)

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        first = random.Random(seed).randrange(100) if random_answers else problem.count
        return (
            *CountingEnv(problem).reset(),
            Message.of("assistant", str(first)),
            Message.of("user", "And one more?"),
            Message.of("assistant", str(first + 1)),
        )

    def texts(self) -> tuple[str, ...]:
        return "Count.", "How many?", "And one more?"


# ── tasks that keep the contract ────────────────────────────────────────────────────────────────────────────


class Silent(Counting):
    """No demonstrations: allowed, for a task that is never warmed up."""

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError


class ForgetfulEnv(CountingEnv):
    def step(self, completion: str) -> Reply:
        reply = super().step(completion)
        return reply if reply.done else Reply(history=(*self.reset()[:1], Message.of("user", "And one more dot?")))


class Forgetful(Counting):
    """The second turn takes the place of the first. A demonstration shows one of the two."""

    def env(self, problem: Dots) -> Env:
        return ForgetfulEnv(problem)

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        drawn = random.Random(seed)
        answer = Message.of("assistant", str(drawn.randrange(100) if random_answers else problem.count))
        prompt = CountingEnv(problem).reset()
        second = Message.of("user", "And one more dot?")
        return (prompt[0], prompt[1] if drawn.random() < 0.5 else second, answer)


class AwaitedEnv:
    """All that an env may do: its methods are `async`, `step` takes an info, and it is closed."""

    def __init__(self, problem: Dots, closed: list[int]) -> None:
        self.env, self.closed = CountingEnv(problem), closed

    async def reset(self) -> tuple[Message, ...]:
        await asyncio.sleep(0)
        return self.env.reset()

    async def step(self, completion: str, info: StepInfo) -> Reply:
        assert info == StepInfo(self.env.turn + 1, len(completion), is_cut=False)
        return self.env.step(completion)

    async def close(self) -> None:
        self.closed[-1] += 1


class AwaitedTask(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.closed: list[int] = []

    def env(self, problem: Dots) -> Any:
        self.closed.append(0)
        return AwaitedEnv(problem, self.closed)


def test_envs_may_be_async_take_an_info_and_are_closed() -> None:
    task = AwaitedTask()
    assert check_task(task, max_turns=MAX_TURNS) == []
    assert set(task.closed) == {1}


class OtherImages(Counting):
    """The same squares as PIL image, bytes and path."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def env(self, problem: Dots) -> Env:
        image = PILImage.fromarray(CountingEnv(problem).picture())
        file = io.BytesIO()
        image.save(file, "PNG")
        path = self.folder / f"{problem.id}.png"
        path.write_bytes(file.getvalue())
        return WithParts(problem, (Image(image), Image(file.getvalue()), Image(path), Image(str(path)), Text("?")))

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        rest = super().demonstration(problem, random_answers=random_answers, seed=seed)[2:]
        return (*self.env(problem).reset(), *rest)


class WithParts(CountingEnv):
    def __init__(self, problem: Dots, parts: Any) -> None:
        super().__init__(problem)
        self.parts = parts

    def reset(self) -> tuple[Message, ...]:
        return (Message("user", self.parts),)


class FewShot(Counting):
    """An assistant message in the prompt does not count as an answer of the demonstration."""

    shots = (Message.of("user", "How many?"), Message.of("assistant", "3"))

    def env(self, problem: Dots) -> Env:
        env = CountingEnv(problem)
        prompt = (*self.shots, *env.reset())
        env.reset = lambda: prompt  # type: ignore[method-assign]
        return env

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self.shots + super().demonstration(problem, random_answers=random_answers, seed=seed)


class OneFrameBuffer(Counting):
    """Each env draws all its frames into one array."""

    def env(self, problem: Dots) -> Env:
        frame = CountingEnv(problem).picture()

        class Drawing(CountingEnv):
            def reset(self) -> tuple[Message, ...]:
                return Message.of("system", "Count."), Message.of("user", Image(frame), "How many?")

            def step(self, completion: str) -> Reply:
                frame[4:6] ^= 255
                return super().step(completion)

        return Drawing(problem)


class WithBadRows(Counting):
    """Every second index has no problem, and every fourth problem no demonstration."""

    def num_rows(self, split: Split) -> int:
        return 1000

    def problem(self, split: Split, index: int) -> Dots:
        if index % 4 == 0:
            raise NotInSplit("hash")
        if index % 4 == 2:
            raise BadRow("no answer", source="rows.csv", row=index)
        return super().problem(split, index)

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        if problem.count % 4 == 0:
            raise BadRow("no solution")
        return super().demonstration(problem, random_answers=random_answers, seed=seed)


def test_tasks_that_keep_the_contract_have_no_violations(tmp_path: Path) -> None:
    for task in (Counting(), Silent(), OtherImages(tmp_path), FewShot(), OneFrameBuffer(), WithBadRows(), Forgetful()):
        assert check_task(task, max_turns=MAX_TURNS) == []
        assert check_task(task, problems=1) == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_turns": 1, "images_per_turn": 1},
        {"max_turns": 1, "images_per_turn": 2},
        {"max_turns": 2, "images_per_turn": 1, "image_size": 64},
        {"max_turns": 4, "images_per_turn": 2},
        {"shuffle_images": True},
        {"max_turns": 1, "images_per_turn": 1, "shuffle_images": True},
        {"holdout_one_in": 1000},
    ],
)
def test_color_codeword_keeps_the_contract(settings: dict[str, Any]) -> None:
    config = ColorCodewordConfig(**settings)
    assert check_task(ColorCodeword(config, seed=3), max_turns=config.max_turns) == []


class OnlyRandom(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        if not random_answers:
            raise NotImplementedError("nobody knows")
        return super().demonstration(problem, random_answers=True, seed=seed)


class OnlyCorrect(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        if random_answers:
            raise NotImplementedError("no format")
        return super().demonstration(problem, random_answers=False, seed=seed)


class WithoutTexts(Task):
    """`texts` is for a tokenizer that is made here."""

    def __init__(self) -> None:
        self.seed = 0

    problem, env, demonstration = Counting.problem, Counting.env, Counting.demonstration


def test_what_a_task_leaves_out_is_not_held_against_it() -> None:
    unchecked = {
        task: {f.rule: f.text for f in find(task(), 1, MAX_TURNS) if f.status != "ok"}
        for task in (OnlyRandom, OnlyCorrect, WithoutTexts)
    }
    assert unchecked[OnlyRandom] == {}, "a warm-up uses random answers"
    assert list(unchecked[OnlyCorrect]) == ["random_demonstrations"]
    assert "trainer.warmup.demonstrations=correct" in unchecked[OnlyCorrect]["random_demonstrations"]
    assert list(unchecked[WithoutTexts]) == ["texts"]
    assert "only a model whose tokenizer is made here" in unchecked[WithoutTexts]["texts"]


def test_a_task_without_demonstrations_has_their_rules_not_checked() -> None:
    unchecked = [finding.rule for finding in find(Silent(), 1, MAX_TURNS) if finding.status == "--"]
    assert unchecked == ["demonstrations", "random_demonstrations"]


# ── tasks that break one rule ───────────────────────────────────────────────────────────────────────────────


class WithoutProblemMethod:
    """Not derived from Task, and one method short."""

    env, demonstration, texts = Counting.env, Counting.demonstration, Counting.texts
    seed = 0


class InheritedEnv(Task):
    """The inherited empty method would return None."""

    def __init__(self) -> None:
        self.seed = 0

    problem, demonstration, texts = Counting.problem, Counting.demonstration, Counting.texts


class NoId(Counting):
    def problem(self, split: Split, index: int) -> Any:
        return object()


class FiniteWithoutWrapping(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        return super().problem(split, range(1000)[index])


class NoUsableRow(WithBadRows):
    def problem(self, split: Split, index: int) -> Dots:
        return super().problem(split, 4 * index + 2 if split == "eval" else index)


class ForgetsProblems(Counting):
    """The second time, a problem is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def problem(self, split: Split, index: int) -> Dots:
        self.calls += split == "eval" and index == 0
        if self.calls > 2:
            raise NotInSplit
        return super().problem(split, index)


class FractionOfRows(Counting):
    def num_rows(self, split: Split) -> Any:
        return 0.5


class GrowingRows(Counting):
    rows = 10

    def num_rows(self, split: Split) -> int:
        self.rows += 1
        return self.rows


class BadRowNumber(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        raise BadRow("no answer", row="seven")  # type: ignore[arg-type]


class WithEnv(Counting):
    """Subclasses change what the env does."""

    def env(self, problem: Dots) -> Env:
        outer = self

        class Changed(CountingEnv):
            def reset(self) -> tuple[Message, ...]:
                return outer.change_prompt(super().reset())

            def step(self, completion: str) -> Reply:
                return outer.change_reply(super().step(completion), completion)

        return Changed(problem)

    def change_prompt(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        return prompt

    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return reply


class StepRaises(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        int(completion)  # what a policy says is not always a number
        return reply


class StepNotImplemented(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        raise NotImplementedError("later")


class DemonstrationRaises(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        np.random.RandomState(seed)  # takes 32 bits only
        return super().demonstration(problem, random_answers=random_answers, seed=seed)


class TextsRaise(Counting):
    def texts(self) -> tuple[str, ...]:
        raise OSError("no such\nfile")


class NoReply(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Any:
        return reply.reward


class DoneIsNoBool(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, done=reply.done and "yes")  # type: ignore[arg-type]


class MetricsAreNoDict(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, metrics=[0.5])  # type: ignore[arg-type]


class PromptIsList(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return list(prompt)


class PromptIsText(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return ("How many?",)


class PromptIsEmpty(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return ()


class PromptEndsWithAssistant(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (*prompt, Message.of("assistant", "3"))


class UnknownRole(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message.of("human", "How many?"),)  # type: ignore[arg-type]


class EmptyContent(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message("user", ()),)


class ContentIsText(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message("user", "How many?"),)  # type: ignore[arg-type]


class PartIsPicture(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message("user", (PILImage.new("RGB", (8, 8)),)),)  # type: ignore[arg-type]


class ReplyOfAssistant(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, messages=(Message.of("assistant", "So?"),))


class HistoryAndMessages(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, history=reply.messages)


class DemonstrationContentIsPart(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return (*CountingEnv(problem).reset(), Message("assistant", Text("3")))  # type: ignore[arg-type]


class DemonstrationIsNone(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> Any:
        return None if random_answers else super().demonstration(problem, random_answers=False, seed=seed)


class BadImage(Counting):
    source: Any = b"\x89PNG but no more"

    def env(self, problem: Dots) -> Env:
        return WithParts(problem, (Image(self.source),))


class MissingFile(BadImage):
    source = "no_such_file.png"


class FloatImage(BadImage):
    source = np.zeros((8, 8, 3), np.float32)


class GreyImage(BadImage):
    source = np.zeros((8, 8), np.uint8)


class EmptyImage(BadImage):
    source = PILImage.new("RGB", (0, 4))


class NoImage(BadImage):
    source = 3


class BadVideo(BadImage):
    """A video of one frame."""

    source: Any = np.zeros((1, 8, 8, 3), np.uint8)

    def env(self, problem: Dots) -> Env:
        return WithParts(problem, (Video(self.source),))


class MissingVideo(BadVideo):
    source = "no_such_file.mp4"


class NoVideo(BadVideo):
    source = 3


class LateVideo(Counting):
    def env(self, problem: Dots) -> Env:
        return WithParts(problem, (Video(np.zeros((2, 8, 8, 3), np.uint8), times=(1.0, 0.0)),))


class TurnedVideo(Counting):
    """Each env of a problem shows the frames in the next of `orders`."""

    def __init__(self, orders: tuple[int, ...]) -> None:
        super().__init__()
        self.orders = itertools.cycle(orders)

    def env(self, problem: Dots) -> Env:
        frames = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
        return WithParts(problem, (Video(frames[:: next(self.orders)]),))


class NumericIds(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        problem = super().problem(split, index)
        return Dots(problem.count, problem.count)  # type: ignore[arg-type]


class OneIdForAll(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        return Dots(split, super().problem(split, index).count)


class CountsCalls(Counting):
    """A cursor: every call returns the next problem and ignores the index."""

    def __init__(self) -> None:
        super().__init__()
        self.cursor = itertools.count()

    def problem(self, split: Split, index: int) -> Dots:
        return super().problem(split, next(self.cursor))


class RandomPicture(Counting):
    """Equal ids, but other pixels each time."""

    def problem(self, split: Split, index: int) -> Dots:
        return Dots(f"{split} {index}", random.SystemRandom().randrange(200))


class SharedSplits(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        return super().problem("train", index)


class SharedEnv(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.envs: dict[str, CountingEnv] = {}

    def env(self, problem: Dots) -> Env:
        env = self.envs.setdefault(problem.id, CountingEnv(problem))
        env.turn = 0
        return env


class SecondEnvDiffers(Counting):
    """Only the first env of a problem object gets a picture."""

    def problem(self, split: Split, index: int) -> Dots:
        problem = super().problem(split, index)
        return FreshDots(problem.id, problem.count)

    def env(self, problem: Dots) -> Env:
        assert isinstance(problem, FreshDots)
        env = CountingEnv(problem)
        if not problem.fresh:
            env.count += 1
        problem.fresh = False
        return env


@dataclass
class FreshDots(Dots):
    fresh: bool = True


class NaNReward(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, reward=math.nan)


class InfiniteTurnReward(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, turn_reward=-math.inf if not completion else 0.0)


class RewardIsNone(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, reward=None)  # type: ignore[arg-type]


class HugeReward(WithEnv):
    """Finite, but not in float32."""

    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, reward=1e39)


class NaNMetric(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, metrics={"seconds": math.nan})


class Endless(WithEnv):
    """Done only when the answer is right."""

    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, done=reply.reward == 1.0, messages=(Message.of("user", "And one more?"),))


class Speechless(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, messages=())


class WithDemonstration(Counting):
    """Subclasses change the demonstration, true or random: five messages, of which the first two are the prompt."""

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self.change(super().demonstration(problem, random_answers=random_answers, seed=seed), random_answers)

    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        raise NotImplementedError


class OtherPrompt(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return messages[1:]


class NoLastAnswer(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return messages[:-1]


class NoAnswer(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return messages[:2] if random_answers else messages


class AnswersWithImage(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        image = Image(np.zeros((4, 4, 3), np.uint8))
        return (*messages[:2], Message("assistant", (*messages[2].content, image)), *messages[3:])


class OtherReply(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return (*messages[:3], Message.of("user", "And another?"), messages[4])


class HalfDemonstration(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return messages[:3]


class EndlessDemonstration(WithDemonstration):
    def change(self, messages: tuple[Message, ...], random_answers: bool) -> tuple[Message, ...]:
        return (*messages, *messages[3:])


class SometimesDemonstrated(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        if problem.count >= 100:
            raise NotImplementedError
        return super().demonstration(problem, random_answers=random_answers, seed=seed)


class GivesAway(Counting):
    """ "Random" answers near the true one."""

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        near = Dots(problem.id, problem.count + random.Random(seed).randrange(5) * random_answers)
        answers = super().demonstration(near, random_answers=False, seed=seed)[2:]
        return (*CountingEnv(problem).reset(), *answers)


class FixedAnswers(Counting):
    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return super().demonstration(problem, random_answers=random_answers, seed=0)


class UnseededAnswers(Counting):
    """The answers depend on the seed and on the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def demonstration(self, problem: Dots, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        self.asked += random_answers
        return super().demonstration(problem, random_answers=random_answers, seed=seed * 100 + (self.asked % 9 == 0))


class TextsIsText(Counting):
    def texts(self) -> Any:
        return "Count. How many?"


class TextsAreBlank(Counting):
    def texts(self) -> tuple[str, ...]:
        return ("", " ")


class HugeIntReward(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, reward=10**400)


class NaNMetricCalledReward(WithEnv):
    """It must not hide behind the reward, nor the reward behind it."""

    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, metrics={"reward": math.nan})


class NaNRewardBehindAMetric(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, reward=math.nan, metrics={"reward": 1.0})


class NumberedMetric(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, metrics={1: 1.0, "a": 2.0})  # type: ignore[dict-item]


class SurrogateMetric(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        return dataclasses.replace(reply, metrics={"a\ud83d": 1.0})


class SurrogateText(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message.of("user", "How many\ud83d?"),)


class SurrogateId(Counting):
    def problem(self, split: Split, index: int) -> Dots:
        problem = super().problem(split, index)
        return Dots(f"{problem.id}\udcff", problem.count)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class RaisesUnspeakable(WithEnv):
    def change_reply(self, reply: Reply, completion: str) -> Reply:
        raise UnspeakableError


class UnclosableEnv(CountingEnv):
    def close(self) -> None:
        raise OSError("the browser is gone")


class CloseRaises(Counting):
    def env(self, problem: Dots) -> Env:
        return UnclosableEnv(problem)


class Exits(WithEnv):
    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        raise SystemExit(0)


class Unspeakable:
    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


class UnspeakableValues(WithEnv):
    """Whatever is compared or put into a message is hostile."""

    def change_prompt(self, prompt: tuple[Message, ...]) -> Any:
        return (Message(Unspeakable(), (Text("?"),)),)  # type: ignore[arg-type]


class UnspeakableId(Counting):
    def problem(self, split: Split, index: int) -> Any:
        problem = super().problem(split, index)
        return Dots(Unspeakable(), problem.count)  # type: ignore[arg-type]


class CanvasOfAll(Counting):
    """All envs draw on one canvas."""

    def __init__(self) -> None:
        super().__init__()
        self.canvas = PILImage.new("RGB", (64, 8))

    def env(self, problem: Dots) -> Env:
        class Drawing(CountingEnv):
            def __init__(self, canvas: PILImage.Image) -> None:
                super().__init__(problem)
                self.canvas = canvas

            def reset(self) -> tuple[Message, ...]:
                self.canvas.paste(PILImage.fromarray(self.picture()))
                return Message.of("system", "Count."), Message.of("user", Image(self.canvas), "How many?")

        return Drawing(self.canvas)


def test_two_videos_are_equal_where_their_frames_are_in_one_order() -> None:
    told = "deterministic: train 0 has another prompt the second time"
    one, other = (check_task(TurnedVideo(orders), max_turns=MAX_TURNS) for orders in ((1,), (1, -1)))
    assert not any(violation.startswith(told) for violation in one)
    assert any(violation.startswith(told) for violation in other)


@pytest.mark.parametrize(
    ("broken", "rule", "message"),
    [
        (
            WithoutProblemMethod,
            "methods",
            "WithoutProblemMethod does not define problem. To do: define the methods of vlmrl.Task",
        ),
        (InheritedEnv, "methods", "InheritedEnv does not define env."),
        (NoId, "runs", 'problem("train", 0) raised AttributeError: '),
        (
            FiniteWithoutWrapping,
            "runs",
            'problem("train", 1099511627776) raised IndexError: range object index out of range (',
        ),
        (StepRaises, "runs", "step() of train 0, nonsense, turn 1 raised ValueError: invalid literal for int()"),
        (CloseRaises, "runs", "close() of train 0 raised OSError: the browser is gone ("),
        (StepNotImplemented, "runs", "turn 1 raised NotImplementedError: later (" + __file__),
        (
            DemonstrationRaises,
            "runs",
            "demonstration() of train 0 raised ValueError: Seed must be between 0 and 2**32 - 1",
        ),
        (BadRowNumber, "runs", "problem(\"train\", 0) raised BadRow with row='seven', not an int"),
        (
            NoUsableRow,
            "has_problems",
            "the eval split has no problem at its first 128 indices; the last one: rows.csv row 510: no answer",
        ),
        (ForgetsProblems, "deterministic", "eval 0 is '"),
        (FractionOfRows, "num_rows", 'num_rows("train") returned 0.5, not a positive int or None'),
        (GrowingRows, "num_rows", 'num_rows("train") is 11 the first time and 12 the second time'),
        (TextsRaise, "texts", "texts() raised OSError: no such file ("),
        (HugeIntReward, "rewards", "which is not a finite number"),
        (NaNMetricCalledReward, "rewards", "returned metric 'reward'=nan"),
        (NaNRewardBehindAMetric, "rewards", "returned reward=nan"),
        (NumberedMetric, "rewards", "a metric called 1, a int and not a str"),
        (SurrogateMetric, "rewards", "has the lone surrogate '\\ud83d'"),
        (SurrogateText, "messages", "a text of a user message of reset() of train 0 has the lone surrogate"),
        (SurrogateId, "ids", 'problem("train", 0).id has the lone surrogate'),
        (RaisesUnspeakable, "runs", "step() of train 0, nonsense, turn 1 raised UnspeakableError"),
        (Exits, "runs", "reset() of train 0 raised SystemExit: 0"),
        (UnspeakableValues, "messages", "messages raised ZeroDivisionError"),
        (UnspeakableId, "ids", 'problem("train", 0).id is <a '),
        (CanvasOfAll, "siblings", "share an image, and one of them has drawn on it"),
        (NoReply, "messages", "step() of train 0, nonsense, turn 1 returned a float, not a Reply"),
        (DoneIsNoBool, "messages", "turn 2 returned done='yes', not a bool"),
        (MetricsAreNoDict, "messages", "returned metrics=[0.5], not a dict"),
        (PromptIsList, "messages", "reset() of train 0 returned a list of Message, not a tuple of Message"),
        (PromptIsText, "messages", "reset() of train 0 returned a tuple of str, not a tuple of Message"),
        (PromptIsEmpty, "messages", "reset() of train 0 returned no message"),
        (PromptEndsWithAssistant, "messages", "reset() of train 0 does not end with a user message"),
        (UnknownRole, "messages", "a message of role 'human', not system or user or assistant or tool"),
        (EmptyContent, "messages", "reset() of train 0 returned a user message without content"),
        (ContentIsText, "messages", "returned a user message with a str, not a tuple of Text, Image and Video"),
        (PartIsPicture, "messages", "returned a user message with a tuple of Image, not"),
        (ReplyOfAssistant, "messages", "turn 1 returned a message of role 'assistant', not user or tool"),
        (HistoryAndMessages, "messages", "turn 1 returned both history and messages"),
        (DemonstrationContentIsPart, "messages", "returned a assistant message with a Text, not"),
        (DemonstrationIsNone, "messages", "demonstration() of train 0, random answers returned None"),
        (BadImage, "images", "reset() of train 0: an encoded image of 16 bytes cannot be decoded"),
        (MissingFile, "images", "the image file no_such_file.png cannot be read"),
        (FloatImage, "images", "an image array must be uint8 [H, W, 3], not float32 [8, 8, 3]"),
        (GreyImage, "images", "an image array must be uint8 [H, W, 3], not uint8 [8, 8]"),
        (BadVideo, "images", "reset() of train 0: a video of one frame shows no time"),
        (
            NoVideo,
            "images",
            "a video must be a path, bytes, a uint8 array [T, H, W, 3] or a sequence of frames, not int",
        ),
        (LateVideo, "messages", "whose times are not ascending from 0: [1, 0]"),
        (EmptyImage, "images", "0 × 4 pixels"),
        (NoImage, "images", "an image must be a PIL image, a uint8 array, bytes or a path, not int"),
        (NumericIds, "ids", 'problem("train", 0).id is 14, not a str'),
        (OneIdForAll, "ids", " have the same id 'train' and different prompts"),
        (CountsCalls, "deterministic", " the second time"),
        (RandomPicture, "deterministic", "train 0 has another prompt the second time"),
        (SharedSplits, "splits", "eval 0 has the id '14' of train 0"),
        (SharedEnv, "siblings", "env() of train 0 returned the same env twice"),
        (SecondEnvDiffers, "siblings", "a second env of train 0 starts with another prompt"),
        (NaNReward, "rewards", "step() of train 0, nonsense, turn 1 returned reward=nan, which is not a finite number"),
        (InfiniteTurnReward, "rewards", "returned turn_reward=-inf"),
        (RewardIsNone, "rewards", "returned reward=None"),
        (HugeReward, "rewards", "returned reward=1e+39"),
        (NaNMetric, "rewards", "returned metric 'seconds'=nan"),
        (Endless, "ends", "train 0, nonsense: not done after 2 turns (and"),
        (Speechless, "goes_on", "train 0, nonsense, turn 1: the reply is not done and has no message"),
        (OtherPrompt, "demonstrations", "demonstration() of train 0 does not start with the messages of reset()"),
        (NoLastAnswer, "demonstrations", "does not start and end with an assistant message"),
        (NoAnswer, "demonstrations", "random demonstration() of train 0 does not start and end with an"),
        (AnswersWithImage, "demonstrations", "has an assistant message that is not text"),
        (OtherReply, "demonstrations", "shows other messages after answer 1 than step() returns"),
        (HalfDemonstration, "demonstrations", "demonstration() of train 0 ends before the env is done"),
        (EndlessDemonstration, "demonstrations", "demonstration() of train 0 goes on after the env is done"),
        (SometimesDemonstrated, "demonstrations", "demonstration() of eval 0 raises NotImplementedError, but not for"),
        (GivesAway, "random_demonstrations", "with seed 0, train 0 answers "),
        (FixedAnswers, "random_demonstrations", "train 0 has the same random answers for all seeds: "),
        (UnseededAnswers, "random_demonstrations", "train 0 has other random answers the second time"),
        (TextsIsText, "texts", "texts() returned a str, not a tuple of str"),
        (TextsAreBlank, "texts", "texts() returned no text"),
    ],
)
def test_a_broken_rule_is_reported_and_no_other(broken: type[Any], rule: str, message: str) -> None:
    violations = check_task(broken(), max_turns=MAX_TURNS)
    assert [violation.partition(":")[0] for violation in violations] == [rule]
    assert message in violations[0]
    assert ". To do: " in violations[0]
    assert "\n" not in violations[0]


def test_every_rule_is_broken_by_some_task_above() -> None:
    (parameters,) = [
        mark.args[1] for mark in test_a_broken_rule_is_reported_and_no_other.pytestmark if mark.name == "parametrize"
    ]
    assert {rule for _, rule, _ in parameters} == {rule.name for rule in RULES}


def test_after_a_broken_gate_nothing_is_claimed() -> None:
    statuses = [finding.status for finding in find(StepRaises(), 2, MAX_TURNS)]
    assert statuses == ["ok", "FAIL", *["--"] * (len(RULES) - 2)]


def test_several_broken_rules_are_reported_together() -> None:
    class TwoFaults(NaNReward, TextsAreBlank):
        pass

    assert [violation.partition(":")[0] for violation in check_task(TwoFaults())] == ["rewards", "texts"]


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────

THIS = f"{__name__}:"


def test_the_report_has_a_line_per_rule_and_the_exit_code_says_whether_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert print_findings({"task": ColorCodewordConfig(max_turns=3, shuffle_images=True)}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", rule.name] for rule in RULES]
    assert print_findings({"task": ImportedTaskConfig(f"{THIS}NaNReward", max_turns=2)}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RULES)
    assert [line.split()[1] for line in lines if line.startswith("FAIL ")] == ["rewards"]
    assert (
        print_findings({"task": ImportedTaskConfig(f"{THIS}Counting")}) == 1
    )  # max_turns is 1 unless it is set, as in a run
    assert "FAIL  ends" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImportedTaskConfig("no_such_module:Task"), "task.target=no_such_module:Task names a module that does not"),
        (ImportedTaskConfig(f"{THIS}Dots"), "does not define problem"),
        (ColorCodewordConfig(image_size=0), "task.image_size=0 is below 1"),
    ],
)
def test_what_cannot_be_checked_is_a_config_error(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        print_findings({"task": config})


class ExitsAtOnce(Counting):
    def __init__(self, config: object, *, seed: int) -> None:
        raise SystemExit(0)


class FailsAtOnce(Counting):
    def __init__(self, config: object, *, seed: int) -> None:
        raise UnspeakableError


@pytest.mark.parametrize(("name", "error"), [("FailsAtOnce", "UnspeakableError"), ("ExitsAtOnce", "SystemExit")])
def test_a_task_that_cannot_be_made_is_refused_as_in_a_run(name: str, error: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\(config, seed=0\) raised {error}"):
        print_findings({"task": ImportedTaskConfig(f"{THIS}{name}")})


def test_the_short_command_is_that_of_a_run() -> None:
    """One parser reads the settings, so the check sees the values that a run sees."""
    settings = ["max_turns=4", "args.flag=yes", "args.t=12:30", "args.n=010", "args.deep.name='a=b'"]
    assert command(["mine:Mine", *settings]) == ["mode=check", "task=mine:Mine", *(f"task.{s}" for s in settings)]
    target = ColorCodewordConfig.target
    assert command([target, "image_size=64"]) == ["mode=check", "task=color_codeword", "task.image_size=64"]


def test_it_runs_as_a_module_in_the_users_own_folder(tmp_path: Path) -> None:
    """As a user runs it, in the folder of the module, which is how the module is found."""
    (tmp_path / "my_counting.py").write_text(Path(__file__).read_text())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlmrl.tasks.check", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(vlmrl.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    good = run("my_counting:Counting", "max_turns=2")
    assert (good.returncode, good.stderr) == (0, "")
    assert "ok    rewards" in good.stdout
    bad = run("my_counting:SharedSplits", "max_turns=2")
    assert bad.returncode == 1
    assert "FAIL  splits" in bad.stdout
    assert run().returncode == 2
    assert run("my_counting:Counting", "max_turn=2").returncode == 2
