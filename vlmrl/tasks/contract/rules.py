"""The contract of `vlmrl.tasks.base`, rule by rule: each looks at what was observed and yields what breaks it.

The first rules are gates: they say whether the later ones can judge anything.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from vlmrl.rendering.images import ImageError
from vlmrl.tasks.base import Reply
from vlmrl.tasks.contract.observation import (
    SEEDS,
    SPLITS,
    Observed,
    Seen,
    after_prompt,
    answers_in,
    is_conversation,
    text_of,
)
from vlmrl.tasks.loading import missing_methods
from vlmrl.types import Image, Message, Text

Violations: TypeAlias = Iterator[str]

LARGEST = float(np.finfo(np.float32).max)
"""Rewards are float32 on the data path; beyond it they are infinite."""


def methods(observed: Observed) -> Violations:
    if missing := missing_methods(type(observed.task)):
        yield f"{type(observed.task).__name__} does not define {', '.join(missing)}"


def runs(observed: Observed) -> Violations:
    if observed.raised is not None:
        yield observed.raised


def messages(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        if not isinstance(reply, Reply):
            yield f"step() of {where} gave {_kind(reply)}, not a Reply"
        elif not isinstance(reply.done, (bool, np.bool_)) or not isinstance(reply.metrics, dict):
            yield f"step() of {where} gave done={reply.done!r}, metrics={reply.metrics!r}, not a bool and a dict"
    for source, where, conversation in observed.all_conversations():
        if not is_conversation(conversation):
            yield f"{source}() of {where} gave {_kind(conversation)}, not a tuple of Message"
            continue
        roles = ("user", "tool") if source == "step" else ("system", "user", "assistant", "tool")
        for message in conversation:
            if message.role not in roles:
                yield f"{source}() of {where} gave a message of role {message.role!r}, not of {' or '.join(roles)}"
            elif not isinstance(message.content, tuple) or not message.content:
                content = _kind(message.content)
                yield f"{source}() of {where} gave a message of role {message.role} whose content is {content}"
            elif not all(
                isinstance(part, Image) or (isinstance(part, Text) and isinstance(part.text, str))
                for part in message.content
            ):
                yield f"{source}() of {where} gave a message of role {message.role} with {_kind(message.content)}"
        if source == "reset" and (not conversation or conversation[-1].role not in ("user", "tool")):
            yield f"reset() of {where} does not end with a user message, so the policy has nothing to answer"


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(x).__name__ for x in value})) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"


def images(observed: Observed) -> Violations:
    for source, where, conversation in observed.all_conversations():
        for part in (part for message in conversation for part in message.content if isinstance(part, Image)):
            error = observed.pixels[part]
            if isinstance(error, ImageError):
                yield f"{source}() of {where}: {error}"


def ids(observed: Observed) -> Violations:
    for split in SPLITS:
        for index, name in enumerate(observed.ids[split]):
            if not isinstance(name, str) or not name:
                yield f"{split} {index} has the id {name!r}, not a non-empty str"
        by_id: dict[str, Seen] = {}
        for seen in observed.problems[split]:
            first = by_id.setdefault(repr(seen.id), seen)
            if observed.content(first.prompt) != observed.content(seen.prompt):
                yield f"{first.where} and {seen.where} have the id {seen.id!r} but not the same prompt"


def deterministic(observed: Observed) -> Violations:
    for split in SPLITS:
        for index, (first, again) in enumerate(zip(observed.ids[split], observed.ids_asked_again[split], strict=True)):
            if repr(first) != repr(again):
                yield f"{split} {index} is {first!r}, and {again!r} when asked for again"
    for seen in observed.all_problems():
        if observed.content(seen.prompt) != observed.content(seen.prompt_asked_again):
            yield f"{seen.where} has another prompt when asked for again"


def splits(observed: Observed) -> Violations:
    train = {repr(name): index for index, name in reversed(list(enumerate(observed.ids["train"])))}
    for index, name in enumerate(observed.ids["eval"]):
        if repr(name) in train:
            yield f"eval {index} has the id {name!r} of train {train[repr(name)]}"


def siblings(observed: Observed) -> Violations:
    for seen in observed.all_problems():
        if any(observed.content(episode.prompt) != observed.content(seen.prompt) for episode in seen.episodes):
            yield f"a second env of {seen.where} begins with another prompt"
        if len({id(env) for env in (seen.env, *(episode.env for episode in seen.episodes))}) <= len(seen.episodes):
            yield f"env() of {seen.where} gave the same env twice"


def rewards(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        figures = {"turn_reward": reply.turn_reward, "reward": reply.reward, **reply.metrics}
        for name, value in figures.items():
            if not (isinstance(value, numbers.Real) and abs(float(value)) <= LARGEST):  # NaN is not ≤ anything
                yield f"{where}: {name} is {value!r}"


def ends(observed: Observed) -> Violations:
    for episode in observed.all_episodes():
        if episode.replies and not episode.replies[-1].done:
            yield f"{episode.where}: not done after {len(episode.replies)} turns"


def goes_on(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        if not reply.done and not reply.messages:
            yield f"{where}: neither done nor a message"


def demonstrations(observed: Observed) -> Violations:
    for seen in observed.all_problems():
        if seen.demonstration is None:
            yield f"demonstration() of {seen.where} is not implemented, of other problems it is"
            continue
        wrong = [
            what + fault
            for what, demonstration in (
                (f"demonstration() of {seen.where}", seen.demonstration),
                *((f"random demonstration() of {seen.where}", random) for random in seen.random_demonstrations),
            )
            for fault in _faults_of_shape(observed, seen.prompt, demonstration)
        ]
        yield from wrong or _disagreement(observed, seen)


def _faults_of_shape(observed: Observed, prompt: Any, demonstration: Any) -> Violations:
    rest = after_prompt(demonstration, prompt)
    answers = [message for message in rest if message.role == "assistant"]
    if observed.content(demonstration[: len(prompt)]) != observed.content(prompt):
        yield " does not begin with what reset() gives"
    elif not rest or rest[0].role != "assistant" or rest[-1].role != "assistant":
        yield " does not go from a first to a last assistant message after the prompt"
    elif not all(text_of(answer) and all(isinstance(part, Text) for part in answer.content) for answer in answers):
        yield " has an assistant message that is not text"


def _disagreement(observed: Observed, seen: Seen) -> Violations:
    """A demonstration must be the conversation that its answers lead to, else supervised steps train other prompts."""
    played = next(episode for episode in seen.episodes if episode.where.endswith("true answers"))
    if not all(reply.done or reply.messages for reply in played.replies):
        return  # `goes_on` says so
    if played.replies[-1].done and len(played.replies) < len(played.answers):
        yield f"demonstration() of {seen.where} goes on after the env said done"
    elif len(played.replies) > len(played.answers):
        yield f"demonstration() of {seen.where} ends before the env says done"
    else:
        shown: list[list[Message]] = []
        for message in after_prompt(seen.demonstration, seen.prompt):
            if message.role == "assistant":
                shown.append([])
            else:
                shown[-1].append(message)
        for turn, (messages, reply) in enumerate(zip(shown, played.replies, strict=False), start=1):
            if observed.content(messages) != observed.content(() if reply.done else reply.messages):
                yield f"demonstration() of {seen.where} shows other messages after answer {turn} than step() gives"


def random_demonstrations(observed: Observed) -> Violations:
    demonstrated = [seen for seen in observed.all_problems() if seen.demonstration is not None]
    answers_of = {
        seen.where: [answers_in(random, seen.prompt) for random in seen.random_demonstrations] for seen in demonstrated
    }
    first = demonstrated[0].where
    for seen in demonstrated:
        answers = answers_of[seen.where]
        for seed, mine, others in zip(SEEDS, answers, answers_of[first], strict=True):
            turns = min(len(mine), len(others))  # problems may differ in their number of turns
            if mine[:turns] != others[:turns]:
                yield f"with seed {seed}, {first} answers {', '.join(others)} and {seen.where} {', '.join(mine)}"
        if answers_in(seen.random_demonstration_again, seen.prompt) != answers[0]:
            yield f"{seen.where} has other random answers when asked for again with the same seed"
        if len(set(answers)) == 1 and answers[0]:
            yield f"{seen.where} has the same random answers whatever the seed: {', '.join(answers[0])}"


def texts(observed: Observed) -> Violations:
    value = observed.texts
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        yield f"texts() gave {_kind(value)}, not a tuple of str"
    elif not any(text.strip() for text in value):
        yield "texts() gave no text"


@dataclass(frozen=True)
class Rule:
    """One promise of the contract."""

    promise: str
    """What holds, for the report's ok line."""
    remedy: str
    """What to do about a violation."""
    violations: Callable[[Observed], Violations]
    gate: bool = False
    """Nothing after it can be judged when it fails."""
    of_demonstrations: bool = False
    """Not checked for a task without demonstrations."""

    @property
    def name(self) -> str:
        return self.violations.__name__


RULES = (
    Rule("problem, env and texts are defined", "define what vlmrl.tasks.base.Task lists", methods, gate=True),
    Rule("nothing raises", "mend it: in a run each such rollout would end as task_error", runs, gate=True),
    Rule(
        "step() gives a Reply, and all messages are well-formed",
        'build them with Message.of("user", "text", Image(...)) and return them as a tuple',
        messages,
        gate=True,
    ),
    Rule(
        "every image can be decoded",
        "give Image a PIL image, a uint8 array [H, W, 3], encoded bytes or the path of a file",
        images,
        gate=True,
    ),
    Rule("ids are text, and equal ids are equal problems", "derive the id from what the problem is", ids),
    Rule(
        "problem(split, index) gives the same problem whenever it is asked",
        "make it a function of seed, split and index: no global random state, no counter",
        deterministic,
    ),
    Rule(
        "the splits share no id",
        "keep the evaluation problems out of training, else the evaluation measures memory",
        splits,
    ),
    Rule(
        "every env of a problem is a new one and begins with the same prompt",
        "make a new env in env() and share nothing that changes: the group's advantages compare equals",
        siblings,
    ),
    Rule(
        "rewards and metrics are finite numbers",
        "return a float: in a run each such rollout would end as bad_reward",
        rewards,
    ),
    Rule(
        "episodes end within max_turns, whatever is answered",
        "say done at the last turn, or raise task.max_turns: such a rollout is cut, and its last reward counts",
        ends,
    ),
    Rule("a turn that is not the last says what comes next", "set Reply.messages, or done=True", goes_on),
    Rule(
        "demonstrations are the conversation that their answers lead to",
        "give reset()'s messages, then answer, step()'s messages, …, answer, up to the env's done",
        demonstrations,
        of_demonstrations=True,
    ),
    Rule(
        "random demonstrations say nothing about the problem",
        "draw their answers from the seed argument alone (random.Random(seed)), from nothing of the problem",
        random_demonstrations,
        of_demonstrations=True,
    ),
    Rule(
        "texts() gives the text of prompts and answers", "return a tuple of str, e.g. (system_prompt, question)", texts
    ),
)
