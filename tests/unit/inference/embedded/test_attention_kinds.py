"""The embedded engine with windows, soft caps and images that see themselves: its logprobs are transformers'."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from support import attention_kinds as kinds
from support.attention_kinds import IMAGE, Part, image, prompt
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, Placeholder, Prompt, SamplingParams, mm_token_type_ids

Turns = list[tuple[Prompt, Completion]]


def extended(before: Prompt, completion: Completion, *parts: Part) -> Prompt:
    more = prompt(*parts)
    start = len(before.token_ids) + len(completion.token_ids)
    return Prompt(
        np.concatenate([before.token_ids, completion.token_ids, more.token_ids]),
        (*before.placeholders, *(Placeholder(start + p.offset, p.length, p.hash) for p in more.placeholders)),
        (*before.images, *more.images),
    )


def conversations(name: str) -> list[tuple[Prompt, list[list[Part]]]]:
    """First prompts and the replies to them. A prompt may end with an image, so that its last token, which a later turn
    computes again, lies in a run of image tokens."""
    start = [1, 2, 3, 4, 5, 6]
    texts: list[tuple[Prompt, list[list[Part]]]] = [
        (prompt(start), [[[7, 8]], [[9]]]),
        (prompt(start), [[[7, 8]], [[9]]]),
        (prompt([*start, 7]), [[[1] * 9]]),
    ]
    if name not in kinds.SEE_IMAGES:
        return texts
    first, second = image(name, 1), image(name, 2)
    return [
        *texts,
        (prompt(start, first), [[[7], second], [[9]]]),
        (prompt(start, first), [[[7], second], [[9]]]),
        (prompt(start, first, [8]), [[second, [9]]]),
        (prompt(second, [1]), [[[2], first, [3]]]),
    ]


def play(policy: Policy, given: list[tuple[Prompt, list[list[Part]]]]) -> list[Turns]:
    async def one(session: Any, seed: int, asked: Prompt, replies: list[list[Part]]) -> Turns:
        turns: Turns = []
        async with session:
            for number, reply in enumerate([*replies, []]):
                completion = await session.generate(asked, SamplingParams(4, 1.0, (), (IMAGE,), 10 * seed + number))
                turns.append((asked, completion))
                asked = extended(asked, completion, *reply)
        return turns

    async def main() -> list[Turns]:
        engine = EmbeddedEngine(policy, lambda: 0, 512)
        sessions = [engine.session(str(i)) for i in range(len(given))]
        return await asyncio.gather(
            *(one(session, i, *each) for i, (session, each) in enumerate(zip(sessions, given, strict=True)))
        )

    return asyncio.run(main())


@pytest.mark.parametrize(("window", "threshold"), [(1, 16384), (3, 1), (7, 12), (12, 1), (64, 1)])
@pytest.mark.parametrize("name", list(kinds.MODELS))
def test_sampled_logprobs_are_those_of_transformers(
    name: str, window: int, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_plan, "MIN_SHARED_PAIRS", threshold)
    monkeypatch.setattr(tree_plan, "MIN_WINDOWED_ROWS", 4)
    theirs = kinds.build(name, window).double()
    for turns in play(Policy(kinds.build(name, window), position_function("sequential"), [IMAGE]), conversations(name)):
        last, completion = turns[-1]
        ids = np.concatenate([last.token_ids, completion.token_ids])
        with torch.no_grad():
            types = mm_token_type_ids(len(ids), last.placeholders)
            logits = kinds.plain_logits(theirs, ids, types, last.images).double()
        logits[:, IMAGE] = -torch.inf
        wanted = torch.log_softmax(logits, -1)
        for asked, said in turns:
            at = len(asked.token_ids) + np.arange(len(said.token_ids))
            np.testing.assert_allclose(said.logprobs, wanted[at - 1, said.token_ids].numpy(), atol=1e-5)
