"""Families with videos are trained and sampled: packing, adapters, frozen parts, and the embedded engine's logprobs.

film and picture, question  answer A                    a bridged turn with a new film  answer
                            answer B                    siblings share the first prompt
short film, question        answer                      shares nothing
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from support.families.clips import LONG, MESSAGES, SHORT, WITH_VIDEOS, video_renderer, vlm_of
from support.families.learning import Folder, Learning, learning
from support.packages import needs_videos
from support.vllm_tiny import mismatch_kl
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import (
    Completion,
    Message,
    MMItem,
    Prompt,
    SamplingParams,
    TrainingSample,
    VideoItem,
    mm_token_type_ids,
)

IN_DEPTH = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Seconds between frames, times in the text, linear attention."""

IN_FLOAT32 = 1e-8
"""Largest mismatch_kl/mean between the engine and the trainer."""


@dataclass
class Played:
    """A prompt and what the engine sampled for it."""

    prompt: Prompt
    completion: Completion


@dataclass
class Case:
    family: Learning
    renderer: FamilyRenderer

    @property
    def in_depth(self) -> bool:
        return self.family.folder.name in IN_DEPTH

    def trainer(self, family: Learning, packing: Packing = Packing.tree) -> LocalTrainer:
        config = TrainerConfig(learning_rate=1e-3, eps=1e-4, packing=packing)
        return LocalTrainer(family.policy(), config, AlgorithmConfig(), temperature=1.0, max_new_tokens=8)

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(4, 1.0, (), self.renderer.banned_token_ids, seed)


@pytest.fixture(scope="module", params=WITH_VIDEOS)
def case(request: pytest.FixtureRequest, family_folder: Folder) -> Case:
    needs_videos()
    torch.set_num_threads(1)
    folder, vlm = family_folder(request.param), vlm_of(request.param)
    family = learning(folder)
    assert family.config.model.vlm is not None
    assert family.config.model.vlm.video == vlm.video, "model=auto found the token of a video"
    renderer = video_renderer(folder, vlm)
    return Case(replace(family, banned=renderer.banned_token_ids), renderer)


async def play(case: Case, engine: EmbeddedEngine) -> list[Played]:
    """Two siblings with two turns each, next to a conversation of one turn."""
    first = await case.renderer.first_turn(MESSAGES)
    other = await case.renderer.first_turn([Message.of("user", SHORT, "What is it?")])

    async def conversation(name: str, prompt: Prompt, seed: int, *, goes_on: bool) -> list[Played]:
        async with engine.session(name) as session:
            turns = [Played(prompt, await session.generate(prompt, case.sampling(seed)))]
            if goes_on:
                new = [Message.of("user", "And here? ", SHORT, " with ", LONG)]
                answer = turns[0].completion.token_ids
                history = [*MESSAGES, Message.of("assistant", case.renderer.decode(answer))]
                longer, is_bridged = await case.renderer.next_turn(prompt, answer, history, new)
                # Qwen3.5's template drops the reasoning of earlier turns, so it renders the conversation again.
                assert is_bridged == ("qwen3_5" not in str(case.family.folder))
                turns.append(Played(longer, await session.generate(longer, case.sampling(seed + 10))))
            return turns

    asked = [("0/0", first, 0, True), ("0/1", first, 1, True), ("1/0", other, 2, False)]
    played = await asyncio.gather(*(conversation(name, p, seed, goes_on=more) for name, p, seed, more in asked))
    return [turn for turns in played for turn in turns]


def samples_of(played: Sequence[Played]) -> list[TrainingSample]:
    return [_sample(str(number), turn) for number, turn in enumerate(played)]


def _sample(name: str, turn: Played) -> TrainingSample:
    ids = np.concatenate([turn.prompt.token_ids, turn.completion.token_ids])
    mask = np.arange(len(ids)) >= len(turn.prompt.token_ids)
    zeros = np.zeros(len(turn.prompt.token_ids), np.float32)
    return TrainingSample(
        rollout_id=name,
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), turn.prompt.placeholders),
        loss_mask=mask,
        advantages=np.where(mask, 1.0 - 2 * (int(name) % 2), 0).astype(np.float32),
        inference_logprobs=np.concatenate([zeros, turn.completion.logprobs]),
        versions=np.where(mask, 0, -1),
        placeholders=turn.prompt.placeholders,
        mm_items=turn.prompt.mm_items,
    )


def mismatch(trainer: LocalTrainer, played: Sequence[Played], samples: Sequence[TrainingSample]) -> float:
    sampled = np.concatenate([turn.completion.logprobs for turn in played])
    return mismatch_kl(sampled, np.concatenate(trainer.logprobs(list(samples))))


def engine_of(trainer: LocalTrainer) -> EmbeddedEngine:
    return EmbeddedEngine(trainer._learner.policy, lambda: trainer.version, 4096)


def test_the_engine_samples_what_the_trainer_learns(case: Case) -> None:
    """Before a step and after it, in all packings; and a film with two frames exchanged is another one."""
    trainer = case.trainer(case.family)
    for _ in range(2):
        played = asyncio.run(play(case, engine_of(trainer)))
        samples = samples_of(played)
        assert mismatch(trainer, played, samples) <= IN_FLOAT32
        for packing in (Packing.varlen, Packing.none) if case.in_depth else (Packing.none,):
            other = case.trainer(case.family, packing)
            other._learner.policy.model.load_state_dict(trainer._learner.policy.model.state_dict())
            assert mismatch(other, played, samples) <= IN_FLOAT32
        assert mismatch(trainer, played, [exchanged(sample) for sample in samples]) > 1e3 * IN_FLOAT32
        assert trainer.train_step(samples).metrics["grad_norm"] > 1e-3


@pytest.mark.parametrize("how", ["freeze_vision", "adapted"])
def test_a_frozen_tower_and_adapters(case: Case, how: str) -> None:
    if not case.in_depth:
        pytest.skip("families of each kind are enough")
    if how == "adapted":
        pytest.importorskip("peft")
    trainer = case.trainer(case.family.adapted() if how == "adapted" else case.family.frozen(freeze_vision=True))
    played = asyncio.run(play(case, engine_of(trainer)))
    samples = samples_of(played)
    trainer.train_step(samples)
    again = asyncio.run(play(case, engine_of(trainer)))
    assert mismatch(trainer, again, samples_of(again)) <= IN_FLOAT32
    assert mismatch(trainer, played, samples) > IN_FLOAT32, "the step changed the policy"


def exchanged(sample: TrainingSample) -> TrainingSample:
    """The sample with the first two grids of its first film exchanged, under another hash."""
    item = next(item for item in sample.mm_items if isinstance(item, VideoItem))
    pixels = item.mm_kwargs["pixel_values_videos"]
    frame = len(pixels) // int(item.mm_kwargs["video_grid_thw"][0, 0])
    other = np.concatenate([pixels[frame : 2 * frame], pixels[:frame], pixels[2 * frame :]])
    wrong = replace(item, hash=f"exchanged {item.hash}", mm_kwargs={**item.mm_kwargs, "pixel_values_videos": other})

    def new(each: Any) -> Any:
        return replace(each, hash=f"exchanged {item.hash}") if each.hash == item.hash else each

    items: list[MMItem] = [wrong if each is item or each.hash == item.hash else each for each in sample.mm_items]
    return replace(sample, mm_items=tuple(items), placeholders=tuple(map(new, sample.placeholders)))


def test_a_prompt_that_ends_with_a_film(case: Case) -> None:
    """The first sampled token stands where the trainer counts it, not behind the largest position of the film."""
    whole = asyncio.run(case.renderer.first_turn([Message.of("user", "Look: ", LONG)]))
    (place,) = whole.placeholders
    prompt = Prompt(whole.token_ids[: place.offset + place.length], whole.placeholders, whole.mm_items)
    trainer = case.trainer(case.family)

    async def generate() -> Completion:
        async with engine_of(trainer).session("0") as session:
            return await session.generate(prompt, case.sampling(3))

    played = [Played(prompt, asyncio.run(generate()))]
    assert mismatch(trainer, played, samples_of(played)) <= IN_FLOAT32
