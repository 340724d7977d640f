"""color_codeword: how answers are read and scored, which problems exist, and what they show."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrl.config.task import ColorCodewordConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.color_codeword import (
    COLORS,
    LETTERS,
    CodewordProblem,
    ColorCodeword,
    held_out_codewords,
    is_held_out,
    parse_answer,
    score_turn,
    share_correct,
)
from vlmrl.types import Image, Message, Text

CODEWORDS = st.text(LETTERS, min_size=1, max_size=12)
ANSWERS = st.text(LETTERS, max_size=12)
NO_LETTERS = st.text(st.characters(codec="utf-8", exclude_characters=LETTERS))


def make(seed: int = 0, **settings: Any) -> ColorCodeword:
    return ColorCodeword(ColorCodewordConfig(**settings), seed=seed)


def shown_letters(messages: tuple[Message, ...]) -> str:
    """Read the letters from the pixels of the squares, as a policy must."""
    letter_of = {rgb: letter for letter, (_, rgb) in COLORS.items()}
    images = [part.source for message in messages for part in message.content if isinstance(part, Image)]
    for image in images:
        assert np.asarray(image).reshape(-1, 3).std(axis=0).max() == 0.0, "one colour all over"
    return "".join(letter_of[image.getpixel((0, 0))] for image in images)


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.content if isinstance(part, Text))


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ACIB", "ACIB"),
        (" ACIB.\n", "ACIB"),
        ("I say ACIB", "ACIB"),
        ("AB or CD", "CD"),  # equally long: the last
        ("AB or CD, no: E", "CD"),  # the longest, wherever it stands
        ("A C I B", "B"),
        ("acib", ""),
        ("ABJCDE", "CDE"),
        ("ＡＢ", ""),  # full-width letters are others
        ("", ""),
    ],
)
def test_parse_answer(text: str, answer: str) -> None:
    assert parse_answer(text) == answer


@given(st.text(st.sampled_from(LETTERS + "JaZ \n"), max_size=40))
def test_the_answer_is_the_last_of_the_longest_runs(text: str) -> None:
    """Compared with a loop without regular expressions."""
    runs = [text[i:j] for i, j in itertools.combinations(range(len(text) + 1), 2) if set(text[i:j]) <= set(LETTERS)]
    longest = max(map(len, runs), default=0)
    assert parse_answer(text) == ([run for run in runs if len(run) == longest] or [""])[-1]


@given(NO_LETTERS, CODEWORDS, NO_LETTERS)
def test_the_answer_is_found_in_any_other_text(before: str, codeword: str, after: str) -> None:
    assert parse_answer(before + codeword + after) == codeword


@given(ANSWERS, CODEWORDS)
def test_scores_are_within_bounds_and_one_only_for_the_codeword(answer: str, codeword: str) -> None:
    for score in (share_correct(answer, codeword), score_turn(answer, codeword)):
        assert 0.0 <= score <= 1.0
        assert (score == 1.0) == (answer == codeword)


@given(CODEWORDS, st.data())
def test_each_wrong_position_costs_its_share_and_a_longer_answer_gains_nothing(
    codeword: str, data: st.DataObject
) -> None:
    wrong = data.draw(st.sets(st.integers(0, len(codeword) - 1)))
    answer = "".join(
        LETTERS[(LETTERS.index(letter) + 1) % 9] if i in wrong else letter for i, letter in enumerate(codeword)
    )
    assert share_correct(answer, codeword) == pytest.approx(1 - len(wrong) / len(codeword))
    extra = data.draw(CODEWORDS)
    assert share_correct(answer + extra, codeword) <= share_correct(answer, codeword)


# ── episodes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_episode_shows_the_squares_of_its_turn_and_scores_the_codeword_so_far() -> None:
    env = make(max_turns=3, images_per_turn=2).env(CodewordProblem("ACIBHH", shown="ACIBHH"))
    system, user = env.reset()
    assert (system.role, user.role) == ("system", "user")
    assert "red A, green B, blue C, yellow D, purple E, cyan F, orange G, white H, black I" in text_of(system)
    assert shown_letters((user,)) == "AC"
    first = env.step("AC")
    assert (first.turn_reward, first.reward, first.done) == (1.0, 0.0, False)
    assert first.metrics == {"exact_match": 0.0, "share_correct": pytest.approx(2 / 6)}
    assert [message.role for message in first.messages] == ["user"]
    assert shown_letters(first.messages) == "IB"
    second = env.step("AC")  # of ACIB half the positions, not exact
    assert (second.turn_reward, second.done) == (0.25, False)
    assert shown_letters(second.messages) == "HH"
    last = env.step("The codeword is ACIBHH.")
    assert (last.turn_reward, last.reward, last.done, last.messages) == (1.0, 1.0, True, ())
    assert last.metrics == {"exact_match": 1.0, "share_correct": 1.0}
    with pytest.raises(AssertionError, match="after done"):
        env.step("ACIBHH")


def test_only_the_last_answer_counts_for_the_episode() -> None:
    env = make().env(CodewordProblem("ACIB", shown="ACIB"))
    env.reset()
    early = env.step("ACIB")  # the whole codeword, guessed before its second half was shown
    assert (early.reward, early.turn_reward) == (1.0, 0.25)
    last = env.step("no letters")
    assert (last.reward, last.turn_reward, last.metrics["share_correct"]) == (0.0, 0.0, 0.0)


def test_squares_have_the_nine_colours_and_the_size_and_are_made_once() -> None:
    task = make(max_turns=1, images_per_turn=9, image_size=48)
    _, user = task.env(CodewordProblem(LETTERS, shown=LETTERS)).reset()
    images = [part for part in user.content if isinstance(part, Image)]
    assert [(image.source.mode, image.source.size, image.source.getpixel((47, 0))) for image in images] == [
        ("RGB", (48, 48), rgb)
        for rgb in [
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
            (255, 255, 0),
            (128, 0, 128),
            (0, 255, 255),
            (255, 165, 0),
            (255, 255, 255),
            (0, 0, 0),
        ]
    ]
    again = list(task.env(CodewordProblem(LETTERS, shown=LETTERS)).reset()[1].content)
    assert all(part is image for part, image in zip(again[1:], images, strict=True))


# ── problems and splits ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("max_turns", "images_per_turn"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (4, 2), (5, 20)])
def test_no_training_problem_is_held_out_and_every_evaluation_problem_is(max_turns: int, images_per_turn: int) -> None:
    task = make(max_turns=max_turns, images_per_turn=images_per_turn)
    train = {task.problem("train", index).codeword for index in range(3000)}
    evaluation = {task.problem("eval", index).codeword for index in range(500)}
    assert not train & evaluation
    assert {len(codeword) for codeword in train | evaluation} == {max_turns * images_per_turn}
    assert all(is_held_out(codeword, 8) for codeword in evaluation)
    assert not any(is_held_out(codeword, 8) for codeword in train)


@settings(deadline=None)  # the first call of a length lists its held-out codewords
@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(2, 1000), st.integers(1, 9))
def test_a_training_problem_is_never_held_out(seed: int, index: int, one_in: int, length: int) -> None:
    if length > 5:  # listing those of 6 letters takes a second for each `one_in`
        length += 1
    task = make(seed, max_turns=1, images_per_turn=length, holdout_one_in=one_in)
    assert not is_held_out(task.problem("train", index).codeword, one_in)
    assert is_held_out(task.problem("eval", index).codeword, one_in)


@pytest.mark.parametrize("length", [1, 2])
def test_both_sides_of_the_smallest_spaces_have_codewords_for_every_rule(length: int) -> None:
    """Longer spaces have more codewords on either side; these two are counted out."""
    for one_in in range(2, 1001):
        assert 1 <= len(held_out_codewords(length, one_in)) < 9**length
        assert all(is_held_out(codeword, one_in) for codeword in held_out_codewords(length, one_in))


@pytest.mark.parametrize(("max_turns", "images_per_turn"), [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_training_shows_every_colour_at_every_position(max_turns: int, images_per_turn: int) -> None:
    """Otherwise held-out codewords would need answers that training never rewards."""
    task = make(max_turns=max_turns, images_per_turn=images_per_turn)
    codewords = [task.problem("train", index).codeword for index in range(2000)]
    for position in range(max_turns * images_per_turn):
        counts = Counter(codeword[position] for codeword in codewords)
        assert len(counts) == 9
        assert min(counts.values()) > 0.5 * 2000 / 9


def test_evaluation_problems_are_distinct_while_they_last_and_then_begin_again() -> None:
    task = make()
    there_are = len(held_out_codewords(4, 8))
    ids = [task.problem("eval", index).id for index in range(there_are)]
    assert len(set(ids)) == there_are == pytest.approx(9**4 / 8, rel=0.1)
    assert [task.problem("eval", there_are + index).id for index in range(3)] == ids[:3]


def test_evaluation_problems_do_not_depend_on_the_seed_and_training_problems_do() -> None:
    for changes in ({}, {"images_per_turn": 5}, {"shuffle_images": True}):
        one, other = make(1, **changes), make(2, **changes)
        assert [one.problem("eval", i) for i in range(50)] == [other.problem("eval", i) for i in range(50)]
        assert [one.problem("train", i) for i in range(50)] != [other.problem("train", i) for i in range(50)]


def test_problems_are_a_function_of_seed_and_index() -> None:
    """Pinned: a resumed run of a later version must go on with the same problems."""
    task = make(7)
    backwards = [make(7).problem("train", index) for index in reversed(range(100))]
    assert [task.problem("train", index) for index in range(100)] == backwards[::-1]
    assert [task.problem("train", index).id for index in (0, 1, 2**40)] == ["DDIA", "IBFE", "FICA"]
    assert [task.problem("eval", index).id for index in range(4)] == ["EBGH", "AAAE", "CAAG", "AAED"]


# ── the control ─────────────────────────────────────────────────────────────────────────────────────────────


def test_shuffled_images_change_what_is_shown_and_nothing_else() -> None:
    plain, shuffled = make(3), make(3, shuffle_images=True)
    for split in ("train", "eval"):
        problems = [shuffled.problem(split, index) for index in range(200)]
        assert [problem.codeword for problem in problems] == [plain.problem(split, i).codeword for i in range(200)]
        assert sum(problem.shown == problem.codeword for problem in problems) <= 2  # 1 in 6561 by chance
        for problem in problems[:20]:
            env = shuffled.env(problem)
            prompt = env.reset()
            reply = env.step(problem.codeword[:2])
            assert reply.turn_reward == 1.0
            assert shown_letters((*prompt, *reply.messages)) == problem.shown
            assert env.step(problem.codeword).reward == 1.0


def test_shuffled_squares_say_nothing_about_the_codeword() -> None:
    """A letter and the colour at its position agree as often as by chance: 1 in 9."""
    task = make(shuffle_images=True)
    problems = [task.problem("train", index) for index in range(3000)]
    pairs = Counter((p.codeword[i], p.shown[i]) for p in problems for i in range(4))
    assert len(pairs) == 81
    expected = 3000 * 4 / 81  # 148; standard deviation 12
    assert max(abs(count - expected) for count in pairs.values()) < 5 * expected**0.5


def test_equal_ids_are_equal_problems_in_the_control_too() -> None:
    task = make(max_turns=1, images_per_turn=1, shuffle_images=True)
    problems = [task.problem(split, index) for split in ("train", "eval") for index in range(300)]
    assert len({problem.id for problem in problems}) == len(set(problems)) > 9


# ── demonstrations ──────────────────────────────────────────────────────────────────────────────────────────


def answers(messages: tuple[Message, ...]) -> list[str]:
    return [text_of(message) for message in messages if message.role == "assistant"]


@pytest.mark.parametrize("shuffle_images", [False, True])
def test_true_demonstrations_answer_right_at_every_turn(shuffle_images: bool) -> None:
    task = make(max_turns=3, shuffle_images=shuffle_images)
    for index in range(20):
        problem = task.problem("train", index)
        demonstration = task.demonstration(problem, random_answers=False, seed=index)
        env = task.env(problem)
        conversation = [*env.reset()]
        for answer in answers(demonstration):
            reply = env.step(answer)
            conversation += [Message.of("assistant", answer), *reply.messages]
            assert reply.turn_reward == 1.0
        assert (reply.done, reply.reward) == (True, 1.0)
        assert tuple(conversation) == demonstration


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_random_demonstrations_have_the_format_and_know_no_problem(seed: int) -> None:
    task = make(max_turns=3, images_per_turn=2)
    one, other = (
        answers(task.demonstration(task.problem("train", index), random_answers=True, seed=seed)) for index in (0, 1)
    )
    assert one == other
    assert [len(answer) for answer in one] == [2, 4, 6]
    assert one[1].startswith(one[0])
    assert one[2].startswith(one[1])
    assert re.fullmatch("[A-I]+", one[2])


def test_random_demonstrations_use_all_letters_evenly_and_are_right_by_chance_only() -> None:
    task = make()
    given_answers, right = Counter[str](), 0
    for index in range(2000):
        problem = task.problem("train", index)
        answer = answers(task.demonstration(problem, random_answers=True, seed=index))[-1]
        given_answers.update(answer)
        right += sum(map(str.__eq__, answer, problem.codeword))
    assert set(given_answers) == set(LETTERS)
    assert max(given_answers.values()) < 1.15 * 8000 / 9
    assert right / 8000 == pytest.approx(1 / 9, abs=0.015)  # standard deviation 0.0035


# ── settings, text, speed ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "task.max_turns=0 is below 1"),
        ({"images_per_turn": 0}, "task.images_per_turn=0 is below 1"),
        ({"image_size": -3}, "task.image_size=-3 is below 1"),
        ({"holdout_one_in": 1}, "task.holdout_one_in=1 is not from 2 to 1000"),
        ({"holdout_one_in": 1001}, "task.holdout_one_in=1001 is not from 2 to 1000"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**settings)


def test_texts_hold_what_prompts_say_but_no_letters_side_by_side() -> None:
    task = make()
    prompt = [text_of(message) for message in task.env(task.problem("train", 0)).reset()]
    assert set(prompt) <= set(task.texts())
    assert len(prompt[0].split()) <= 60
    assert not re.search("[A-I]{2}", " ".join(task.texts()))


def test_a_step_of_256_rollouts_takes_milliseconds() -> None:
    task = make()

    def optimizer_step(step: int) -> float:
        started = time.process_time()
        for group in range(8):
            problem = task.problem("train", 8 * step + group)
            for _ in range(32):
                env = task.env(problem)
                env.reset()
                env.step(problem.codeword[:2])
                env.step(problem.codeword)
        return time.process_time() - started

    assert min(optimizer_step(step) for step in range(5)) < 0.020  # 0.004 measured
