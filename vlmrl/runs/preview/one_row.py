"""`mode=preview row=417`: one row whole, and the worth of answers that one types."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError, UserFault, safe_repr
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import RenderingParts
from vlmrl.runs.preview.grading import Grader
from vlmrl.runs.preview.page import card, section, table, write_document
from vlmrl.runs.preview.sample import see
from vlmrl.runs.preview.screen import print_prompt, print_worth
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.tasks.base import BadRow, NotInSplit, Problem, Split, Task
from vlmrl.tasks.border import get_num_rows, get_problem
from vlmrl.tasks.dataset.task import DatasetTask

LONGEST_CELL = 300
"""Characters of a cell on the screen."""

ASK = "answer> "


async def show_row(config: RunConfig, task: Task, parts: RenderingParts, run_dir: RunDir) -> int:
    """Print row `config.row`, write its page, then score each line of the standard input as an answer.

    `\\n` in a line is a line break. Returns 1 where the row cannot be used. Raises ConfigError where there is no such
    row.
    """
    row = config.row
    assert row is not None, "called for mode=preview row=…"
    try:
        seen = await _find(task, parts.renderer, row)
    except (BadRow, UserFault) as fault:
        print(f"row {row} cannot be used: {fault}")
        return 1
    print(f"{seen.problem_id} ({seen.split} split, {seen.tokens} tokens, {seen.image_tokens} of {seen.kinds_shown})")
    for name, value in seen.columns.items():
        print(f"  {name}: {safe_repr(value)[:LONGEST_CELL]}")
    assert seen.prompt is not None, "it was seen with keep=True"
    print_prompt(seen.prompt, parts.tokenizer, longest=100_000)
    grader = Grader(config, task)
    graded = await grader.grade(seen)
    print_worth(seen, graded)
    cells = table((name, safe_repr(value)) for name, value in seen.columns.items())
    write_document(run_dir.preview_page, f"Row {row}", card(seen, graded, parts) + section("Cells", cells))
    print(f"page  {run_dir.preview_page}")
    for answer in _typed():
        faults: list[str] = []
        (values,) = await grader.score(seen, [answer], faults)
        shown = ", ".join(f"{name} {'abstains' if value is None else f'{value:g}'}" for name, value in values.items())
        print("; ".join([shown or "no reward term", *faults]))
    return 0


async def _find(task: Task, renderer: Renderer, row: int) -> SeenProblem:
    """The row in the split that it belongs to. A task without rows counts its training problems."""
    rows = get_num_rows(task, "train")
    if rows is not None and row >= rows:
        raise ConfigError(
            f"row={row} does not exist, because the data has {rows:,} rows: choose one from 0 to {rows - 1}"
        )
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        try:
            problem, problem_id = _problem(task, split, row)
            return await see(task, renderer, problem, problem_id, split, row, keep=True)
        except NotInSplit:
            continue
    raise ConfigError(f"row={row} belongs to neither split, so a run does not use it: choose another one")


def _problem(task: Task, split: Split, row: int) -> tuple[Problem, str]:
    if not isinstance(task, DatasetTask):
        return get_problem(task, split, row)
    problem = task.problem_of_row(split, row)
    return problem, problem.id


def _typed() -> Iterator[str]:
    """Answers from the standard input, line by line, until it ends."""
    asked = sys.stdin.isatty()
    if asked:
        print(f"Type an answer to see what it is worth (\\n is a line break, Ctrl-D ends).\n{ASK}", end="", flush=True)
    for line in sys.stdin:
        yield line.rstrip("\r\n").replace("\\n", "\n")
        if asked:
            print(ASK, end="", flush=True)
