"""`task=dataset`: problems from rows of questions, pictures, videos and answers, without code.

    index ─order─▶ row number ─Rows─▶ cells ─layout─▶ Example ─membership─▶ DatasetProblem
                                        │                  └─ other split ──▶ NotInSplit
                                        └─ cannot be used ──────────────────▶ BadRow

    sources/, rows.py   files and hubs, as rows         order.py, split.py   which row is drawn, which is held out
    layouts.py          which column plays which part   columns.py           values of cells
    conversation.py     turns, markers, boxes           placing.py           images and videos in their places
    files.py, fetch.py  what a cell names               images.py, videos.py pixels
    template.py         task.template                   examples.py          all of these, for one row
    demonstrations.py   random answers                  probe.py             what the first rows tell
    preferences.py      the better and the worse answer

An index of the training split is a row of a shuffled epoch; one of the evaluation split is a row in the order of the
file. A row whose text and pixels belong to the other split is passed over. So nothing scans the data, and a bad row
costs nothing before it is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlmrl.config.dataset import DatasetConfig
from vlmrl.errors import ConfigError, fenced
from vlmrl.tasks.base import BadRow, NotInSplit, Preference, Reply, Split, Task
from vlmrl.tasks.dataset.columns import Unusable
from vlmrl.tasks.dataset.demonstrations import random_answer
from vlmrl.tasks.dataset.examples import Example, example_of
from vlmrl.tasks.dataset.order import shuffled
from vlmrl.tasks.dataset.placing import Placed
from vlmrl.tasks.dataset.preferences import answers_of_pair
from vlmrl.tasks.dataset.probe import Pool, answers_of, form_in, open_pool, place_of, texts_in
from vlmrl.tasks.dataset.split import belongs_to_eval, content_hash
from vlmrl.tasks.dataset.videos import LoadedVideo, Media, media_hash
from vlmrl.types import Image, Message, Modality, Part, Text

DEFAULT_EVAL_FRACTION = 0.1
"""Share of the rows that is held out where the config names no other evaluation."""

SHUFFLE_TRIES = 64
"""Rows that the blind control looks at to find as many images and videos as a row has."""

_UNKNOWN, _TRAIN, _EVAL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class DatasetProblem:
    """One row. A `vlmrl.tasks.base.Reference`: reward terms read `answer` and `columns`."""

    id: str
    """`<file>:<row>:<8 hex characters of text and pixels>`."""
    messages: tuple[Message, ...]
    answer: Any
    """The answer of the data: a text, a letter of the options, a number, a list of accepted answers, or boxes. None
    where the data set has no answers."""
    columns: Mapping[str, Any]
    """Every column of the row as the file has it; `choices` holds the options as a list of texts."""
    demonstration: str | None
    """What the assistant says in a demonstration; None where the row does not tell."""
    source: str
    """The file."""
    row: int
    """The row in it, counted from 0."""


class DatasetEnv:
    """One prompt and one answer. The score comes from the reward terms alone."""

    def __init__(self, problem: DatasetProblem) -> None:
        self._messages = problem.messages

    def reset(self) -> tuple[Message, ...]:
        return self._messages

    def step(self, completion: str) -> Reply:
        return Reply(done=True)


class DatasetTask(Task):
    """The rows of `task.path`. Thread-safe."""

    def __init__(self, config: DatasetConfig, *, seed: int) -> None:
        """Open the rows and recognize their columns. Raises ConfigError where one of both cannot be done."""
        self._config = config
        self._seed = seed
        self._fraction = _fraction(config)
        train = open_pool(config, "train")
        self._pools: dict[Split, Pool] = {"train": train, "eval": train if self._is_one else open_pool(config, "eval")}
        self._membership = bytearray(len(train.rows) if self._fraction else 0)

    @property
    def _is_one(self) -> bool:
        """Whether both splits are rows of the same files."""
        return self._config.eval_path is None and self._config.eval_split is None

    def pool(self, split: Split) -> Pool:
        """The rows of a split, their columns and the layout that was recognized. Both splits may have the same."""
        return self._pools[split]

    def data_table(self) -> dict[str, str]:
        """What was opened and recognized: `rows`, and the columns of each role."""
        held_out = {"evaluation": f"{self._fraction:.0%} of the rows, by their texts and pixels"}
        if not self._is_one:
            held_out = {f"evaluation {role}": text for role, text in self._pools["eval"].table().items()}
        return self._pools["train"].table() | held_out

    def shows_videos(self) -> bool:
        """Whether any of a few rows shows a video."""
        return any(pool.shows_videos for pool in self._pools.values())

    def num_rows(self, split: Split) -> int:
        return len(self._pools[split].rows)

    def row_of(self, split: Split, index: int) -> int:
        """The row that is drawn at an index."""
        count = self.num_rows(split)
        return shuffled(index, count, self._seed) if split == "train" else index % count

    def problem(self, split: Split, index: int) -> DatasetProblem:
        return self.problem_of_row(split, self.row_of(split, index))

    def problem_of_row(self, split: Split, row: int) -> DatasetProblem:
        """The problem of a row, counted from 0 in the files of the split. Raises `NotInSplit` and `BadRow`."""
        pool = self._pools[split]
        self._check_known_membership(split, row)
        source, number = pool.rows.where(row)
        try:
            cells = pool.rows.row(row)
            with fenced("reading the row", Unusable):  # the data may hold anything
                example = example_of(pool.drafting, pool.readers, cells, place_of(pool.rows, row))
        except (Unusable, BadRow) as error:
            reason = error.text if isinstance(error, Unusable) else error.reason
            if split == "eval" and self._is_one:  # a row that cannot be read has no membership; training reports it
                raise NotInSplit(reason) from None
            raise BadRow(reason, source=source, row=number) from None
        self._check_membership(split, row, example)
        try:
            shown = self._other_media(split, row, example.modalities) if self._config.shuffle_images else None
            placed = example.placed(shown)
        except Unusable as error:
            raise BadRow(error.text, source=source, row=number) from None
        draft = example.draft
        return DatasetProblem(
            id=f"{source}:{number}:{_digest(placed)}",
            messages=tuple(_message(each) for each in placed),
            answer=draft.answer,
            columns=cells | ({"choices": list(draft.options)} if draft.options else {}),
            demonstration=draft.demonstration,
            source=source,
            row=number,
        )

    def env(self, problem: DatasetProblem) -> DatasetEnv:
        return DatasetEnv(problem)

    def demonstration(self, problem: DatasetProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """The prompt and the answer of the row, or a random answer of the same form."""
        if random_answers:
            return (*problem.messages, Message.of("assistant", random_answer(self._form, seed)))
        if problem.demonstration is None:
            if not self._pools["train"].has_demonstrations:
                raise NotImplementedError(
                    "no column is known to hold what the assistant says, so there are no demonstrations: set "
                    "task.columns.answer or task.columns.demonstration, or trainer.warmup.steps=0"
                )
            raise BadRow("the row has no demonstration: fill its column, or leave the row out")
        return (*problem.messages, Message.of("assistant", problem.demonstration))

    def preference(self, problem: DatasetProblem) -> Preference:
        """The prompt with the better and the worse answer of the row."""
        layout = self._pools["train"].layout
        if layout.rejected is None:
            raise NotImplementedError(
                "no column is known to hold the worse answer of a pair, so there is nothing to compare: set "
                "task.columns.chosen and task.columns.rejected"
            )
        try:
            chosen, rejected = answers_of_pair(layout, problem.columns, problem.demonstration)
        except Unusable as error:
            raise BadRow(error.text, source=problem.source, row=problem.row) from None
        return Preference(problem.messages, Message.of("assistant", chosen), Message.of("assistant", rejected))

    def texts(self) -> tuple[str, ...]:
        return texts_in(self._pools["train"])

    # ── the form of answers ─────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _form(self) -> Any:
        form = form_in(self._pools["train"])
        if form is None:
            some = ", ".join(repr(answer[:40]) for answer in answers_of(self._pools["train"])[:3])
            raise NotImplementedError(
                f"the answers of the data set ({some or 'none'}) are no letters of options, no numbers and no small "
                "set of words, so there are no random answers of their form: set "
                "trainer.warmup.demonstrations=correct, or trainer.warmup.steps=0"
            )
        return form

    # ── held-out rows ───────────────────────────────────────────────────────────────────────────────────────

    def _check_known_membership(self, split: Split, row: int) -> None:
        """Raise `NotInSplit` where an earlier draw has found that the row belongs to the other split."""
        if not self._is_one:
            return
        known = self._membership[row] if self._fraction else _TRAIN
        if known not in (_UNKNOWN, _TRAIN if split == "train" else _EVAL):
            raise NotInSplit(f"the row belongs to the {'evaluation' if split == 'train' else 'training'} split")

    def _check_membership(self, split: Split, row: int, example: Example) -> None:
        if not self._is_one or not self._fraction:
            return
        content = content_hash(example.draft.question, example.media)
        self._membership[row] = _EVAL if belongs_to_eval(content, self._fraction) else _TRAIN
        self._check_known_membership(split, row)

    def _other_media(self, split: Split, row: int, modalities: tuple[Modality, ...]) -> tuple[Media, ...] | None:
        """The images and videos of another row that has as many. Raises `Unusable` where none is found.

        A row with equal pixels may be chosen. Were it avoided, the picture would tell which answers are wrong: with two
        pictures in all, it would tell the right one.
        """
        if not modalities:
            return None
        pool = self._pools[split]
        for attempt in range(SHUFFLE_TRIES):
            digest = hashlib.blake2b(f"shuffle/{row}/{attempt}".encode(), digest_size=8).digest()
            other = int.from_bytes(digest, "big") % len(pool.rows)
            if other == row:
                continue
            try:
                with fenced("reading the row", Unusable):
                    found = example_of(pool.drafting, pool.readers, pool.rows.row(other), place_of(pool.rows, other))
            except (Unusable, BadRow):
                continue
            if found.modalities == modalities:
                return found.media
        videos = modalities.count("video")
        counted = f"{len(modalities) - videos} images" + (f" and {videos} videos" if videos else "")
        raise Unusable(
            f"none of {SHUFFLE_TRIES} other rows has {counted}, so task.shuffle_images has nothing to show: set "
            "task.shuffle_images=false"
        )


def _fraction(config: DatasetConfig) -> float:
    named = config.eval_path is not None or config.eval_split is not None
    if named and config.eval_fraction:
        key = "eval_path" if config.eval_path is not None else "eval_split"
        raise ConfigError(
            f"task.eval_fraction={config.eval_fraction} and task.{key} both say which rows are held out, so it is not "
            "clear what is evaluated: set one of them"
        )
    if config.eval_fraction is None:
        return 0.0 if named else DEFAULT_EVAL_FRACTION
    return config.eval_fraction


def _message(placed: Placed) -> Message:
    role, pieces = placed
    return Message(role, tuple(_part(piece) for piece in pieces))


def _part(piece: str | Media) -> Part:
    if isinstance(piece, str):
        return Text(piece)
    return piece.part if isinstance(piece, LoadedVideo) else Image(piece)


def _digest(placed: list[Placed]) -> str:
    """8 hex characters of roles, texts, pixels and videos."""
    digest = hashlib.blake2b(digest_size=4)
    for role, pieces in placed:
        for piece in (role, *pieces):
            text = piece if isinstance(piece, str) else media_hash(piece)
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
