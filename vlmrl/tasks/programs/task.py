"""`task=program`: problems for a program of the user's, which plays them through the run's chat endpoint.

    task.path      rows ─▶ DatasetTask ─▶ RowProblem: messages, answer, columns       the splits are those of the rows
    no task.path   index ─────────────────▶ NumberedProblem: split, index, seed       the program makes the problem

What the program is told (`payload`) is one JSON object, which docs/programs.md describes.
"""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

from vlmrl.config.program import ProgramConfig
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.dataset.task import DatasetTask
from vlmrl.tasks.programs.problems import NumberedProblem, RowProblem
from vlmrl.types import Message


class ProgramTask(Task):
    """Problems for programs. Raises `ConfigError` where the rows cannot be opened."""

    def __init__(self, config: ProgramConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._rows = None if config.path is None else DatasetTask(config, seed=seed)

    def problem(self, split: Split, index: int) -> NumberedProblem | RowProblem:
        facts = {"split": split, "index": index, "seed": problem_seed(self._seed, split, index)}
        if self._rows is None:
            id = f"{split} {index}"
            return NumberedProblem(id, {"id": id, **facts, "args": self._config.args})
        row = self._rows.problem(split, index)
        return RowProblem(row, {"id": row.id, **facts, "args": self._config.args})

    def num_rows(self, split: Split) -> int | None:
        return None if self._rows is None else self._rows.num_rows(split)

    def env(self, problem: Any) -> NoReturn:
        raise NotImplementedError(
            "the episodes of task=program are played by task.command, which talks to the run's chat endpoint"
        )

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """The row with its answer, as in task=dataset. A program shows its own prompts, which may differ."""
        if self._rows is None:
            raise NotImplementedError(
                "task=program without task.path has no demonstrations, because the program makes the problems: set "
                "trainer.warmup.steps=0"
            )
        return self._rows.demonstration(problem.row, random_answers=random_answers, seed=seed)

    def texts(self) -> tuple[str, ...]:
        """`task.texts` and the texts of the rows."""
        of_rows = () if self._rows is None else self._rows.texts()
        if not self._config.texts and not of_rows:
            raise NotImplementedError("task.texts is empty, and there are no rows")
        return (*self._config.texts, *of_rows)

    def data_table(self) -> dict[str, str]:
        """What was read of the rows."""
        return {} if self._rows is None else self._rows.data_table()


def problem_seed(seed: int, split: Split, index: int) -> int:
    """A number below 2**32 from which a program may draw its problem: the siblings of a group get the same. That of the
    evaluation split does not depend on the run's seed, so that runs compare.

    >>> problem_seed(0, "eval", 3) == problem_seed(1, "eval", 3), problem_seed(0, "train", 3) == problem_seed(
    ...     1, "train", 3
    ... )
    (True, False)
    """
    of_run = seed if split == "train" else "eval"
    return int.from_bytes(hashlib.blake2b(f"{of_run}/{split}/{index}".encode(), digest_size=4).digest(), "big")
