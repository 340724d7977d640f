"""What a chat template does beyond writing the messages down, found by comparing renders of short conversations.

Nothing here knows a template. Where content would be lost, a prompt is refused when it is made; these sentences tell
the user before the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from vlmrl.errors import ConfigError, describe
from vlmrl.rendering.template.answers import common_beginning
from vlmrl.rendering.template.chat_template import TODAY, ChatTemplate
from vlmrl.types import Image, Message

OTHER_DAY = datetime(2031, 11, 23)

ONE, TWO, THREE, FOUR = "w00001w", "w00002w", "w00003w", "w00004w"


@dataclass(frozen=True)
class Turns:
    """The texts that a template writes around messages."""

    head: str
    """Before the first user message's text."""
    prompt: str
    """From the end of a user message to where the policy starts to sample."""
    header: str
    """From the end of a user message to the answer, in a conversation that has it."""
    tail: str
    """From the end of an answer to the text of the next user message."""
    last_tail: str
    """After the answer that ends a conversation."""

    @property
    def sampled_prefix(self) -> str:
        """What the template writes before an answer, where a policy has to sample it: the space of `Assistant: yes`."""
        return self.header.removeprefix(self.prompt) if self.header.startswith(self.prompt) else ""

    @staticmethod
    def of(template: ChatTemplate) -> Turns:
        """Raises `ConfigError` for a template that does not render a question and an answer."""
        question, answer, more = Message.of("user", ONE), Message.of("assistant", TWO), Message.of("user", THREE)
        try:
            asked = template.text([question], generate=True)
            answered = template.text([question, answer], generate=False)
            going_on = template.text([question, answer, more], generate=False)
        except Exception as error:
            raise ConfigError(
                f"the checkpoint's chat template does not render a question and an answer ({describe(error)}), so no "
                "conversation can be made with it: correct chat_template.jinja, or choose another renderer"
            ) from error
        if not (ONE in asked and ONE in answered and TWO in answered and TWO in going_on and THREE in going_on):
            raise ConfigError(
                "the checkpoint's chat template leaves out the text of a question or of an answer, so no conversation "
                "can be made with it: correct chat_template.jinja, or choose another renderer"
            )
        return Turns(
            head=asked.partition(ONE)[0],
            prompt=asked.partition(ONE)[2],
            header=answered.partition(ONE)[2].partition(TWO)[0],
            tail=going_on.partition(TWO)[2].partition(THREE)[0],
            last_tail=answered.partition(TWO)[2],
        )


def find_surprises(template: ChatTemplate, turns: Turns, placeholder: str | None) -> tuple[str, ...]:
    """Sentences about a template. `placeholder` is what it writes for an image, None for a text-only model."""

    def text(*messages: Message) -> str | None:
        try:
            return template.text(messages, generate=True)
        except Exception:  # noqa: BLE001 — a template may raise anything about messages that it does not take
            return None

    found = [
        _date(template),
        *_system(text),
        _default_system(text),
        _in_a_row(text),
        _thinking(text),
        _white_space(text),
        _prefix(turns),
        _moved_images(text, placeholder) if placeholder is not None else None,
    ]
    return tuple(f"the chat template {sentence}" for sentence in found if sentence is not None)


Text = Callable[..., str | None]


def _date(template: ChatTemplate) -> str | None:
    days = [template.text([Message.of("user", ONE)], generate=True, today=day) for day in (TODAY, OTHER_DAY)]
    if days[0] == days[1]:
        return None
    return (
        f"writes today's date: every prompt says {TODAY:%d %B %Y}, so that a resumed run and a replay make the same "
        "prompts"
    )


def _system(text: Text) -> list[str | None]:
    begin = (Message.of("system", ONE), Message.of("user", TWO))
    short = text(*begin)
    if short is None:
        return ["refuses a system message"]
    if ONE not in short:
        return ["drops a system message, so a conversation that begins with one is refused"]
    longer = text(*begin, Message.of("assistant", THREE), Message.of("user", FOUR))
    if longer is None or _in_order(longer, ONE, TWO):
        return [None]
    return ["moves the system message into a later turn, so later turns begin new branches"]


def _default_system(text: Text) -> str | None:
    without, given = text(Message.of("user", TWO)), text(Message.of("system", ONE), Message.of("user", TWO))
    if without is None or given is None or ONE not in given:
        return None
    own, other = without.partition(TWO)[0], given.partition(TWO)[0]
    begin = common_beginning(own, other)
    end = min(common_beginning(own[::-1], other[::-1]), len(own) - begin, len(other) - begin)
    added = own[begin : len(own) - end].strip()
    return f"adds a system message of its own where there is none: {added[:200]!r}" if added else None


def _in_a_row(text: Text) -> str | None:
    made = text(Message.of("user", ONE), Message.of("user", TWO))
    if made is None:
        return "refuses two messages of one role in a row"
    if not _in_order(made, ONE, TWO):
        return "drops one of two messages of one role in a row, so such a conversation is refused"
    if not made.partition(ONE)[2].partition(TWO)[0].strip():
        return "merges two messages of one role in a row into one"
    return None


def _thinking(text: Text) -> str | None:
    answer = Message.of("assistant", f"<think>{TWO}</think>{THREE}")
    made = text(Message.of("user", ONE), answer, Message.of("user", FOUR))
    if made is None or TWO in made:
        return None
    return (
        "removes thinking (<think>…</think>) from earlier answers, so a turn after such an answer begins a new branch"
    )


def _white_space(text: Text) -> str | None:
    made = text(Message.of("user", ONE), Message.of("assistant", f"{TWO} \n"), Message.of("user", THREE))
    if made is None or f"{TWO} \n" in made:
        return None
    return "removes white space at the ends of answers, so a turn after such an answer begins a new branch"


def _prefix(turns: Turns) -> str | None:
    if turns.prompt == turns.header:
        return None
    if turns.prompt.startswith(turns.header):
        added = turns.prompt.removeprefix(turns.header)
        return f"begins an answer that is to be sampled with {added!r}, and writes earlier answers without it"
    if turns.sampled_prefix:
        return f"writes {turns.sampled_prefix!r} before an answer, which a policy must sample"
    return f"opens an answer that is to be sampled with {turns.prompt!r}, and earlier ones with {turns.header!r}"


def _moved_images(text: Text, placeholder: str) -> str | None:
    made = text(Message.of("user", ONE, Image(None), TWO))
    if made is None or placeholder not in made:
        return "writes no placeholder for an image in a user message, so a conversation with images is refused"
    if _in_order(made, ONE, placeholder, TWO):
        return None
    return "moves images away from their place between the texts of a message"


def _in_order(text: str, *words: str) -> bool:
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)
