"""The embedded engine with text models of any architecture: its logprobs are those of the model's own forward."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from support.text_models import EXACT, VOCABULARY, policy_of
from vlmrl.inference.embedded.engine import EmbeddedEngine, EmbeddedSession
from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.policy import Policy
from vlmrl.models.trial import own_attention
from vlmrl.types import Completion, IntArray, Prompt, SamplingParams

REPLIES = (7, 9)
"""Tokens of the messages after the first one."""


def some(count: int, seed: int) -> IntArray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count)


def play(policy: Policy) -> list[list[tuple[Prompt, Completion]]]:
    """Four conversations of three turns: two begin alike, one parts from them, one stands alone."""
    start = some(30, 0)
    first = [start, start, np.concatenate([start[:20], some(6, 1)]), some(40, 2)]

    async def one(session: EmbeddedSession, number: int) -> list[tuple[Prompt, Completion]]:
        ids, turns = first[number], []
        async with session:
            for turn, reply in enumerate([*REPLIES, 0]):
                asked = Prompt(ids, (), ())
                said = await session.generate(asked, SamplingParams(5, 1.0, (), (), 10 * number + turn))
                turns.append((asked, said))
                ids = np.concatenate([ids, said.token_ids, some(reply, 10 * number + turn)])
        return turns

    async def all_of_them() -> list[list[tuple[Prompt, Completion]]]:
        engine = EmbeddedEngine(policy, lambda: 0, 512)
        sessions = [engine.session(str(number)) for number in range(len(first))]
        return await asyncio.gather(*(one(session, number) for number, session in enumerate(sessions)))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("family", EXACT)
def test_sampled_logprobs_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_plan, "MIN_SHARED_PAIRS", 64)  # prefixes become shared blocks
    policy = policy_of(family)
    for turns in play(policy):
        last, completion = turns[-1]
        ids = torch.from_numpy(np.concatenate([last.token_ids, completion.token_ids]))[None]
        with torch.inference_mode(), own_attention(policy):
            out = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        wanted = out.logits[0].double().log_softmax(-1)
        for asked, said in turns:
            at = len(asked.token_ids) + np.arange(len(said.token_ids))
            np.testing.assert_allclose(said.logprobs, wanted[at - 1, said.token_ids].numpy(), atol=2e-5)
