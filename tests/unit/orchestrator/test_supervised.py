"""Supervised samples: loss only on assistant tokens, random answers without information, and separate problems."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.helpers import TINY, VISION_START
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.config.trainer import Demonstrations, SFTConfig
from vlmrl.errors import TaskError
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.orchestrator.supervised import FIRST_PROBLEM, demonstration_samples
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.color_codeword import COLORS, CodewordProblem, ColorCodeword
from vlmrl.types import Image, Message, TrainingSample

RANDOM = SFTConfig(batch_size=5, demonstrations=Demonstrations.random)
TRUE = SFTConfig(batch_size=5, demonstrations=Demonstrations.correct)


class Recording(ColorCodeword):
    """Remembers which problems were requested."""

    def __init__(self) -> None:
        super().__init__(ColorCodewordConfig(max_turns=2, images_per_turn=2), seed=0)
        self.asked: list[tuple[str, int]] = []

    def problem(self, split: Split, index: int) -> CodewordProblem:
        self.asked.append((split, index))
        return super().problem(split, index)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path, tokenizer: Any) -> Renderer:
    processor = load_image_processor(tiny_folder)
    return make_renderer(RendererConfig(), TINY, tokenizer, processor, 320, family_of(TINY.vlm).placeholder_tokens)


def samples_of(renderer: Renderer, config: SFTConfig, step: int = 0, seed: int = 0) -> list[TrainingSample]:
    return demonstration_samples(Recording(), renderer, config, step=step, seed=seed)


def said(sample: TrainingSample, tokenizer: Any) -> list[str]:
    """The runs of tokens with a loss, as text."""
    runs = np.split(np.flatnonzero(sample.loss_mask), np.flatnonzero(np.diff(np.flatnonzero(sample.loss_mask)) > 1) + 1)
    return [tokenizer.decode(sample.token_ids[run]) for run in runs]


def shown(sample: TrainingSample) -> str:
    """The codeword, read from the pixels of the squares in the order of their placeholders."""
    letters = {rgb: letter for letter, (_, rgb) in COLORS.items()}
    by_hash = {item.hash: item for item in sample.images}
    corners = [by_hash[p.hash].pixels[0, 0] for p in sample.placeholders]
    return "".join(letters[int(r), int(g), int(b)] for r, g, b in corners)


@pytest.mark.parametrize("config", [RANDOM, TRUE])
def test_only_assistant_tokens_have_a_loss(renderer: Renderer, tokenizer: Any, config: SFTConfig) -> None:
    for sample in samples_of(renderer, config):
        text = tokenizer.decode(sample.token_ids)
        answers = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text)
        assert said(sample, tokenizer) == answers
        assert [len(answer) for answer in answers] == [len("AB<|im_end|>"), len("ABCD<|im_end|>")]
        assert not (sample.loss_mask & (sample.mm_token_type_ids != 0)).any()
        assert (sample.versions[sample.loss_mask] == 0).all()
        assert (sample.versions[~sample.loss_mask] == -1).all()
        assert not sample.advantages.any()
        assert not sample.inference_logprobs.any()


def test_each_conversation_shows_its_squares(renderer: Renderer) -> None:
    task = Recording()
    for number, sample in enumerate(samples_of(renderer, RANDOM)):
        assert shown(sample) == task.problem("train", FIRST_PROBLEM + number).codeword
        assert len(sample.images) == 4
        assert (sample.token_ids[[p.offset - 1 for p in sample.placeholders]] == VISION_START).all()
        assert sample.mm_token_type_ids.sum() == sum(item.num_tokens for item in sample.images)


def answers(renderer: Renderer, tokenizer: Any, config: SFTConfig, step: int, seed: int) -> list[str]:
    """The last answer of each conversation."""
    samples = samples_of(renderer, config, step, seed)
    return [said(sample, tokenizer)[-1].removesuffix("<|im_end|>") for sample in samples]


def test_true_demonstrations_answer_what_is_shown(renderer: Renderer, tokenizer: Any) -> None:
    for step in range(2):
        assert answers(renderer, tokenizer, TRUE, step, seed=0) == [
            shown(sample) for sample in samples_of(renderer, TRUE, step)
        ]


def test_random_demonstrations_depend_only_on_step_and_seed(renderer: Renderer, tokenizer: Any) -> None:
    drawn = [answers(renderer, tokenizer, RANDOM, step, seed) for step in range(4) for seed in range(4)]
    assert len({answer for of_step in drawn for answer in of_step}) >= 16 * 5 - 5, "9⁴ answers, 80 draws"
    assert drawn[0] == answers(renderer, tokenizer, RANDOM, step=0, seed=0)
    assert all(set(answer) <= set("ABCDEFGHI") and len(answer) == 4 for of_step in drawn for answer in of_step)


def test_random_answers_say_nothing_about_the_squares(renderer: Renderer, tokenizer: Any) -> None:
    """One in nine of 400 letters is right by chance: 44 ± 6.3."""
    config = SFTConfig(batch_size=100, demonstrations=Demonstrations.random)
    found = answers(renderer, tokenizer, config, step=0, seed=0)
    right = sum(
        a == b
        for f, s in zip(found, samples_of(renderer, config), strict=True)
        for a, b in zip(f, shown(s), strict=True)
    )
    assert 44 - 25 < right < 44 + 25


def test_no_problem_serves_two_steps_or_reinforcement_learning_too(renderer: Renderer) -> None:
    task = Recording()
    for step in range(3):
        demonstration_samples(task, renderer, RANDOM, step=step, seed=0)
    assert task.asked == [("train", FIRST_PROBLEM + number) for number in range(15)]
    largest_of_rl = 10**6 * 1024
    assert largest_of_rl < FIRST_PROBLEM, "more than steps × groups of any run"


def test_samples_are_named_by_step_and_number(renderer: Renderer) -> None:
    assert [s.rollout_id for s in samples_of(renderer, RANDOM, step=12)] == [f"sft/000012/{i:03d}" for i in range(5)]


def test_a_task_without_demonstrations(renderer: Renderer) -> None:
    class Silent(Recording):
        demonstration = Task.demonstration

    with pytest.raises(TaskError, match=r"^Silent.demonstration is not defined.*set trainer.warmup.steps=0$"):
        demonstration_samples(Silent(), renderer, RANDOM, step=0, seed=0)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (lambda: 1 // 0, "Broken.demonstration raised ZeroDivisionError: "),
        (
            lambda: (Message.of("user", Image(b"GIF")), Message.of("assistant", "A")),
            "raised ImageError: an encoded image",
        ),
    ],
)
def test_a_demonstration_that_cannot_be_made(said: Callable[[], Any], error: str, renderer: Renderer) -> None:
    class Broken(Recording):
        def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
            messages: tuple[Message, ...] = said()
            return messages

    with pytest.raises(TaskError, match=error):
        demonstration_samples(Broken(), renderer, RANDOM, step=0, seed=0)
