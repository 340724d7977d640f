"""The stream of problems: one order whatever the timing, nothing lost or repeated, and rows without a problem."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrl.config.task import BadRows
from vlmrl.errors import BadRowsError
from vlmrl.orchestrator import stream as stream_module
from vlmrl.orchestrator.bad_rows import BadRowWatch
from vlmrl.orchestrator.stream import Drawn, FixedProblems, Indices, ProblemStream
from vlmrl.record.bad_rows import BadRowRecord
from vlmrl.tasks.base import BadRow, NotInSplit
from vlmrl.trainer.loop_state import Cursor


@dataclass
class Table:
    """A task of numbered rows; `odd` says what is wrong with a row."""

    rows: int | None = 10
    odd: Callable[[int], Exception | None] = lambda row: None

    def num_rows(self, split: str) -> int | None:
        return self.rows

    def problem(self, split: str, index: int) -> Any:
        row = index if self.rows is None else index % self.rows
        if (error := self.odd(row)) is not None:
            raise error
        return SimpleNamespace(id=f"row {row}")


def sometimes_odd(row: int) -> Exception | None:
    if row % 5 == 1:
        return NotInSplit()
    return BadRow("no answer", source="a.csv", row=row) if row % 7 == 3 else None


def make(task: Any, **settings: Any) -> ProblemStream:
    return ProblemStream(task, settings.pop("split", "train"), **settings)


def draw(stream: ProblemStream, *counts: int) -> list[list[int]]:
    async def main() -> list[list[int]]:
        return [[drawn.index for drawn in await stream.draw(step, count)] for step, count in enumerate(counts, start=1)]

    return asyncio.run(main())


def usable(count: int, odd: Callable[[int], Exception | None] = sometimes_odd) -> list[int]:
    """The first indices of an endless table that have a problem."""
    found: list[int] = []
    index = 0
    while len(found) < count:
        if odd(index) is None:
            found.append(index)
        index += 1
    return found


# ── indices ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=12), st.integers(0, 5), st.data())
def test_no_index_is_lost_or_repeated(takes: list[tuple[int, int]], made: int, data: st.DataObject) -> None:
    """Steps take indices in any interleaving; a run that is resumed after step `made` hands out the rest, in order."""
    indices = Indices(Cursor(7, ((2, 4), (5, 6))))
    taken: list[tuple[int, int]] = []
    for step, count in takes:
        taken += [(step, index) for index in indices.take(step, count)]
    assert [index for _, index in taken] == [2, 3, 5, *range(7, 100)][: len(taken)]
    before = indices.cursor(0)
    assert before.learned == Cursor(7, ((2, 4), (5, 6))).learned
    cursor = indices.cursor(made)
    learned = {index for step, index in taken if step <= made}
    rest = [index for index in [2, 3, 5, *range(7, 200)] if index not in learned]
    assert Indices(cursor).take(1, 40) == rest[:40]
    assert cursor.learned == 4 + len(learned), "0, 1, 4 and 6 were learned before"
    assert Cursor.from_json(as_json(cursor)) == cursor
    if not cursor.unlearned:
        assert isinstance(cursor.to_json(), int)


def as_json(cursor: Cursor) -> Any:
    return json.loads(json.dumps(cursor, default=Cursor.to_json))


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_problems_come_in_order_without_those_that_are_absent() -> None:
    stream = make(Table(rows=None, odd=sometimes_odd))
    assert list(chain.from_iterable(draw(stream, 4, 3, 5))) == usable(12)
    assert stream.indices.cursor(3) == Cursor(usable(12)[-1] + 1), "no index is drawn that is not needed"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 4))
def test_steps_that_draw_at_the_same_time_get_the_same_problems_whatever_the_timing(
    seed: int, steps: int, count: int
) -> None:
    shuffler = random.Random(seed)

    async def check(problem: Any) -> None:
        for _ in range(shuffler.randrange(20)):
            await asyncio.sleep(0)
        if problem.id.endswith("8"):
            raise BadRow("too long", source=problem.id)

    async def main() -> list[list[Drawn]]:
        stream = make(Table(rows=None, odd=sometimes_odd), check=check)
        return await asyncio.gather(*(stream.draw(step, count) for step in range(1, steps + 1)))

    odd = lambda row: sometimes_odd(row) or (BadRow("x") if row % 10 == 8 else None)  # noqa: E731
    drawn = asyncio.run(main())
    assert [each.index for of_step in drawn for each in of_step] == usable(steps * count, odd)
    assert {len(of_step) for of_step in drawn} == {count}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=6), st.integers(0, 6), st.integers(0, 3))
def test_a_stop_at_any_point_loses_and_repeats_nothing(counts: list[int], made: int, ahead: int) -> None:
    """`made` steps were learned and `ahead` further ones drawn; the resumed run draws what the first would have."""
    made = min(made, len(counts))
    whole = draw(make(Table(rows=None, odd=sometimes_odd)), *counts)
    first = make(Table(rows=None, odd=sometimes_odd))
    draw(first, *counts[: made + ahead])
    resumed = make(Table(rows=None, odd=sometimes_odd), indices=Indices(first.indices.cursor(made)))
    assert whole[:made] + draw(resumed, *counts[made:]) == whole


def test_indices_that_wait_to_be_handed_out_again_are_in_the_next_checkpoint() -> None:
    """A run that was killed with three steps under way, resumed on-policy, and killed again after one step."""
    indices = Indices(Cursor(10, ((2, 8),)))
    assert indices.take(5, 2) == [2, 3]
    assert indices.cursor(5) == Cursor(10, ((4, 8),))
    assert Indices(indices.cursor(5)).take(6, 6) == [4, 5, 6, 7, 10, 11]


def test_a_fault_of_the_tasks_code_takes_the_place_of_its_problem() -> None:
    stream = make(Table(odd=lambda row: KeyError("x") if row == 1 else None))
    drawn = asyncio.run(stream.draw(1, 3))
    assert [each.index for each in drawn] == [0, 1, 2]
    assert [each.fault is None for each in drawn] == [True, False, True]
    assert drawn[1].problem_id == "train[1]"


# ── passes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_goes_on_with_the_next_pass() -> None:
    stream = make(Table(rows=4, odd=lambda row: NotInSplit() if row == 1 else None))
    assert draw(stream, 3, 3) == [[0, 2, 3], [4, 6, 7]]
    assert (stream.passes(1), stream.passes(2)) == (1.0, 2.0)
    assert stream.metrics(2) == {"data/epoch": 2.0, "data/rows_seen": 8.0, "data/bad_rows": 0.0}
    assert make(Table(rows=None)).metrics(1) == {}


def test_what_is_under_way_is_not_seen_yet() -> None:
    stream = make(Table(rows=8))
    draw(stream, 2, 2, 2)
    assert [stream.metrics(step)["data/rows_seen"] for step in (1, 2, 3)] == [2.0, 4.0, 6.0]


def test_an_evaluation_draws_each_row_at_most_once() -> None:
    stream = make(Table(rows=10, odd=sometimes_odd), split="eval", once=True)
    assert draw(stream, 100, 5) == [[0, 2, 4, 5, 7, 8, 9], []]


def test_an_evaluation_plays_the_same_problems_each_time_and_searches_them_once() -> None:
    asked: list[int] = []

    class Counted(Table):
        def problem(self, split: str, index: int) -> Any:
            asked.append(index)
            return super().problem(split, index)

    fixed = FixedProblems(make(Counted(rows=10, odd=sometimes_odd), split="eval", once=True))

    async def main() -> list[list[int]]:
        return [[drawn.index for drawn in await fixed.first(count)] for count in (3, 3, 5, 99, 99)]

    assert asyncio.run(main()) == [[0, 2, 4], [0, 2, 4], [0, 2, 4, 5, 7], [0, 2, 4, 5, 7, 8, 9], [0, 2, 4, 5, 7, 8, 9]]
    assert Counter(asked)[1] == Counter(asked)[3] == 1, "rows without a problem are looked at once"


@pytest.mark.parametrize(
    ("odd", "begin", "reason"),
    [
        (
            lambda row: BadRow(f"no answer at {row}", source="a.csv", row=row),
            "none of the 300 rows of the train split has a problem that can be used",
            "most often (300 of 300): a.csv row 0: no answer at 0.",
        ),
        (lambda row: NotInSplit(), "all 300 rows belong to the other split", "task.eval_fraction"),
    ],
)
def test_a_pass_without_any_problem_is_refused_with_the_most_frequent_reason(odd: Any, begin: str, reason: str) -> None:
    shown: list[str] = []
    stream = make(Table(rows=300, odd=odd), status=shown.append)
    with pytest.raises(BadRowsError) as refused:
        draw(stream, 8)
    assert str(refused.value).startswith(begin)
    assert reason in str(refused.value)
    assert len(shown) >= 2, "the screen says what takes so long"
    assert "rows in a row without a train problem" in shown[0]


def test_a_pass_may_have_a_single_problem() -> None:
    stream = make(Table(rows=300, odd=lambda row: None if row == 299 else NotInSplit()))
    assert draw(stream, 3) == [[299, 599, 899]]


def test_endless_problems_are_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "ENDLESS_PASS", 50)
    with pytest.raises(BadRowsError, match="all 50 rows belong to the other split"):
        draw(make(Table(rows=None, odd=lambda row: NotInSplit())), 3)


# ── choosers ────────────────────────────────────────────────────────────────────────────────────────────────


class OnlyEven:
    def __init__(self) -> None:
        self.begun: list[int] = []

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def learn(self, step: int, groups: Any) -> None:
        pass

    def metrics(self, step: int) -> dict[str, float]:
        return {"curriculum/passed_over": 1.0}

    def wants(self, step: int, index: int, problem_id: str) -> bool:
        return index % 2 == 0


def test_a_chooser_is_asked_for_each_problem() -> None:
    chooser = OnlyEven()
    stream = make(Table(rows=None, odd=lambda row: NotInSplit() if row == 4 else None), chooser=chooser)
    assert draw(stream, 3, 2) == [[0, 2, 6], [8, 10]]
    assert chooser.begun == [1, 2]
    assert stream.metrics(1) == {"curriculum/passed_over": 1.0}


def test_a_chooser_that_wants_nothing_of_a_whole_pass_is_not_asked_again() -> None:
    chooser = OnlyEven()
    chooser.wants = lambda step, index, problem_id: False  # type: ignore[method-assign]
    assert draw(make(Table(rows=5), chooser=chooser), 2, 2) == [[5, 6], [12, 13]]


# ── bad rows ────────────────────────────────────────────────────────────────────────────────────────────────


def watched(task: Table, policy: BadRows = BadRows.skip, max_rate: float = 1.0) -> tuple[ProblemStream, list[Any]]:
    rows: list[BadRowRecord] = []
    return make(task, bad_rows=BadRowWatch(policy, max_rate, "outputs/r", rows.extend)), rows


def third_is_bad(row: int) -> Exception | None:
    return BadRow("no answer", source="a", row=row) if row == 3 else None


def test_a_bad_row_is_recorded_once_with_its_step() -> None:
    stream, rows = watched(
        Table(rows=5, odd=lambda row: BadRow("no answer", source="a", row=row) if row == 3 else None)
    )
    draw(stream, 3, 6, 4)
    assert rows == [
        {"step": 2, "phase": "rl", "split": "train", "index": 3, "source": "a", "row": 3, "reason": "no answer"}
    ]
    assert [stream.metrics(step)["data/bad_rows"] for step in (1, 2, 3)] == [0.0, 1.0, 1.0]


def test_a_bad_row_that_was_recorded_before_a_resume_is_not_recorded_again() -> None:
    task = Table(rows=5, odd=third_is_bad)
    stream, rows = watched(task)
    draw(stream, 4)
    again, new = watched(task)
    again.bad_rows.restore(rows)
    draw(again, 4)
    assert (len(rows), new) == (1, [])
    assert again.bad_rows.count(1) == 1


def test_rows_of_the_other_split_are_no_bad_rows() -> None:
    stream, rows = watched(Table(rows=9, odd=lambda row: NotInSplit() if row % 2 else None), BadRows.fail, 0.0)
    draw(stream, 12)
    assert rows == []


def test_the_policy_fail_stops_at_the_first_bad_row() -> None:
    stream, rows = watched(Table(odd=sometimes_odd), BadRows.fail)
    with pytest.raises(BadRowsError, match=r"^a\.csv row 3 cannot be used: no answer\. .* task\.bad_rows=fail: repair"):
        draw(stream, 8)
    assert len(rows) == 1


@pytest.mark.parametrize(("bad_of_ten", "stops"), [(3, False), (4, True)])
def test_too_large_a_share_of_bad_rows_stops_the_run(bad_of_ten: int, stops: bool) -> None:
    odd = lambda row: BadRow(f"no answer in {row}") if row % 10 >= 10 - bad_of_ten else None  # noqa: E731
    stream, _ = watched(Table(rows=1000, odd=odd), max_rate=0.3)
    if not stops:
        draw(stream, 70)
        return
    with pytest.raises(BadRowsError) as stopped:
        draw(stream, 70)
    text = str(stopped.value)
    assert text.startswith(
        "8 of 20 rows (40%) cannot be used, more than task.max_bad_row_rate=0.3; most often (8 of 8)"
    )
    assert "mode=faults run=outputs/r" in text


def test_the_first_few_rows_do_not_stop_a_run() -> None:
    stream, _ = watched(Table(rows=1000, odd=lambda row: BadRow("x") if row < 4 else None), max_rate=0.25)
    draw(stream, 14)
