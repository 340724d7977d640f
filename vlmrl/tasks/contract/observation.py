"""Make problems and play episodes of a task, and record everything that it returns, for rules.py to judge.

Returned values are kept unchanged, whatever they are. Only images and videos are decoded at once, by the decoders of
the data path, because an env may draw its next frame over the last one. The task's code runs inside the fence of
`vlmrl.errors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from vlmrl.errors import UserFault, fenced
from vlmrl.rendering.images import decode, image_hash
from vlmrl.rendering.video_content import video_content
from vlmrl.tasks.base import NoProblem, Reply, Split, StepInfo, Task
from vlmrl.tasks.border import checked_absence
from vlmrl.tasks.loading import texts_of
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.types import Image, Message, Text, Video

SPLITS: tuple[Split, ...] = get_args(Split)
IDS_PER_PROBLEM = 16
"""Number of indices whose id alone is read, per problem that is played; ids are cheap."""
FAR_INDEX = 1 << 40
"""Index of the first training problem of supervised steps."""
SEEDS = (0, 1, 2, 3, 4, 5, 6, (1 << 64) - 1)
"""Seeds of random demonstrations; those of a run have 64 bits."""
NONSENSE = ("", "☃ 12,5 <b>no idea</b>\n", "Z" * 500)
"""Answers that an untrained policy may give."""


class _Absent:
    def __repr__(self) -> str:
        return "no problem"


ABSENT: Any = _Absent()
"""Stands for what the task does not define, and for the id of an index that has no problem."""

Source: TypeAlias = Literal["reset", "step", "history", "demonstration"]


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
    demonstration: Any = ABSENT
    """`ABSENT` if the task has no demonstrations with correct answers."""
    random_demonstrations: list[Any] = field(default_factory=list)
    """One per seed of `SEEDS`; empty if the task has none."""
    has_no_demonstration: bool = False
    """Whether `demonstration` raised `NoProblem`."""
    random_demonstration_again: Any = None
    """That of the first seed, made a second time."""

    def demonstrations(self) -> Iterator[tuple[str, Any]]:
        """Every demonstration, with a text that says which one it is."""
        if self.demonstration is not ABSENT:
            yield f"demonstration() of {self.where}", self.demonstration
        for random in self.random_demonstrations:
            yield f"random demonstration() of {self.where}", random


@dataclass
class Observed:
    """Everything that the rules judge. Values that the user's task returned are `Any`, because they may be anything."""

    task: Any
    max_turns: int
    problems: dict[Split, list[Seen]]
    ids: dict[Split, list[Any]]
    """By index, `ABSENT` where there is no problem; `IDS_PER_PROBLEM` times as many as there are problems."""
    ids_again: dict[Split, list[Any]]
    """The same ids, read a second time from the last problem to the first."""
    num_rows: dict[Split, list[Any]] = field(default_factory=dict)
    """What `num_rows` returned, called twice; empty if the task does not define it."""
    without_problem: dict[Split, str] = field(default_factory=dict)
    """Why the last index that was tried has no problem, for each split in which none has."""
    texts: tuple[str, ...] | UserFault | None = None
    """None if the task does not define `texts`, which only a model whose tokenizer is made here needs."""
    raised: str | None = None
    """Text of the first exception that the task raised; nothing was recorded after it."""
    pixels: dict[Image | Video, str | UserFault] = field(default_factory=dict)
    """Hash of each image and video, or the fault if it cannot be decoded."""
    shown: dict[int, tuple[Any, str, str]] = field(default_factory=dict)
    """By the identity of the source of an image or video: the source itself, who showed it first, and its hash then."""
    drawn_over: list[str] = field(default_factory=list)
    """Images and videos that two envs share and one of them changed."""

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
            if seen.demonstration is not ABSENT:
                yield "demonstration", seen.where, seen.demonstration
            if seen.random_demonstrations:
                for random in (*seen.random_demonstrations, seen.random_demonstration_again):
                    yield "demonstration", f"{seen.where}, random answers", random
        for where, reply in self.all_replies():
            yield "step", where, reply.messages if isinstance(reply, Reply) and not reply.done else ()
            if replaces(reply):
                yield "history", where, reply.history

    def content(self, messages: Iterable[Message]) -> list[tuple[Any, ...]]:
        """Roles, tool calls, texts and image hashes: two conversations are equal if these are equal."""
        return [
            (
                *(message.role, message.tool_calls, message.tool_call_id, message.name, message.reasoning),
                *(part.text if isinstance(part, Text) else self.pixels[part] for part in message.content),
            )
            for message in messages
        ]

    def look(self, messages: Any, who: str) -> Any:
        """Decode the images and videos of messages that the task has just returned; returns the messages. `who` names
        the env."""
        for message in messages if is_conversation(messages) else ():
            for part in message.content if isinstance(message.content, tuple) else ():
                if isinstance(part, Image | Video) and part not in self.pixels:
                    kind = "an image" if isinstance(part, Image) else "a video"
                    try:
                        with fenced(f"decoding {kind}"):
                            self.pixels[part] = self._hash(part, kind, who)
                    except UserFault as fault:
                        self.pixels[part] = fault
        return messages

    def _hash(self, part: Image | Video, kind: str, who: str) -> str:
        source: Any = part.source
        found = image_hash(decode(source)) if isinstance(part, Image) else video_content(part)
        _, first, before = self.shown.setdefault(id(source), (source, who, found))
        if before != found and first != who:
            self.drawn_over.append(f"{first} and {who} share {kind}, and one of them has drawn on it")
        return found


def observe(task: Any, problems: int, max_turns: int) -> Observed:
    """Make so many problems per split and play them. Stops at the first exception of the task."""
    observed = Observed(task, max_turns, {s: [] for s in SPLITS}, {s: [] for s in SPLITS}, {s: [] for s in SPLITS})
    try:
        for split in SPLITS:
            _look_at_ids(observed, split, problems * IDS_PER_PROBLEM)
            for index in played_indices(observed, split, problems):
                observed.problems[split].append(_see(observed, split, index))
        for split in SPLITS:
            for index in reversed(range(problems * IDS_PER_PROBLEM)):
                observed.ids_again[split].insert(0, _problem(task, split, index)[1])
            for number, index in reversed(list(enumerate(played_indices(observed, split, problems)))):
                problem, name, _ = _problem(task, split, index)
                if name is ABSENT:  # the rule `deterministic` reports it
                    observed.problems[split][number].prompt_again = observed.problems[split][number].prompt
                    continue
                where = f"reset() of {split} {index}, made a second time,"
                with fenced(where), UncheckedEnv(task, problem, f" of {split} {index}, made a second time,") as env:
                    observed.problems[split][number].prompt_again = observed.look(finished(env.reset()), where)
        _problem(task, "train", FAR_INDEX)
    except UserFault as fault:
        observed.raised = fault.text
    if defines_texts(task):
        try:
            observed.texts = texts_of(task)
        except UserFault as fault:
            observed.texts = fault
    return observed


def played_indices(observed: Observed, split: Split, problems: int) -> list[int]:
    """The first indices that have a problem."""
    return [index for index, name in enumerate(observed.ids[split]) if name is not ABSENT][:problems]


def _look_at_ids(observed: Observed, split: Split, count: int) -> None:
    """Read the ids of the first indices, and the number of rows."""
    why = ""
    for index in range(count):
        name, reason = _problem(observed.task, split, index)[1:]
        observed.ids[split].append(name)
        why = reason or why
    if all(name is ABSENT for name in observed.ids[split]):
        observed.without_problem[split] = why
    if hasattr(observed.task, "num_rows"):
        with fenced(f'num_rows("{split}")'):
            observed.num_rows[split] = [observed.task.num_rows(split) for _ in range(2)]


def _problem(task: Any, split: Split, index: int) -> tuple[Any, Any, str]:
    """The problem, its id, and why there is none; id `ABSENT` where there is none."""
    where = f'problem("{split}", {index})'
    with fenced(where):
        try:
            problem = task.problem(split, index)
            return problem, problem.id, ""
        except NoProblem as absent:
            return None, ABSENT, str(checked_absence(where, absent)) or type(absent).__name__


def _see(observed: Observed, split: Split, index: int) -> Seen:
    task, look = observed.task, observed.look
    problem, name, _ = _problem(task, split, index)
    where = f"{split} {index}"
    with fenced(f"playing {where}"), UncheckedEnv(task, problem, f" of {where}") as env:
        prompt = look(finished(env.reset()), f"the first env of {where}")
    seen = Seen(where, name, env.env, prompt, None)
    scripts = {"nonsense": NONSENSE * math.ceil(observed.max_turns / len(NONSENSE))}
    for correct in (True, False):
        for seed in (0,) if correct else (*SEEDS, SEEDS[0]):
            with fenced(f"demonstration() of {where}"):
                try:
                    made = task.demonstration(problem, random_answers=not correct, seed=seed)
                except (NotImplementedError, NoProblem) as error:
                    seen.has_no_demonstration = isinstance(error, NoProblem)
                    break  # allowed: a warm-up needs one kind of answers only, and not from every problem
                look(made, f"demonstration() of {where}")
                made = without_calls(made)
            if correct:
                seen.demonstration = made
            else:
                seen.random_demonstrations.append(made)
    with fenced(f"demonstration() of {where}"):
        if seen.demonstration is not ABSENT:
            scripts["true answers"] = answers_in(seen.demonstration, prompt)
        if seen.random_demonstrations:
            seen.random_demonstration_again = seen.random_demonstrations.pop()
            scripts["random answers"] = answers_in(seen.random_demonstrations[0], prompt)
    for script, answers in scripts.items():
        seen.episodes.append(_play(observed, problem, f"{where}, {script}", answers))
    return seen


def _play(observed: Observed, problem: Any, where: str, answers: tuple[str, ...]) -> ObservedEpisode:
    """Play one episode: give the answers, then repeat the last one, until the env is done or `max_turns` is reached."""
    who = f"the env of {where}"
    with fenced(f"playing {where}"), UncheckedEnv(observed.task, problem, f" of {where}") as env:
        episode = ObservedEpisode(where, env.env, observed.look(finished(env.reset()), who), answers, [])
        for turn in range(observed.max_turns if answers else 0):
            answer = answers[min(turn, len(answers) - 1)]
            env.of = f" of {where}, turn {turn + 1}"
            reply = finished(env.step(answer, StepInfo.of_text(answer, turn + 1)))
            episode.replies.append(reply)
            if not isinstance(reply, Reply) or reply.done:
                break
            observed.look(reply.messages if reply.history is None else reply.history, who)
    return episode


class UncheckedEnv(OpenEnv):
    """An env whose values are kept as they are, for the rules to judge."""

    @staticmethod
    def check_prompt(where: str, messages: Any) -> Any:
        return messages

    @staticmethod
    def check_reply(where: str, reply: Any) -> Any:
        return reply


def defines_texts(task: Any) -> bool:
    """Whether the class has a `texts` of its own."""
    return getattr(type(task), "texts", Task.texts) is not Task.texts


def replaces(reply: Any) -> bool:
    """Whether a reply goes on with a conversation in place of all before it."""
    return isinstance(reply, Reply) and reply.done is False and reply.history is not None


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


def without_calls(messages: Any) -> Any:
    """A demonstration without its tool calls and their results, which the env never sees."""
    if not is_conversation(messages):
        return messages
    kept: list[Message] = []
    is_call = False
    for message in messages:
        is_call = bool(message.tool_calls) or (is_call and message.role == "tool")
        if not is_call:
            kept.append(message)
    return tuple(kept)
