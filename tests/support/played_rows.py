"""Conversations with the embedded engine, decoded by rows or by the reference."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.helpers import END, extended, image, prompt
from vlmrl.inference.embedded import generator
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, IntArray, Prompt, SamplingParams

CLOSE = 1e-5
"""Nats."""

SYSTEM = list(range(40, 70))


def params(seed: int, tokens: int = 6, **others: Any) -> SamplingParams:
    plain = SamplingParams(tokens, temperature=1.0, stop_token_ids=(END,), banned_token_ids=(), seed=seed)
    return replace(plain, **others)


def spelled(token_ids: IntArray) -> str:
    return "".join(f"<{token}>" for token in token_ids)


Turn = tuple[Prompt, Completion]


def play(
    policy: Policy,
    asked: Sequence[tuple[Prompt, SamplingParams]],
    turns: int,
    by_rows: bool,
    patch: pytest.MonkeyPatch,
    *,
    is_rolling: bool = False,
) -> tuple[list[list[Turn]], EmbeddedEngine]:
    """Conversations of some turns; the replies between them have an image where the first prompt has one."""
    patch.setattr(generator, "decodes_by_rows", lambda _: by_rows)
    engine = EmbeddedEngine(policy, lambda: 0, 2048, spelled, is_rolling=is_rolling)

    async def one(session: Any, first: Prompt, sampling: SamplingParams) -> list[Turn]:
        found: list[Turn] = []
        async with session:
            for turn in range(turns):
                said = await session.generate(first, replace(sampling, seed=sampling.seed + turn))
                found.append((first, said))
                reply = [[9, 8], image(3, 1), 7] if first.mm_items else [[9, 8, 7]]
                first = extended(first, said.token_ids, *reply)
        return found

    async def everything() -> list[list[Turn]]:
        sessions = [engine.session(str(number)) for number in range(len(asked))]
        return await asyncio.gather(*(one(session, *each) for session, each in zip(sessions, asked, strict=True)))

    return asyncio.run(everything()), engine


def assert_equal_turns(wanted: Sequence[Sequence[Turn]], found: Sequence[Sequence[Turn]]) -> None:
    """Equal tokens, ends and supports, and logprobs within `CLOSE`."""
    for theirs, ours in zip(wanted, found, strict=True):
        for (_, expected), (_, said) in zip(theirs, ours, strict=True):
            assert said.token_ids.tolist() == expected.token_ids.tolist()
            np.testing.assert_allclose(said.logprobs, expected.logprobs, atol=CLOSE, rtol=0)
            assert (said.finish_reason, said.stop) == (expected.finish_reason, expected.stop)
            assert (said.supports is None) == (expected.supports is None)
            if said.supports is not None and expected.supports is not None:
                assert said.supports.token_ids.tolist() == expected.supports.token_ids.tolist()
                assert said.supports.offsets.tolist() == expected.supports.offsets.tolist()


def groups(sizes: Sequence[int], **others: Any) -> list[tuple[Prompt, SamplingParams]]:
    return [
        (
            prompt(SYSTEM, [number], image(2, 3), [5], image(1, 1, number), [7] * (number + 1)),
            params(1000 * number + 10 * i, **others),
        )
        for number, size in enumerate(sizes)
        for i in range(size)
    ]
