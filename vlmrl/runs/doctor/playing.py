"""The doctor's rollouts: the run's first problems, each as it is and in noise, played by any engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import AsyncExitStack

import numpy as np

from vlmrl.config.model import most_frames
from vlmrl.config.run import RunConfig
from vlmrl.config.task import most_turns
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.rollout import RolloutRunner, sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.sampling import OwnSampling, Truncation
from vlmrl.orchestrator.stream import Drawn, ProblemStream
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.doctor.envs import DoctorEnvs
from vlmrl.runs.doctor.evidence import Evidence, media_of, with_media
from vlmrl.runs.doctor.noise_images import NoiseTask
from vlmrl.runs.doctor.watching import ScriptedEngine, WatchedEngine, WatchedRenderer, watched_rows
from vlmrl.tasks.base import Task
from vlmrl.types import (
    Group,
    Image,
    InferenceEngine,
    IntArray,
    Message,
    Prompt,
    Rollout,
    StopReason,
    TrainingSample,
    Turn,
    Video,
)

PROBLEMS = 6
"""Half of them are the run's first problems, the others the same with noise for images (noise_images.py)."""
SIBLINGS = 2
"""Sampled rollouts per problem; one more is greedy."""
MAX_TURNS = 3
MAX_NEW_TOKENS = 16
"""Per completion. A disagreement shows within a few tokens, or not at all."""

WHOLE_CONTEXT = 2**24
"""Tokens of a context without limit."""


@dataclasses.dataclass(frozen=True)
class Playing:
    """Plays the problems of a task through a renderer, with a given engine."""

    config: RunConfig
    task: Task
    renderer: Renderer
    problems: int = PROBLEMS
    is_whole: bool = False
    """Whether episodes are played without the run's limits of turns and context."""
    tools: Toolbox | None = None
    """The tools of the run."""

    async def scripted(self, answer: IntArray) -> list[Rollout]:
        """One rollout per problem in which the answer to every turn is `answer`, int64 [C] without a stop token."""
        engine = ScriptedEngine(np.append(answer, self.renderer.stop_token_ids[0]))
        runner = self._runner(self.renderer, engine)
        try:
            groups = await runner.run_groups(
                split="train", step=0, problems=await self._problems(), group_size=1, temperature=0.0
            )
        finally:
            await runner.envs.stop()
        return [rollout for group in groups for rollout in group.rollouts]

    async def sampled(self, engine: InferenceEngine, version: int, policy: Policy) -> Evidence:
        """The problems, sampled and greedy, played by policy version `version` in `engine`."""
        renderer, watched = WatchedRenderer(self.renderer), WatchedEngine(engine)
        runner = self._runner(renderer, watched)
        groups: list[Group] = []
        try:
            with watched_rows(policy) as rows:
                for size, temperature in ((SIBLINGS, self.config.orchestrator.temperature), (1, 0.0)):
                    groups += await runner.run_groups(
                        split="train",
                        step=version,
                        problems=await self._problems(),
                        group_size=size,
                        temperature=temperature,
                    )
        finally:
            await runner.envs.stop()
        return Evidence(groups, renderer.rendered, watched.requests, rows.distinct())

    async def answered(self, engine: InferenceEngine, prompts: Sequence[Prompt]) -> list[TrainingSample]:
        """A training sample for each prompt with one completion that `engine` samples."""
        config, renderer = self.config, self.renderer
        limit = min(config.orchestrator.max_new_tokens, MAX_NEW_TOKENS)
        own = OwnSampling(
            config.orchestrator.temperature,
            renderer.stop_token_ids,
            renderer.banned_token_ids,
            Truncation.learned(config),
        )
        async with AsyncExitStack() as stack:
            names = [f"doctor/images/{i:02d}" for i in range(len(prompts))]
            # All sessions are open before the first request: an engine may wait for every open session to ask.
            sessions = [await stack.enter_async_context(engine.session(name)) for name in names]
            completions = await asyncio.gather(
                *(
                    session.generate(
                        prompt,
                        own.params(
                            min(limit, self._max_model_len - len(prompt.token_ids)), sampling_seed(config.seed, name, 0)
                        ),
                    )
                    for session, prompt, name in zip(sessions, prompts, names, strict=True)
                )
            )
        samples: list[TrainingSample] = []
        for name, prompt, completion in zip(names, prompts, completions, strict=True):
            turn = Turn(prompt, completion, text="", messages=[], branch=0, reward=0.0)
            samples += make_samples(Rollout(name, name, 0, [turn], 0.0, {}, StopReason.TERMINATED))
        return samples

    async def shown_twice(self, evidence: Evidence) -> Prompt | None:
        """A first prompt in which one image or video stands at two places; None where no first turn shows any."""
        openings = evidence.openings()
        return await self.renderer.first_turn(_first_twice(openings[0])) if openings else None

    async def inverted(self, openings: Sequence[Sequence[Message]]) -> list[Prompt]:
        """Each opening as a prompt, followed by the prompt with its pixels inverted, whose tokens are equal. Where a
        turn has several images, or several videos, the first of them is shown twice."""
        shown: list[Prompt] = []
        for opening in openings:
            messages = opening if (twins := _twins(opening)) is None else with_media(opening, twins)
            inverted = with_media(messages, [_inverted(part) for part in media_of(messages)])
            shown += [await self.renderer.first_turn(messages), await self.renderer.first_turn(inverted)]
        return shown

    @property
    def _max_model_len(self) -> int:
        return WHOLE_CONTEXT if self.is_whole else self.config.inference.max_model_len

    async def _problems(self) -> list[Drawn]:
        """The task's first problems, each as it is and in noise."""
        return await ProblemStream(NoiseTask(self.task, self.config.model.vlm), "train").draw(0, self.problems)

    def _runner(self, renderer: Renderer, engine: InferenceEngine) -> RolloutRunner:
        config = self.config
        return RolloutRunner(
            envs=DoctorEnvs(config, self.task),
            renderer=renderer,
            engine=engine,
            seed=config.seed,
            max_turns=MAX_TURNS if self.is_whole else min(most_turns(config.task), MAX_TURNS),
            max_new_tokens=min(config.orchestrator.max_new_tokens, MAX_NEW_TOKENS),
            max_model_len=self._max_model_len,
            max_frames=most_frames(config.model),
            truncation=Truncation.learned(config),
            stop=tuple(config.orchestrator.stop),
            tools=self.tools,
        )


def _inverted(part: Image | Video) -> Image | Video:
    """The same pixels, inverted; the frames of a video at the same times."""
    return dataclasses.replace(part, source=255 - part.source)


def _first_twice(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with their first image or video also in place of the second of its kind, or behind the first where
    no kind has two."""
    if (twins := _twins(messages)) is not None:
        return with_media(messages, twins)
    first = media_of(messages)[0]
    return tuple(
        dataclasses.replace(message, content=(*message.content, first)) if first in message.content else message
        for message in messages
    )


def _twins(messages: Sequence[Message]) -> list[Image | Video] | None:
    """The images and videos, with the first of a kind also in place of the second; None where no kind has two."""
    media = media_of(messages)
    for kind in (Image, Video):
        places = [place for place, part in enumerate(media) if isinstance(part, kind)]
        if len(places) > 1:
            media[places[1]] = media[places[0]]
            return media
    return None
