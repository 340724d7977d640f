"""The same episodes as a Task and through the endpoint, over HTTP: equal tokens, pixels and logprobs."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import PIL.Image
import pytest
import torch

from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer, resolve_checkpoint
from vlmrl.models.families import family_of
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.server import Endpoint
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.rollout import RolloutRunner, sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.tasks.base import Reply, StepInfo
from vlmrl.types import Image, Message, Turn

EPISODES, TURNS, NEW_TOKENS = 6, 4, 12
MAX_MODEL_LEN = 2048
STOP = ("s", "e", "a", "t", "i")
"""So that most answers of random weights end, and the episodes go on."""


def pixels(problem: int, turn: int) -> np.ndarray:
    return np.random.default_rng((problem, turn)).integers(0, 256, (64, 64, 3), np.uint8)


class Problem:
    def __init__(self, number: int) -> None:
        self.id, self.number = f"problem {number}", number


class Pictures:
    """Shows a new picture in each turn."""

    def problem(self, split: str, index: int) -> Problem:
        return Problem(index)

    def env(self, problem: Problem) -> Any:
        class Env:
            def reset(self) -> tuple[Message, ...]:
                return (Message.of("user", "What is this?", Image(pixels(problem.number, 0))),)

            def step(self, completion: str, info: StepInfo) -> Reply:
                if info.turn == TURNS:
                    return Reply(done=True)
                return Reply(messages=(Message.of("user", "And this?", Image(pixels(problem.number, info.turn))),))

        return Env()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[FamilyRenderer, Policy]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder: Path = resolve_checkpoint(MODEL, ("What is this? And this?",))
        tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
        model: Any = load_model(folder, MODEL)
    size = model.get_input_embeddings().num_embeddings
    renderer = make_renderer(RendererConfig(), MODEL, tokenizer, processor, size, PLACEHOLDER_TOKENS)
    positions = family_of(MODEL.vlm).position_function(model.config)
    return renderer, Policy(model, positions, renderer.banned_token_ids)


def as_task(renderer: FamilyRenderer, engine: EmbeddedEngine) -> list[list[Turn]]:
    async def main() -> list[list[Turn]]:
        task: Any = Pictures()
        runner = RolloutRunner(
            envs=ThreadEnvs(task),
            renderer=renderer,
            engine=engine,
            seed=3,
            max_turns=TURNS,
            max_new_tokens=NEW_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            stop=STOP,
        )
        drawn = await ProblemStream(task, "train").draw(0, EPISODES)
        groups = await runner.run_groups(split="train", step=1, problems=drawn, group_size=1, temperature=1.0)
        return [group.rollouts[0].turns for group in groups]

    return asyncio.run(main())


def part(array: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


async def program(number: int, turns: int, url: str, key: str, stream: bool) -> None:
    """What a user's program does."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        messages: list[Any] = []
        for turn in range(turns):
            text = "And this?" if turn else "What is this?"
            content = [{"type": "text", "text": text}, part(pixels(number, turn))]
            messages.append({"role": "user", "content": content})
            if stream:
                chunks = await client.chat.completions.create(model="any", messages=messages, stream=True)
                said = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            else:
                answer = await client.chat.completions.create(model="any", messages=messages)
                said = answer.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": said.strip()})


def as_programs(
    renderer: FamilyRenderer, engine: EmbeddedEngine, turns: Callable[[int], int], stream: bool
) -> list[list[Turn]]:
    async def main() -> list[list[Turn]]:
        endpoint = Endpoint("tiny", temperature=1.0)
        await endpoint.start()
        own = OwnSampling(1.0, renderer.stop_token_ids, renderer.banned_token_ids, stop=STOP)
        async with AsyncExitStack() as opened:
            sessions = []
            for number in range(EPISODES):
                name = f"train/000001/{number:02d}/00"
                seat = await opened.enter_async_context(engine.session(name, is_awaited=False))
                sampling = SessionSampling(own, partial(sampling_seed, 3, name))
                budgets = Budgets(TURNS, NEW_TOKENS, MAX_MODEL_LEN)
                sessions.append(ChatSession(name, renderer, seat, sampling, budgets))
            addresses = [endpoint.open(session) for session in sessions]
            await asyncio.gather(
                *(
                    program(number, turns(number), address.base_url, address.api_key, stream)
                    for number, address in enumerate(addresses)
                )
            )
            played = [session.close() for session in sessions]
        await endpoint.stop()
        return played

    return asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_pixels_and_logprobs_are_equal(parts: tuple[FamilyRenderer, Policy], stream: bool) -> None:
    renderer, policy = parts
    engine = EmbeddedEngine(policy, lambda: 0, MAX_MODEL_LEN, renderer.decode)
    by_task = as_task(renderer, engine)
    by_program = as_programs(renderer, engine, lambda number: len(by_task[number]), stream)
    assert sum(map(len, by_task)) > EPISODES, "no episode has a second turn"
    for expected, found in zip(by_task, by_program, strict=True):
        assert [turn.branch for turn in found] == [turn.branch for turn in expected]
        for one, two in zip(expected, found, strict=True):
            assert two.prompt.token_ids.tolist() == one.prompt.token_ids.tolist()
            assert two.prompt.placeholders == one.prompt.placeholders
            assert [image.hash for image in two.prompt.images] == [image.hash for image in one.prompt.images]
            assert two.completion.token_ids.tolist() == one.completion.token_ids.tolist()
            # The rows of a batch are in another order, which changes the rounding.
            assert np.abs(two.completion.logprobs - one.completion.logprobs).max() < 1e-5
            assert (two.text, two.completion.finish_reason) == (one.text, one.completion.finish_reason)
