"""The rules of the contract in `vlmrl.tasks.base`. Each is a function that yields the violations in `Observed`.

The first rules are gates: if one fails, the later rules cannot judge anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmrl.errors import UserFault, safe_repr
from vlmrl.tasks.base import Reply
from vlmrl.tasks.border import (
    ANSWERED_ROLES,
    ANY_ROLE,
    BadRewardError,
    TaskCodeError,
    checked_id,
    checked_messages,
    checked_num_rows,
    checked_prompt,
    checked_reply,
)
from vlmrl.tasks.contract.observation import (
    ABSENT,
    SEEDS,
    SPLITS,
    Observed,
    Seen,
    after_prompt,
    answers_in,
    replaces,
    text_of,
)
from vlmrl.tasks.loading import missing_methods
from vlmrl.types import Message, Text

Violations: TypeAlias = Iterator[str]


def methods(observed: Observed) -> Violations:
    if missing := missing_methods(type(observed.task)):
        yield f"{type(observed.task).__name__} does not define {', '.join(missing)}"


def runs(observed: Observed) -> Violations:
    if observed.raised is not None:
        yield observed.raised


def has_problems(observed: Observed) -> Violations:
    for split, why in observed.without_problem.items():
        yield f"the {split} split has no problem at its first {len(observed.ids[split])} indices; the last one: {why}"


def num_rows(observed: Observed) -> Violations:
    for split, (rows, again) in observed.num_rows.items():
        try:
            checked_num_rows(f'num_rows("{split}")', rows)
        except TaskCodeError as fault:
            yield fault.text
            continue
        if rows != again:
            yield f'num_rows("{split}") is {rows} the first time and {again} the second time'


def messages(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        try:
            if not is_speechless(reply):  # the rule `goes_on` reports it
                checked_reply(f"step() of {where}", reply)
        except BadRewardError:
            pass  # the rule `rewards` reports it
        except TaskCodeError as fault:
            yield fault.text
    for source, where, conversation in observed.all_conversations():
        if source == "step" and conversation == ():
            continue
        name = f"the history of step() of {where}" if source == "history" else f"{source}() of {where}"
        try:
            if source in ("reset", "history"):
                checked_prompt(name, conversation)
            else:
                checked_messages(name, conversation, ANSWERED_ROLES if source == "step" else ANY_ROLE)
        except TaskCodeError as fault:
            yield fault.text
            continue
        for message in conversation:
            if not message.content:
                yield f"{name} returned a {message.role} message without content"


def is_speechless(reply: Any) -> bool:
    """Whether a reply goes on without a message."""
    return isinstance(reply, Reply) and reply.done is False and reply.messages == () and reply.history is None


def images(observed: Observed) -> Violations:
    for source, where, conversation in observed.all_conversations():
        for part in (part for message in conversation for part in message.content if not isinstance(part, Text)):
            found = observed.pixels[part]
            if isinstance(found, UserFault):
                yield f"{source}() of {where}: {found.text}"


def ids(observed: Observed) -> Violations:
    for split in SPLITS:
        for index, name in enumerate(observed.ids[split]):
            if name is ABSENT:
                continue
            try:
                if not checked_id(f'problem("{split}", {index})', name):
                    yield f'problem("{split}", {index}).id is an empty str, which names no problem'
            except TaskCodeError as fault:
                yield fault.text
        by_id: dict[str, Seen] = {}
        for seen in observed.problems[split]:
            first = by_id.setdefault(safe_repr(seen.id), seen)
            if observed.content(first.prompt) != observed.content(seen.prompt):
                yield f"{first.where} and {seen.where} have the same id {safe_repr(seen.id)} and different prompts"


def deterministic(observed: Observed) -> Violations:
    for split in SPLITS:
        for index, (first, again) in enumerate(zip(observed.ids[split], observed.ids_again[split], strict=True)):
            once, twice = safe_repr(first), safe_repr(again)
            if once != twice:
                yield f"{split} {index} is {once} the first time and {twice} the second time"
    for seen in observed.all_problems():
        if observed.content(seen.prompt) != observed.content(seen.prompt_again):
            yield f"{seen.where} has another prompt the second time"


def splits(observed: Observed) -> Violations:
    train = {safe_repr(name): index for index, name in reversed(list(enumerate(observed.ids["train"])))}
    for index, name in enumerate(observed.ids["eval"]):
        if isinstance(name, (str, int)) and safe_repr(name) in train:
            yield f"eval {index} has the id {safe_repr(name)} of train {train[safe_repr(name)]}"


def siblings(observed: Observed) -> Violations:
    for seen in observed.all_problems():
        if any(observed.content(episode.prompt) != observed.content(seen.prompt) for episode in seen.episodes):
            yield f"a second env of {seen.where} starts with another prompt"
        if len({id(env) for env in (seen.env, *(episode.env for episode in seen.episodes))}) <= len(seen.episodes):
            yield f"env() of {seen.where} returned the same env twice"
    yield from observed.drawn_over


def rewards(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        try:
            checked_reply(f"step() of {where}", reply)
        except BadRewardError as fault:
            yield fault.text
        except TaskCodeError:
            pass  # the rule `messages` reports it


def ends(observed: Observed) -> Violations:
    for episode in observed.all_episodes():
        if episode.replies and not episode.replies[-1].done:
            yield f"{episode.where}: not done after {len(episode.replies)} turns"


def goes_on(observed: Observed) -> Violations:
    for where, reply in observed.all_replies():
        if is_speechless(reply):
            yield f"{where}: the reply is not done and has no message"


def demonstrations(observed: Observed) -> Violations:
    demonstrated = [seen for seen in observed.all_problems() if seen.demonstration is not ABSENT]
    randomly = [seen for seen in observed.all_problems() if seen.random_demonstrations]
    for seen in observed.all_problems():
        if seen.has_no_demonstration:
            continue
        if (demonstrated and seen not in demonstrated) or (randomly and seen not in randomly):
            yield f"demonstration() of {seen.where} raises NotImplementedError, but not for other problems"
            continue
        wrong = [
            what + fault
            for what, demonstration in seen.demonstrations()
            for fault in _faults_of_shape(observed, seen.prompt, demonstration)
        ]
        yield from wrong or (_disagreement(observed, seen) if seen in demonstrated else ())


def _faults_of_shape(observed: Observed, prompt: Any, demonstration: Any) -> Violations:
    rest = after_prompt(demonstration, prompt)
    answers = [message for message in rest if message.role == "assistant"]
    may_start_over = any(replaces(reply) for _, reply in observed.all_replies())
    if not may_start_over and observed.content(demonstration[: len(prompt)]) != observed.content(prompt):
        yield " does not start with the messages of reset()"
    elif not rest or rest[0].role != "assistant" or rest[-1].role != "assistant":
        yield " does not start and end with an assistant message after the prompt"
    elif not all(text_of(answer) and all(isinstance(part, Text) for part in answer.content) for answer in answers):
        yield " has an assistant message that is not text"


def _disagreement(observed: Observed, seen: Seen) -> Violations:
    """A demonstration must be the conversation that its answers lead to; otherwise supervised steps train on prompts
    that never occur."""
    played = next(episode for episode in seen.episodes if episode.where.endswith("true answers"))
    if any(map(is_speechless, played.replies)):
        return  # the rule `goes_on` reports it
    if any(replaces(reply) for _, reply in observed.all_replies()):
        return  # the answers of one conversation of several do not lead there by themselves
    if played.replies[-1].done and len(played.replies) < len(played.answers):
        yield f"demonstration() of {seen.where} goes on after the env is done"
    elif len(played.replies) > len(played.answers):
        yield f"demonstration() of {seen.where} ends before the env is done"
    else:
        shown: list[list[Message]] = []
        for message in after_prompt(seen.demonstration, seen.prompt):
            if message.role == "assistant":
                shown.append([])
            else:
                shown[-1].append(message)
        for turn, (messages, reply) in enumerate(zip(shown, played.replies, strict=False), start=1):
            if observed.content(messages) != observed.content(() if reply.done else reply.messages):
                yield f"demonstration() of {seen.where} shows other messages after answer {turn} than step() returns"


def random_demonstrations(observed: Observed) -> Violations:
    demonstrated = [seen for seen in observed.all_problems() if seen.random_demonstrations]
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
            yield f"{seen.where} has other random answers the second time with the same seed"
        if len(set(answers)) == 1 and answers[0]:
            yield f"{seen.where} has the same random answers for all seeds: {', '.join(answers[0])}"


def texts(observed: Observed) -> Violations:
    if isinstance(observed.texts, UserFault):
        yield observed.texts.text
    elif not any(text.strip() for text in observed.texts or ()):
        yield "texts() returned no text"


def without_num_rows(observed: Observed) -> str | None:
    """Why the rule `num_rows` has nothing to judge."""
    return None if observed.num_rows else "num_rows() is not defined, so the problems count as endless"


def without_demonstrations(observed: Observed) -> str | None:
    """Why the rule `demonstrations` has nothing to judge."""
    if any(any(seen.demonstrations()) for seen in observed.all_problems()):
        return None
    return "demonstration() is not defined, so the task has no warm-up"


def without_random_demonstrations(observed: Observed) -> str | None:
    """Why the rule `random_demonstrations` has nothing to judge."""
    if (reason := without_demonstrations(observed)) is not None:
        return reason
    if any(seen.random_demonstrations for seen in observed.all_problems()):
        return None
    return "demonstration() has no random answers, so a warm-up needs trainer.warmup.demonstrations=correct"


def without_texts(observed: Observed) -> str | None:
    """Why the rule `texts` has nothing to judge."""
    if observed.texts is not None:
        return None
    return "texts() is not defined, and only a model whose tokenizer is made here (model=qwen3vl_tiny) needs it"


@dataclass(frozen=True)
class Rule:
    """One promise of the contract."""

    promise: str
    """What holds if the rule does; the text of its ok line."""
    remedy: str
    """How to fix a violation."""
    violations: Callable[[Observed], Violations]
    gate: bool = False
    """If the rule fails, the later rules are not checked."""
    unchecked: Callable[[Observed], str | None] = lambda observed: None
    """Returns why the task has nothing that the rule could judge; None where it has."""

    @property
    def name(self) -> str:
        return self.violations.__name__


RULES = (
    Rule("problem and env are defined", "define the methods of vlmrl.Task", methods, gate=True),
    Rule("nothing raises", "fix it: in a run each such rollout would end as task_error", runs, gate=True),
    Rule(
        "both splits have problems",
        "raise BadRow and NotInSplit for single rows only: a run ends where a whole pass has no problem",
        has_problems,
        gate=True,
    ),
    Rule(
        "step() returns a Reply, and all messages are well-formed",
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
        "problem(split, index) returns the same problem every time",
        "make it a function of seed, split and index: no global random state, no counter",
        deterministic,
    ),
    Rule(
        "num_rows(split) returns the number of indices of one pass",
        "return the same positive int every time, or None where the problems are endless",
        num_rows,
        unchecked=without_num_rows,
    ),
    Rule(
        "the splits share no id",
        "keep the evaluation problems out of training, or the evaluation measures memory",
        splits,
    ),
    Rule(
        "every env of a problem is new, starts with the same prompt and shares no image that changes",
        "make a new env in env() and share nothing that changes: advantages compare the siblings of one prompt",
        siblings,
    ),
    Rule(
        "rewards and metrics are finite numbers, and metrics have names",
        "return finite floats under names that are str: in a run each such rollout would end as bad_reward",
        rewards,
    ),
    Rule(
        "episodes end within max_turns, whatever the answers are",
        "return done=True at the last turn, or raise task.max_turns: a run cuts such a rollout off",
        ends,
    ),
    Rule("every turn before the last is followed by a message", "set Reply.messages, or done=True", goes_on),
    Rule(
        "demonstrations are the conversation that their answers lead to",
        "return the messages of reset(), then answer, messages of step(), …, answer, until the env is done",
        demonstrations,
        unchecked=without_demonstrations,
    ),
    Rule(
        "random demonstrations say nothing about the problem",
        "draw their answers from the seed argument alone (random.Random(seed)), not from the problem",
        random_demonstrations,
        unchecked=without_random_demonstrations,
    ),
    Rule(
        "texts() returns the text of prompts and answers",
        "return a tuple of str, e.g. (system_prompt, question)",
        texts,
        unchecked=without_texts,
    ),
)
