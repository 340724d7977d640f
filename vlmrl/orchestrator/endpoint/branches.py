"""From the requests of a session to the branches of its rollout.

    request 0 ─ answer 0 ─▶ request 1 ─ answer 1 ─▶ request 3 …     branch 0: each prompt extends the turn before it
                    └─────▶ request 2 ─ answer 2                    branch 1: forks from answer 0
    request 4 ─ answer 4                                            branch 2: another agent's conversation

A fork's prompt holds tokens that were sampled in the branch it forks from. They are environment tokens there: each
answer is one turn of one branch, so every sampled token enters the loss once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from vlmrl.types import Message, SamplingParams, Turn, TurnSampling


@dataclass(eq=False)
class Node:
    """A request that was answered."""

    number: int
    """Of the request in its session, from 0."""
    params: SamplingParams
    """How its answer was sampled."""
    written: str
    """The text of its answer as it was sampled, with the stop string that ended it."""
    turn: Turn
    """Its `branch` is filled when the session closes; its `messages` are those after the parent's answer, or all."""
    history: tuple[Message, ...]
    """The messages before `turn.messages`, with answers as they were sampled; empty without a parent."""
    parent: Node | None
    """The answer that its conversation extends."""
    is_bridged: bool
    """Whether its prompt begins with the parent's tokens. False with a parent: a bridge break."""
    lane: str = ""
    """As in `ChatRequest`."""
    children: list[Node] = field(default_factory=list)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Everything up to its answer, which is the text that was sampled."""
        return (*self.history, *self.turn.messages, Message.of("assistant", self.written))


def turns_of(nodes: Sequence[Node], noted: Callable[[SamplingParams, int], TurnSampling | None]) -> list[Turn]:
    """The turns of a rollout, ordered by branch. `noted`: how a turn was sampled, and its place in the rollout → its
    `Turn.sampling`.

    The first bridged child of a turn continues its branch. Every other child and every conversation of its own is a
    branch of its own, whose first turn has all messages of its prompt (`starts_over`). Only a bridge break at the end
    of a branch does not start over: it follows the turn that it could not extend, as in any rollout.
    """
    turns: list[Turn] = []
    placed: set[int] = set()
    for first in sorted(nodes, key=lambda node: node.number):
        if id(first) in placed:
            continue
        chain: Node | None = first
        follows = False
        while chain is not None:
            branch = turns[-1].branch + 1 if turns else 0
            for number, node in enumerate(_chain(chain)):
                placed.add(id(node))
                starts_over = number == 0 and not follows and bool(turns)
                messages = [*node.history, *node.turn.messages] if starts_over else node.turn.messages
                sampling = noted(node.params, len(turns))
                turn = replace(node.turn, branch=branch, messages=messages, starts_over=starts_over, sampling=sampling)
                turns.append(turn)
                last = node
            chain = _first(child for child in last.children if not child.is_bridged)
            follows = True
    return turns


def _chain(node: Node | None) -> Iterator[Node]:
    """A node, its first bridged child, that one's first bridged child, …"""
    while node is not None:
        yield node
        node = _first(child for child in node.children if child.is_bridged)


def _first(nodes: Iterable[Node]) -> Node | None:
    return min(nodes, key=lambda node: node.number, default=None)
