"""Pairs of a task: both answers share their prompt, and what cannot be compared is passed over or is a fault."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.helpers import TINY
from support.row_files import task_of
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.config.trainer import Packing
from vlmrl.errors import BadRowsError, TaskError
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.orchestrator.preferences import PairMaker
from vlmrl.orchestrator.stream import Drawn
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.tasks.base import BadRow, Preference
from vlmrl.tasks.color_codeword import ColorCodeword
from vlmrl.trainer.shares import divide
from vlmrl.types import DropReason, Message, StopReason


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path, tokenizer: Any) -> Renderer:
    processor = load_image_processor(tiny_folder)
    return make_renderer(RendererConfig(), TINY, tokenizer, processor, 320, family_of(TINY.vlm).placeholder_tokens)


def row(number: int, **changed: Any) -> dict[str, Any]:
    answers = {"chosen": "a" * (number + 1), "rejected": "b"}
    return {"question": f"<image>number {number}?", "image": f"img/{number}.png", **answers, **changed}


def test_both_answers_share_prompt_and_image(renderer: Renderer, tokenizer: Any, tmp_path: Path) -> None:
    made = PairMaker(task_of(tmp_path, *map(row, range(4))), renderer, 4096).batch(1, count(), 4)
    assert [rollout.stop_reason for rollout in made.rollouts] == [StopReason.TERMINATED] * 4
    assert len({rollout.problem_id for rollout in made.rollouts}) == 4
    for pair in made.pairs:
        (chosen,), (rejected,) = pair.chosen, pair.rejected
        assert chosen.mm_items[0] is rejected.mm_items[0]
        assert chosen.placeholders == rejected.placeholders
        said = [tokenizer.decode(sample.token_ids[sample.loss_mask]) for sample in (chosen, rejected)]
        assert set(said[0].removesuffix("<|im_end|>")) == {"a"}
        assert said[1] == "b<|im_end|>"
        start = np.flatnonzero(chosen.loss_mask)[0]
        np.testing.assert_array_equal(chosen.token_ids[:start], rejected.token_ids[:start])
    samples = [sample for pair in made.pairs for sample in pair.samples]
    (share,) = divide(samples, Packing.tree, 16384)
    assert len(share.passes) == 1


def test_a_row_without_a_pair_is_passed_over(renderer: Renderer, tmp_path: Path) -> None:
    rows = [row(0), row(1, rejected=""), row(2, chosen="b"), row(3, image="img/none.png"), row(4)]
    made = PairMaker(task_of(tmp_path, *rows), renderer, 4096).batch(1, count(), 2)
    assert len(made.pairs) == 2
    assert not made.faults
    wrong = {absent.row: absent.reason for _, absent in made.absent if isinstance(absent, BadRow)}
    assert wrong.keys() <= {1, 2, 3}
    assert all(isinstance(absent, BadRow) for _, absent in made.absent)
    every = PairMaker(task_of(tmp_path, *rows), renderer, 4096).batch(1, count(), 4)
    reasons = {absent.row: absent.reason for _, absent in every.absent if isinstance(absent, BadRow)}
    assert reasons.keys() == {1, 2, 3}
    assert "rejected is empty" in reasons[1]
    assert "both answers are equal" in reasons[2]
    assert "none.png" in reasons[3]


def test_an_answer_that_is_too_long_makes_a_bad_row(renderer: Renderer, tmp_path: Path) -> None:
    rows = [row(0), row(1, rejected="b" * 400), row(2)]
    made = PairMaker(task_of(tmp_path, *rows), renderer, 200).batch(1, count(), 3)
    (reason,) = {absent.reason for _, absent in made.absent if isinstance(absent, BadRow)}
    assert "its rejected answer has" in reason
    assert "do not fit in trainer.seq_len=200: raise it" in reason


def test_rows_that_are_all_bad_end_the_run(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match=r"none of the 3 rows .* rejected is empty"):
        PairMaker(task_of(tmp_path, *(row(n, rejected="") for n in range(3))), renderer, 4096).batch(1, count(), 1)


def test_a_task_without_pairs_is_refused(renderer: Renderer) -> None:
    task = ColorCodeword(ColorCodewordConfig(max_turns=2, images_per_turn=2), seed=0)
    with pytest.raises(TaskError, match=r"ColorCodeword defines no preference.*set dpo.from_run"):
        PairMaker(task, renderer, 4096).batch(1, count(), 1)


class Failing(ColorCodeword):
    """A task of ones own whose code fails for some problems."""

    def preference(self, problem: Any) -> Preference:
        if problem.codeword[0] in "ABC":
            raise RuntimeError("no pair of this")
        asked = Message.of("user", problem.codeword)
        return Preference((asked,), Message.of("assistant", "A"), Message.of("assistant", "B"))


def test_code_that_fails_costs_its_pair(renderer: Renderer) -> None:
    task = Failing(ColorCodewordConfig(max_turns=2, images_per_turn=2), seed=0)
    maker = PairMaker(task, renderer, 4096)
    made = maker.batch(1, count(), 12)
    assert len(made.rollouts) == 12
    assert 0 < len(made.pairs) < 12
    assert len(made.pairs) + len(made.faults) == 12
    for fault in made.faults:
        assert (fault.stop_reason, fault.dropped) == (StopReason.TASK_ERROR, DropReason.FAULT)
        assert fault.error is not None
        assert "no pair of this" in fault.error
    drawn = [Drawn(i, str(i), task.problem("eval", i)) for i in range(12)] + [Drawn(12, "12", None)]
    expected = sum(one.problem is not None and one.problem.codeword[0] not in "ABC" for one in drawn)  # type: ignore[attr-defined]
    assert len(maker.held_out(drawn)) == expected
