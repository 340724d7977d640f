"""Where the answers of a conversation begin and end, found by comparing renders of a chat template.

    with another answer in its place        …<|im_start|>assistant\\n alpha7 <|im_end|>\\n…
                                            …<|im_start|>assistant\\n bravo8 <|im_end|>\\n…
    common prefix, common suffix            where the answer stands
    the conversation up to the answer,      where the policy starts to sample, which may be before the answer: a
    with a generation prompt                template may write an empty `<think>` block that a policy must sample

`{% generation %}` tags are not needed: most templates have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmrl.errors import UserFault
from vlmrl.types import Message

PROBES = ("alpha7", "bravo8")
"""Two answers without a common first or last character."""

RenderText = Callable[..., str]
"""`ChatTemplate.text`."""


@dataclass(frozen=True)
class Answer:
    """The characters `begin` to `end` of a conversation's text, which a policy would have sampled."""

    message: int
    begin: int
    end: int
    is_closed: bool
    """Whether the template wrote the token that closes the turn; it is part of the answer then."""


def find_answers(messages: Sequence[Message], whole: str, text: RenderText, closing: str) -> list[Answer]:
    """The answers in `whole`, the text of `messages`. `closing` is what closes a turn, up to the stop token. Raises
    `UserFault` where the template writes an answer in another way than a policy samples it."""
    found = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        first, second = (
            text([*messages[:index], Message.of("assistant", probe), *messages[index + 1 :]], generate=False)
            for probe in PROBES
        )
        header = common_beginning(first, second)
        tail = first[len(first) - common_beginning(first[::-1], second[::-1]) :]
        begin = _begin(messages[:index], whole, first[:header], text)
        end = len(whole) - len(tail)
        if begin is None or not whole.endswith(tail) or end < begin:
            raise UserFault(
                f"message {index + 1} of {len(messages)} (assistant) is written in another way than a policy samples "
                "it, because the chat template changes it: shorten the conversation so that it ends with this message, "
                "or take out what the template removes"
            )
        is_closed = tail.startswith(closing)
        found.append(Answer(index, begin, end + len(closing) if is_closed else end, is_closed))
    return found


def common_beginning(a: str, b: str) -> int:
    """Length of the common beginning of two texts.

    >>> common_beginning("assistant: a", "assistant: b")
    11
    """
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _begin(before: Sequence[Message], whole: str, header: str, text: RenderText) -> int | None:
    """Where the policy starts to sample; None where neither comparison tells."""
    if before:
        prompt = text(before, generate=True)
        if whole.startswith(prompt):
            return len(prompt)
    return len(header) if whole.startswith(header) else None
