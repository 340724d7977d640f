"""Make problems and play episodes of a task, and record everything that it returns, for rules.py to judge.

Returned values are kept unchanged, whatever they are. Only images are decoded at once, by the decoder of the data path,
because an env may draw its next frame over the last one.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from vlmrl.rendering.images import ImageError, decode, image_hash
from vlmrl.tasks.base import Reply, Split
from vlmrl.types import Image, Message, Text

SPLITS: tuple[Split, ...] = get_args(Split)
IDS_PER_PROBLEM = 16
"""Number of problems whose id alone is read, per problem that is played; ids are cheap."""
FAR_INDEX = 1 << 40
"""Index of the first training problem of supervised steps."""
SEEDS = (0, 1, 2, 3, 4, 5, 6, (1 << 64) - 1)
"""Seeds of random demonstrations; those of a run have 64 bits."""
NONSENSE = ("", "☃ 12,5 <b>no idea</b>\n", "Z" * 500)
"""Answers that an untrained policy may give."""


Source: TypeAlias = Literal["reset", "step", "demonstration"]


@dataclass
class ObservedEpisode:
    """An episode that was played: one problem with one script of answers."""

    where: str
    env: Any
    prompt: Any
    answers: tuple[str, ...]
    replies: list[Any]


@dataclass
class Seen:
    """One problem, made twice and played once per script."""

    where: str
    id: Any
    env: Any
    prompt: Any
    prompt_again: Any
    episodes: list[ObservedEpisode] = field(default_factory=list)
    demonstration: Any = None
    """None if the task has no demonstrations."""
    random_demonstrations: list[Any] = field(default_factory=list)
    """One per seed of `SEEDS`."""
    random_demonstration_again: Any = None
    """That of the first seed, made a second time."""


@dataclass
class Observed:
    """Everything that the rules judge. Values that the user's task returned are `Any`, because they may be anything."""

    task: Any
    max_turns: int
    problems: dict[Split, list[Seen]]
    ids: dict[Split, list[Any]]
    """By index; `IDS_PER_PROBLEM` times as many as there are problems."""
    ids_again: dict[Split, list[Any]]
    """The same ids, read a second time from the last problem to the first."""
    texts: Any = None
    raised: str | None = None
    """Text of the first exception that the task raised; nothing was recorded after it."""
    pixels: dict[Image, str | ImageError] = field(default_factory=dict)
    """Hash of each image, or the error if it cannot be decoded."""

    def all_problems(self) -> Iterator[Seen]:
        for split in SPLITS:
            yield from self.problems[split]

    def all_episodes(self) -> Iterator[ObservedEpisode]:
        for seen in self.all_problems():
            yield from seen.episodes

    def all_replies(self) -> Iterator[tuple[str, Any]]:
        """Every reply, with a text that says where it was given."""
        for episode in self.all_episodes():
            for turn, reply in enumerate(episode.replies, start=1):
                yield f"{episode.where}, turn {turn}", reply

    def all_conversations(self) -> Iterator[tuple[Source, str, Any]]:
        """Every value that must be a tuple of messages: the method that returned it, where, and the value."""
        for seen in self.all_problems():
            for prompt in (seen.prompt, seen.prompt_again, *(episode.prompt for episode in seen.episodes)):
                yield "reset", seen.where, prompt
            if seen.demonstration is not None:
                yield "demonstration", seen.where, seen.demonstration
                for random in (*seen.random_demonstrations, seen.random_demonstration_again):
                    yield "demonstration", f"{seen.where}, random answers", random
        for where, reply in self.all_replies():
            yield "step", where, reply.messages if isinstance(reply, Reply) and not reply.done else ()

    def content(self, messages: Iterable[Message]) -> list[tuple[Any, ...]]:
        """Roles, texts and image hashes: two conversations are equal if these are equal."""
        return [
            (message.role, *(part.text if isinstance(part, Text) else self.pixels[part] for part in message.content))
            for message in messages
        ]

    def look(self, messages: Any) -> Any:
        """Decode the images of messages that the task has just returned; returns the messages."""
        for message in messages if is_conversation(messages) else ():
            for part in message.content if isinstance(message.content, tuple) else ():
                if isinstance(part, Image) and part not in self.pixels:
                    try:
                        self.pixels[part] = image_hash(decode(part.source))
                    except ImageError as error:
                        self.pixels[part] = error
        return messages


class _TaskRaisedError(Exception):
    """The task's code raised; the message says where and which exception."""


@contextmanager
def _calling(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a user's code may raise anything, and that is a finding
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise _TaskRaisedError(f"{what}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})") from error


def observe(task: Any, problems: int, max_turns: int) -> Observed:
    """Make so many problems per split and play them. Stops at the first exception of the task."""
    observed = Observed(task, max_turns, {s: [] for s in SPLITS}, {s: [] for s in SPLITS}, {s: [] for s in SPLITS})
    try:
        for split in SPLITS:
            for index in range(problems * IDS_PER_PROBLEM):
                observed.ids[split].append(_problem(task, split, index).id)
            for index in range(problems):
                observed.problems[split].append(_see(observed, split, index))
        for split in SPLITS:
            for index in reversed(range(problems * IDS_PER_PROBLEM)):
                observed.ids_again[split].insert(0, _problem(task, split, index).id)
            for index in reversed(range(problems)):
                with _calling(f"reset() of {split} {index}, made a second time"):
                    prompt = task.env(_problem(task, split, index)).reset()
                observed.problems[split][index].prompt_again = observed.look(prompt)
        _problem(task, "train", FAR_INDEX)
        with _calling("texts()"):
            observed.texts = task.texts()
    except _TaskRaisedError as error:
        observed.raised = str(error)
    return observed


def _problem(task: Any, split: Split, index: int) -> Any:
    with _calling(f'problem("{split}", {index})'):
        problem = task.problem(split, index)
        problem.id  # noqa: B018 - read here so that a problem without an id is reported with its index
    return problem


def _see(observed: Observed, split: Split, index: int) -> Seen:
    task, look = observed.task, observed.look
    problem = _problem(task, split, index)
    where = f"{split} {index}"
    with _calling(f"env() or reset() of {where}"):
        env = task.env(problem)
        prompt = look(env.reset())
    seen = Seen(where, problem.id, env, prompt, None)
    scripts = {"nonsense": NONSENSE * math.ceil(observed.max_turns / len(NONSENSE))}
    try:
        with _calling(f"demonstration() of {where}"):
            seen.demonstration = look(task.demonstration(problem, random_answers=False, seed=0))
            for seed in (*SEEDS, SEEDS[0]):
                seen.random_demonstrations.append(look(task.demonstration(problem, random_answers=True, seed=seed)))
            seen.random_demonstration_again = seen.random_demonstrations.pop()
    except _TaskRaisedError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        seen.demonstration = None
        seen.random_demonstrations = []
    else:
        scripts["true answers"] = answers_in(seen.demonstration, prompt)
        scripts["random answers"] = answers_in(seen.random_demonstrations[0], prompt)
    for script, answers in scripts.items():
        seen.episodes.append(_play(observed, problem, f"{where}, {script}", answers))
    return seen


def _play(observed: Observed, problem: Any, where: str, answers: tuple[str, ...]) -> ObservedEpisode:
    """Play one episode: give the answers, then repeat the last one, until the env is done or `max_turns` is reached."""
    with _calling(f"env() or reset() of {where}"):
        env = observed.task.env(problem)
        episode = ObservedEpisode(where, env, observed.look(env.reset()), answers, [])
    for turn in range(observed.max_turns if answers else 0):
        with _calling(f"step() of {where}, turn {turn + 1}"):
            reply = env.step(answers[min(turn, len(answers) - 1)])
        episode.replies.append(reply)
        if not isinstance(reply, Reply) or reply.done:
            break
        observed.look(reply.messages)
    return episode


def is_conversation(messages: Any) -> bool:
    return isinstance(messages, tuple) and all(isinstance(message, Message) for message in messages)


def after_prompt(demonstration: Any, prompt: Any) -> tuple[Message, ...]:
    """The messages of a demonstration after the prompt; () if either is malformed (see the rule `messages`)."""
    if not (is_conversation(demonstration) and is_conversation(prompt)):
        return ()
    return tuple(demonstration[len(prompt) :])


def answers_in(demonstration: Any, prompt: Any) -> tuple[str, ...]:
    return tuple(text_of(message) for message in after_prompt(demonstration, prompt) if message.role == "assistant")


def text_of(message: Message) -> str:
    """The text of a message; "" if it is malformed, which the rule `messages` reports."""
    parts = message.content if isinstance(message.content, tuple) else ()
    return "".join(part.text for part in parts if isinstance(part, Text) and isinstance(part.text, str))
