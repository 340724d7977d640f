"""Estimate how many tokens an episode takes, without a tokenizer:

    tokens = Σ images (vision tokens + 2) + turns × (max_new_tokens + 10) + characters / 4

The family counts the vision tokens of an image exactly (for Qwen3-VL, one token per 32 × 32 pixels after the image
processor has rounded and scaled the sides), and 2 tokens enclose them. A chat template puts about 10 tokens around the
messages of a turn. A token of a large vocabulary holds about 4 characters of English; one of the tiny model's few
hundred tokens, which are trained on the task's own words, holds 2.

A program that plays its problem itself (task=program) is not started for this. The images and texts of its rows count,
and its own prompts do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vlmrl.errors import UserFault
from vlmrl.models.families.base import Family, ImageBounds
from vlmrl.preflight.estimate.sizes import CHARACTERS_PER_TOKEN, TURN_FRAME
from vlmrl.rendering.images import decode
from vlmrl.tasks.base import BadRow, NoProblem, Split, StepInfo, Task
from vlmrl.tasks.border import get_problem
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.tasks.programs.problems import played_outside
from vlmrl.types import Image, Message, Text


@dataclass(frozen=True)
class EpisodeEstimate:
    """Turns, images and text of the longest conversation of one problem. An episode has several where its env replaces
    the conversation (`Reply.history`)."""

    turns: int
    images: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each image; an image that is shown twice counts twice."""
    characters: int
    """Characters of all prompts and replies together."""
    conversations: int = 1
    """How many the episode has; each is a sample of its own."""

    def tokens(
        self,
        max_new_tokens: int,
        family: Family,
        bounds: ImageBounds | None,
        characters_per_token: int = CHARACTERS_PER_TOKEN,
    ) -> int:
        """The most tokens that the episode takes, by the formula at the top. Without `bounds` images count 0 tokens."""
        shown = 0
        if bounds is not None:
            shown = sum(family.image_tokens(*size, bounds) + family.frame_tokens for size in self.images)
        return shown + self.turns * (max_new_tokens + TURN_FRAME) + math.ceil(self.characters / characters_per_token)


SAMPLES = 8
"""Problems that are tried until one can be played."""

INDICES = 256
"""Indices that are looked at for those problems; an index may have none."""


def play(task: Task, max_turns: int, split: Split = "train") -> tuple[EpisodeEstimate, list[str]]:
    """Play the first problem of a split that can be played, with empty answers, until it ends or `max_turns` are
    reached.

    Returns what was wrong before it, too: each fault costs a run one rollout, each bad row only itself. Raises
    `UserFault` where none of the first `SAMPLES` problems can be played, or where there is none.
    """
    called = "training" if split == "train" else "held-out"
    notes: list[str] = []
    faults: list[str] = []
    bad_rows: list[str] = []
    for index in range(INDICES):
        try:
            return _played(task, split, index, max_turns), notes
        except BadRow as bad:
            bad_rows.append(str(bad))
            notes.append(f"{called} index {index} has no problem ({bad}); a run takes the next one")
        except NoProblem:
            continue
        except UserFault as fault:
            faults.append(f"{called} problem {index}: {fault.text}")
            notes.append(f"{faults[-1]}; in a run it costs one rollout")
            if len(faults) == SAMPLES:
                break
    none = f"the {called} split has no problem at its first {INDICES} indices"
    raise UserFault(next(iter([*faults, *bad_rows]), none))


def _played(task: Task, split: Split, index: int, max_turns: int) -> EpisodeEstimate:
    problem, _ = get_problem(task, split, index)
    if (outside := played_outside(problem)) is not None:
        messages = list(outside.messages)
        return EpisodeEstimate(max_turns, tuple(_images(messages)), sum(map(len, _texts(messages))))
    with OpenEnv(task, problem) as env:
        first = finished(env.reset())
        conversations = [(list(first), 1)]
        for turn in range(1, max_turns):
            reply = finished(env.step("", StepInfo.of_text("", turn)))
            if reply.done:
                break
            if reply.history is not None:
                answers = sum(message.role == "assistant" for message in reply.history)
                conversations.append((list(reply.history), answers + 1))
            else:
                messages, turns = conversations[-1]
                conversations[-1] = ([*messages, *reply.messages], turns + 1)
    found = [
        EpisodeEstimate(turns, tuple(_images(messages)), sum(map(len, _texts(messages))), len(conversations))
        for messages, turns in conversations
    ]
    return max(found, key=lambda one: (len(one.images), one.characters, one.turns))


def _images(messages: list[Message]) -> list[tuple[int, int]]:
    return [_size(part.source) for message in messages for part in message.content if isinstance(part, Image)]


def _texts(messages: list[Message]) -> list[str]:
    return [part.text for message in messages for part in message.content if isinstance(part, Text)]


def _size(source: Any) -> tuple[int, int]:
    """(width, height) of an image as a task hands it in. Raises `ImageError`."""
    height, width = decode(source).shape[:2]
    return width, height
