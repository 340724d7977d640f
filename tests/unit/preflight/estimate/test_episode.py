"""Lengths that are worked out against those of the real renderer and processor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from support.families.clips import MESSAGES, video_renderer, vlm_of
from support.packages import needs_videos
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.errors import UserFault
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.families.base import ImageBounds
from vlmrl.models.families.qwen3_vl import Qwen3VL
from vlmrl.preflight.estimate.episode import SAMPLES, EpisodeEstimate, play
from vlmrl.preflight.estimate.sizes import TINY_CHARACTERS_PER_TOKEN, TURN_FRAME
from vlmrl.rendering.renderer import make_renderer
from vlmrl.tasks.base import BadRow, NotInSplit, Reply
from vlmrl.tasks.loading import load_task
from vlmrl.types import Image, Message, Text

FAMILY, TINY_PIXELS = Qwen3VL(None), ImageBounds(32 * 32, 1024 * 1024)


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> Any:
    return load_image_processor(tiny_folder)


@settings(max_examples=30)
@given(width=st.integers(8, 1500), height=st.integers(8, 1500))
def test_vision_tokens_are_the_processors(processor: Any, width: int, height: int) -> None:
    if max(width, height) / min(width, height) > 100:
        return  # refused by the processor
    made = processor(images=[PILImage.new("RGB", (width, height))], return_tensors="np")
    assert FAMILY.image_tokens(width, height, TINY_PIXELS) == made["image_grid_thw"][0].prod() // 4


def test_an_episode_is_played_to_its_end() -> None:
    config = ColorCodewordConfig(max_turns=3, images_per_turn=2, image_size=64)
    episode, faults = play(load_task(config, seed=0), config.max_turns)
    assert faults == []
    assert (episode.turns, episode.images) == (3, ((64, 64),) * 6)
    assert play(load_task(config, seed=0), 1)[0].turns == 1


def test_what_is_said_to_be_the_longest_is_longer_than_what_the_renderer_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_config: Callable[..., RunConfig]
) -> None:
    model = run_config().model
    task = load_task(ColorCodewordConfig(), seed=0)
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    folder = resolve_checkpoint(model, task.texts())
    episode, _ = play(task, 2)
    tokenizer, image_processor = load_tokenizer(folder), load_image_processor(folder)
    renderer = make_renderer(RendererConfig(), model, tokenizer, image_processor, 448, FAMILY.placeholder_tokens)
    conversation = task.demonstration(task.problem("train", 0), random_answers=False, seed=0)
    prompt, mask = renderer.render_conversation(conversation)
    real = len(prompt.token_ids)
    assert real <= episode.tokens(int(mask.sum()), FAMILY, TINY_PIXELS, TINY_CHARACTERS_PER_TOKEN) <= 2 * real


@settings(max_examples=30)
@given(frames=st.integers(2, 40), height=st.integers(8, 700), width=st.integers(8, 700))
def test_tokens_of_a_video(frames: int, height: int, width: int) -> None:
    """As transformers scales it. 20 frames of 320 × 320 pixels are just below the bound."""
    needs_videos()
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    bounds = ImageBounds(4096, 1 << 21)
    rows, columns = smart_resize(frames, height, width, 2, 32, bounds.least, bounds.most)
    expected = (frames + 1) // 2 * rows * columns // 32**2
    assert FAMILY.video_tokens(frames, width, height, bounds) == expected


def test_an_episode_with_videos_is_as_long_as_its_prompt(family_folder: Callable[[str], Path]) -> None:
    """Two videos and an image. Without text, 2 tokens enclose each of them, and each pair of frames has 3 more. The
    tiny tokenizer writes a time in 13 tokens."""
    needs_videos()
    vlm = vlm_of("qwen3_vl")
    prompt = asyncio.run(video_renderer(family_folder("qwen3_vl"), vlm).first_turn(MESSAGES))
    task: Any = OneTurn([MESSAGES[0].content])
    episode, _ = play(task, 1, video=vlm.video)
    assert episode.videos == tuple((len(v.frames), v.frames.shape[2], v.frames.shape[1]) for v in prompt.videos)
    bounds = ImageBounds(64**2, 512**2)  # of the tiny checkpoint
    pairs = sum(int(video.mm_kwargs["video_grid_thw"][0, 0]) for video in prompt.videos)
    features = sum(place.num_features for place in prompt.placeholders)
    bare = episode.tokens(0, FAMILY, bounds, 10**9, bounds)
    assert bare == features + 2 * 3 + (2 + 1) * pairs + TURN_FRAME + 1
    assert len(prompt.token_ids) <= episode.tokens(0, FAMILY, bounds, 1, bounds) <= 2 * len(prompt.token_ids)
    assert play(task, 1)[0].videos == ()


@pytest.mark.parametrize(
    "source",
    [PILImage.new("RGB", (40, 20)), np.zeros((20, 40, 3), np.uint8)],
    ids=["pillow", "array"],
)
def test_images_as_a_task_hands_them_in(source: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PILImage.new("RGB", (40, 20)).save(path)

    task: Any = OneTurn([(Image(source), Image(path), Image(path.read_bytes()))])
    assert play(task, 1) == (EpisodeEstimate(1, ((40, 20),) * 3, 4), [])


def test_the_longest_conversation_counts() -> None:
    """The env shows one picture, then the last two, then three turns that add one more."""
    picture = Image(np.zeros((20, 40, 3), np.uint8))
    one = Message.of("user", "abc", picture)
    replies = iter([Reply(history=(one, Message.of("assistant", "x"), one)), Reply(messages=(one,)), Reply(done=True)])
    env = SimpleNamespace(reset=lambda: (one,), step=lambda text: next(replies))
    task: Any = SimpleNamespace(problem=lambda split, index: SimpleNamespace(id="p"), env=lambda problem: env)
    assert play(task, 9)[0] == EpisodeEstimate(turns=3, images=((40, 20),) * 3, characters=10, conversations=2)


@dataclass
class OneTurn:
    """Shows one entry of `shown` after the other; an exception is raised."""

    shown: list[Any]

    def problem(self, split: str, index: int) -> Any:
        return SimpleNamespace(id=f"{split} {index}", shown=self.shown[index])

    def env(self, problem: Any) -> Any:
        return SimpleNamespace(reset=lambda: self._reset(problem.shown))

    def _reset(self, shown: Any) -> Any:
        if isinstance(shown, BaseException):
            raise shown
        return (Message.of("user", "abcd", *shown),)


def test_a_problem_that_cannot_be_played_is_left_out_and_named(tmp_path: Path) -> None:
    """A missing image, a pipe, an exception: each costs a run one rollout."""
    os.mkfifo(tmp_path / "pipe")
    nothing: Any = None
    images = [(Image(tmp_path / "absent.png"),), (Image(tmp_path / "pipe"),)]
    bad = [*images, KeyError("row"), SystemExit(0), (Text(nothing),)]
    task: Any = OneTurn([*bad, (Image(np.zeros((20, 40, 3), np.uint8)),)])
    episode, faults = play(task, 1)
    assert episode == EpisodeEstimate(1, ((40, 20),), 4)
    parts = ["absent.png cannot be read: No such", "it is a pipe", "KeyError: 'row'", "SystemExit", "text is None"]
    for index, (fault, part) in enumerate(zip(faults, parts, strict=True)):
        assert fault.startswith(f"training problem {index}: ")
        assert part in fault
    hopeless: Any = OneTurn(bad[:1] * SAMPLES)
    with pytest.raises(UserFault, match=r"^training problem 0: .*absent\.png cannot be read"):
        play(hopeless, 1)


class HasBadRows(OneTurn):
    def problem(self, split: str, index: int) -> Any:
        if index < 10:
            raise NotInSplit if index % 2 else BadRow("no answer", row=index)
        return super().problem(split, index - 10)


def test_an_index_without_a_problem_is_passed_over() -> None:
    task: Any = HasBadRows([KeyError("x"), ()])
    episode, notes = play(task, 1)
    assert episode.characters == 4
    bad = [
        f"training index {row} has no problem (row {row}: no answer); a run takes the next one"
        for row in range(0, 10, 2)
    ]
    assert notes[:-1] == bad
    assert notes[-1].startswith("training problem 10: ")
    empty: Any = HasBadRows([])
    empty.problem = lambda split, index: HasBadRows.problem(empty, split, 1)
    with pytest.raises(UserFault, match="has no problem at its first 256 indices"):
        play(empty, 1)
