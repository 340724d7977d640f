"""Supervised samples: loss only on assistant tokens, random answers without information, and separate problems."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.helpers import TINY, VISION_START
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.config.trainer import Demonstrations, SFTConfig
from vlmrl.errors import TaskError, UserFault
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.orchestrator.stream import Drawn
from vlmrl.orchestrator.supervised import FIRST_PROBLEM, Demonstrated, demonstrate, held_out
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.color_codeword import COLORS, CodewordProblem, ColorCodeword
from vlmrl.types import Image, Message, Text, TrainingSample

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


def made_by(
    task: Any, renderer: Renderer, config: SFTConfig = RANDOM, *, step: int = 0, seed: int = 0, seq_len: int = 4096
) -> Demonstrated:
    first = step * config.batch_size
    return demonstrate(task, renderer, config, step=step, numbers=count(first), seed=seed, seq_len=seq_len)


def samples_of(renderer: Renderer, config: SFTConfig, step: int = 0, seed: int = 0) -> list[TrainingSample]:
    return made_by(Recording(), renderer, config, step=step, seed=seed).samples


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
        made_by(task, renderer, step=step)
    assert task.asked == [("train", FIRST_PROBLEM + number) for number in range(15)]
    largest_of_rl = 10**6 * 1024
    assert largest_of_rl < FIRST_PROBLEM, "more than steps × groups of any run"


def test_samples_are_named_by_step_and_number(renderer: Renderer) -> None:
    assert [s.rollout_id for s in samples_of(renderer, RANDOM, step=12)] == [f"sft/000012/{i:03d}" for i in range(5)]


def test_held_out_demonstrations_are_those_of_held_out_problems(renderer: Renderer, tokenizer: Any) -> None:
    task = Recording()
    drawn = [Drawn(index, "", task.problem("eval", index)) for index in range(3)]
    drawn.insert(1, Drawn(9, "eval[9]", None, UserFault("broken")))
    samples = held_out(task, renderer, TRUE, drawn, seed=0, seq_len=4096)
    assert [said(sample, tokenizer)[-1].startswith(shown(sample)) for sample in samples] == [True] * 3
    assert [shown(sample) for sample in samples] == [one.problem.id for one in drawn if one.problem is not None]
    assert held_out(task, renderer, TRUE, drawn, seed=0, seq_len=30) == []


def test_a_task_without_demonstrations(renderer: Renderer) -> None:
    class Silent(Recording):
        demonstration = Task.demonstration

    with pytest.raises(TaskError, match=r"^Silent.demonstration is not defined.*set trainer.warmup.steps=0$"):
        made_by(Silent(), renderer)


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


class EveryOther(Recording):
    """Every other demonstration is what `said` returns for it; the others are sound."""

    def __init__(self, said: Callable[[], Any]) -> None:
        super().__init__()
        self.said = said

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        if len(self.asked) % 2:
            messages: tuple[Message, ...] = self.said()
            return messages
        return super().demonstration(problem, random_answers=random_answers, seed=seed)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def talk(*parts: Any) -> Callable[[], Any]:
    return lambda: (Message.of("user", "hi"), Message("assistant", parts))


@pytest.mark.parametrize(
    ("said", "stop_reason", "error"),
    [
        (lambda: 1 // 0, "task_error", "demonstration() raised ZeroDivisionError: integer division"),
        (raising(UnspeakableError()), "task_error", "demonstration() raised UnspeakableError"),
        (raising(SystemExit(0)), "task_error", "demonstration() raised SystemExit: 0"),
        (lambda: None, "task_error", "demonstration() returned None, not a tuple of Message"),
        (lambda: (), "task_error", "demonstration() returned no message"),
        (lambda: [Message.of("assistant", "A")], "task_error", "returned a list of Message"),
        (lambda: (Message.of("user", "hi"),), "task_error", "demonstration() has no answer"),
        (lambda: (Message.of("user", "hi"), Message.of("system", "A")), "task_error", "has no answer"),
        (talk(Text(None)), "task_error", "a assistant message whose text is None"),  # type: ignore[arg-type]
        (talk(Text("A\ud800")), "task_error", "has the lone surrogate"),
        (talk(Text("A" * 5000)), "task_error", "more than trainer.seq_len=4096: shorten it"),
        (
            lambda: (Message.of("user", Image(b"GIF")), Message.of("assistant", "A")),
            "image_error",
            "an encoded image",
        ),
        (lambda: (Message.of("user", Image("a\0.png")), Message.of("assistant", "A")), "image_error", ""),
    ],
)
def test_a_bad_demonstration_costs_itself_and_no_other(
    said: Callable[[], Any], stop_reason: str, error: str, renderer: Renderer
) -> None:
    made = made_by(EveryOther(said), renderer)
    assert [sample.rollout_id for sample in made.samples] == ["sft/000000/001", "sft/000000/003"]
    assert [fault.rollout_id for fault in made.faults] == [f"sft/000000/{i:03d}" for i in (0, 2, 4)]
    first = made.faults[0]
    assert (first.stop_reason, first.problem_index) == (stop_reason, FIRST_PROBLEM)
    assert error in str(first.error)
    assert first.problem_id == Recording().problem("train", FIRST_PROBLEM).id
    assert (first.traceback is None) == ("raised" not in str(first.error))


def test_a_problem_that_cannot_be_made_costs_its_demonstration(renderer: Renderer) -> None:
    class Gap(Recording):
        def problem(self, split: Split, index: int) -> CodewordProblem:
            if index == FIRST_PROBLEM + 1:
                raise LookupError(index)
            return super().problem(split, index)

    (fault,) = made_by(Gap(), renderer).faults
    assert (fault.rollout_id, fault.problem_id) == ("sft/000000/001", f"train[{FIRST_PROBLEM + 1}]")


@pytest.mark.parametrize("seq_len", [0, 1])
def test_a_demonstration_obeys_the_length_of_samples(seq_len: int, renderer: Renderer) -> None:
    longest = max(len(sample.token_ids) for sample in samples_of(renderer, RANDOM))
    made = made_by(Recording(), renderer, seq_len=longest - 1 + seq_len)
    assert (len(made.samples), len(made.faults)) == ((5, 0) if seq_len else (0, 5))


def test_a_bug_of_ours_is_not_a_fault_of_the_task(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def slip(*_: Any, **__: Any) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr("vlmrl.orchestrator.supervised.supervised_sample", slip)
    with pytest.raises(AssertionError, match="planted"):
        made_by(Recording(), renderer)


# ── few-shot examples ───────────────────────────────────────────────────────────────────────────────────────

SHOTS = (Message.of("user", "1"), Message.of("assistant", "7"))


class FewShot(Recording):
    """`reset` gives an example with its answer."""

    def env(self, problem: CodewordProblem) -> Any:
        env = super().env(problem)
        prompt = (*SHOTS, *env.reset()[1:])
        env.reset = lambda: prompt  # type: ignore[method-assign]
        return env

    def demonstration(self, problem: CodewordProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        rest = super().demonstration(problem, random_answers=random_answers, seed=seed)[1:]
        return (*SHOTS, *self.cut(rest))

    def cut(self, rest: tuple[Message, ...]) -> tuple[Message, ...]:
        return rest


def test_answers_that_the_prompt_gives_have_no_loss(renderer: Renderer, tokenizer: Any) -> None:
    for sample in made_by(FewShot(), renderer).samples:
        assert "7<|im_end|>" in tokenizer.decode(sample.token_ids)
        assert [len(answer) for answer in said(sample, tokenizer)] == [len("AB<|im_end|>"), len("ABCD<|im_end|>")]


def test_an_example_alone_is_no_answer(renderer: Renderer) -> None:
    class NoAnswer(FewShot):
        def cut(self, rest: tuple[Message, ...]) -> tuple[Message, ...]:
            return rest[:1]

    made = made_by(NoAnswer(), renderer)
    assert (len(made.samples), len(made.faults)) == (0, 5)
    assert "no assistant message follows the messages of reset()" in str(made.faults[0].error)


@pytest.mark.parametrize("inside", [True, False])
def test_a_token_that_is_never_sampled_is_no_answer(inside: bool, renderer: Any, tokenizer: Any) -> None:
    """Its logprob is −inf; an end of turn is sampled once, at the end."""
    name = "<|im_end|>" if inside else "<|im_start|>"
    ids = np.array([5, tokenizer.convert_tokens_to_ids(name), 6] if inside else [5, 6, 0])
    ids[-1] = ids[-1] or tokenizer.convert_tokens_to_ids(name)
    with pytest.raises(UserFault, match=rf"the special token '{re.escape(name)}', which a policy cannot sample"):
        renderer._check_sampled(ids, np.ones(3, np.bool_), np.zeros(3, np.int64))
