"""`reward=judge`: the opinion of another model, from 0 to 1.

    attempts of a group ─▶ images encoded once ─▶ one request per distinct text ─▶ score ─▶ (score - low) / (high - low)

What is asked, and what keeps a completion from instructing the judge, is in `judge_prompt.py`; retries, limits, the
cache and the key are in `judge_client.py`.

A rollout that the judge did not score is a fault by default, with the reason, and is not learned from. If the term
abstained instead, that rollout's reward would be on another scale than its siblings', and the advantage would reward or
punish the endpoint's failures; `on_failure=abstain` is for judges that stand alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from vlmrl.config.reward import JudgeFailure, JudgeTerm
from vlmrl.errors import UserFault
from vlmrl.rewards.base import Attempt, RewardError, RunBlocking, Score, Scored
from vlmrl.rewards.judge_client import JudgeClient
from vlmrl.rewards.judge_prompt import image_parts, judge_prompt, score_parser
from vlmrl.rewards.slots import Slots


class JudgeReward:
    """The reward term at `key`. Raises `ConfigError` where the template, the pattern, the range or the key cannot be
    used."""

    def __init__(self, term: JudgeTerm, key: str, run_blocking: RunBlocking) -> None:
        self._term = term
        self._run_blocking = run_blocking
        self._render = judge_prompt(term, key)
        self._parse = score_parser(term, key)
        self._client = JudgeClient(term, key)
        self._slots = Slots(term.concurrency)

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        """A value from 0 to 1 per attempt; 0 without asking where the completion has no answer."""
        images = await self._images_of(attempts)
        asked: dict[tuple[str, int], asyncio.Task[Score]] = {}  # siblings with the same text share a request
        texts: list[tuple[str, int] | Score] = []
        async with asyncio.TaskGroup() as group:
            for attempt in attempts:
                if attempt.answer is None:
                    texts.append(Scored(0.0, _metrics()))
                    continue
                try:
                    text = (self._render(attempt), id(attempt.prompt))
                except RewardError as fault:
                    texts.append(self._failed(fault))
                    continue
                if text not in asked:
                    asked[text] = group.create_task(self._ask(text[0], images[text[1]]))
                texts.append(text)
        return [asked[each].result() if isinstance(each, tuple) else each for each in texts]

    async def _images_of(self, attempts: Sequence[Attempt]) -> dict[int, list[dict[str, Any]] | UserFault]:
        """The images of each distinct prompt, by its identity: the siblings of a group share one."""
        prompts = {id(attempt.prompt): attempt.prompt for attempt in attempts}
        if not self._term.images:
            return {identity: [] for identity in prompts}
        return {identity: await self._encoded(prompt) for identity, prompt in prompts.items()}

    async def _encoded(self, prompt: Any) -> list[dict[str, Any]] | UserFault:
        def encode() -> list[dict[str, Any]] | UserFault:
            try:
                return image_parts(prompt)
            except UserFault as fault:
                return RewardError(f"the judge cannot see the prompt: {fault.text}")

        return await self._run_blocking(encode)

    async def _ask(self, text: str, images: list[dict[str, Any]] | UserFault) -> Score:
        if isinstance(images, UserFault):
            return self._failed(images)
        try:
            async with self._slots.mine():
                value, is_cached = await self._client.ask([*images, {"type": "text", "text": text}], self._parse)
        except RewardError as fault:
            return self._failed(fault)
        return Scored(value, _metrics(is_cached=is_cached))

    def _failed(self, fault: UserFault) -> Score:
        if self._term.on_failure is JudgeFailure.abstain:
            return Scored(None, _metrics(is_failure=True))
        return fault


def _metrics(*, is_cached: bool = False, is_failure: bool = False) -> dict[str, float]:
    """The shares of answers whose reply came from the cache, and of answers without a score."""
    return {"cached": float(is_cached), "failures": float(is_failure)}
