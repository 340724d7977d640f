"""Open the rows of a split, and learn from a few of them what the config does not say.

    Rows ──first LOOKED_AT rows──▶ layout, first number of options
         ──SAMPLED spread rows ──▶ the form of answers, texts for a tokenizer that is made here

Nothing here decodes an image, but where two columns of images have to be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmrl.config.dataset import DatasetConfig
from vlmrl.errors import ConfigError, fenced
from vlmrl.rendering.images import image_hash
from vlmrl.tasks.base import BadRow, Split
from vlmrl.tasks.dataset.columns import Unusable, is_missing, options_of, plain, value_at
from vlmrl.tasks.dataset.demonstrations import NumberBetween, OneOf, Wrapped, form_of
from vlmrl.tasks.dataset.examples import Draft, Drafting, Readers
from vlmrl.tasks.dataset.files import Place
from vlmrl.tasks.dataset.images import ImageReader
from vlmrl.tasks.dataset.layouts import Layout, recognize
from vlmrl.tasks.dataset.rows import Rows
from vlmrl.tasks.dataset.sources.opening import open_rows
from vlmrl.tasks.dataset.template import PromptTemplate
from vlmrl.tasks.dataset.videos import VideoReader

LOOKED_AT = 16
"""Rows at the front by which two readings of the columns are compared."""

SAMPLED = 256
"""Rows, spread over the data set, that tell the form of its answers."""

IN_A_ROW = 8
"""Rows that are sampled at one place: the rows next to one that was read cost 0.3 ms, a row elsewhere 16 ms."""

SAMPLED_TEXTS = 64
"""Rows whose texts train a tokenizer that is made here."""

LONGEST_SAMPLE = 2000
"""Characters of a text that train it."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows of one split and how they are read."""

    rows: Rows
    layout: Layout
    drafting: Drafting
    readers: Readers

    @property
    def has_demonstrations(self) -> bool:
        """Whether any of the first rows says what the assistant says."""
        return any(draft.demonstration is not None for draft in self.drafts(LOOKED_AT))

    @property
    def shows_videos(self) -> bool:
        """Whether any of a few rows shows a video."""
        return any(draft.shows_videos for draft in self.drafts(LOOKED_AT))

    def table(self) -> dict[str, str]:
        """What was opened and recognized: the number of rows, and the columns of each role."""
        table = {"rows": f"{len(self.rows):,} of {self.rows.origin}"} | self.layout.table(self.rows.columns)
        if self.drafting.first_index:
            table["choices"] += "; an answer that is a number counts them from 1"
        return table

    def drafts(self, count: int) -> list[Draft]:
        """Up to `count` rows, spread over the data set, without those that cannot be used."""
        total, places = len(self.rows), -(-count // IN_A_ROW)
        spread = (place * total // places + step for place in range(places) for step in range(IN_A_ROW))
        numbers = dict.fromkeys(number for number in spread if number < total) if total > count else range(total)
        found: list[Draft] = []
        for number in numbers:
            try:
                with fenced("reading the row", Unusable):
                    found.append(self.drafting.draft(self.rows.row(number)))
            except (Unusable, BadRow):
                continue
        return found

    @cached_property
    def sample(self) -> list[Draft]:
        """Rows that are spread over the data set."""
        return self.drafts(SAMPLED)


def open_pool(config: DatasetConfig, split: Split) -> Pool:
    """Open the rows of a split and recognize their columns. Raises ConfigError."""
    rows = _open(config, split)
    images = ImageReader(_root(config.image_root), config.fetch)
    videos = VideoReader(_root(config.video_root), config.fetch, config.ignore_video_settings)
    looked_at = _first_rows(rows)
    template = None if config.template is None else PromptTemplate(config.template, "task.template")

    def same_images(one: str, other: str) -> bool:
        return all(_equal_images(images, row, place, one, other) for row, place in looked_at[:4])

    layout = recognize(
        rows.columns,
        config.columns,
        [row for row, _ in looked_at],
        needs_prompt=template is None and config.system_prompt is None,
        same_images=same_images,
    )
    if template is not None:
        template.check(list(rows.columns))
    first_index = _first_index(layout, [row for row, _ in looked_at])
    labels = rows.columns[layout.answer].labels if layout.answer is not None and layout.answer in rows.columns else ()
    drafting = Drafting(layout, config.system_prompt, template, first_index, labels)
    return Pool(rows, layout, drafting, Readers(images, videos))


def _root(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def _open(config: DatasetConfig, split: Split) -> Rows:
    if split == "train" or (config.eval_path is None and config.eval_split is None):
        return open_rows(
            _paths(config.path), name=config.name, split=config.split, revision=config.revision, rows=config.rows
        )
    path = config.path if config.eval_path is None else config.eval_path
    is_same = path == config.path  # otherwise the config and the revision are those of another data set
    # An evaluation set is held out as a whole (runs/eval_sets.py), so `rows` counts for it, too.
    rows = config.rows if is_same and config.eval_split == config.split else None
    name, revision = (config.name, config.revision) if is_same else (None, None)
    try:
        return open_rows(_paths(path), name=name, split=config.eval_split, revision=revision, rows=rows)
    except ConfigError as error:
        text = str(error).replace("task.split", "task.eval_split")
        raise ConfigError(text if config.eval_path is None else text.replace("task.path", "task.eval_path")) from None


def place_of(rows: Rows, number: int) -> Place:
    """Where a row came from."""
    return Place(rows.folder(number), rows.root(number))


def _paths(path: Any) -> str | list[str]:
    return [str(each) for each in path] if isinstance(path, list | tuple) else str(path)


def _first_rows(rows: Rows) -> list[tuple[dict[str, Any], Place]]:
    """The first rows that can be read, and where they came from."""
    found: list[tuple[dict[str, Any], Place]] = []
    for number in range(min(LOOKED_AT, len(rows))):
        try:
            found.append((rows.row(number), place_of(rows, number)))
        except BadRow:
            continue
    return found


def _equal_images(images: ImageReader, row: Mapping[str, Any], place: Place, one: str, other: str) -> bool:
    """Whether two columns of a row show the same pixels; also where one of them is empty or cannot be read."""
    try:
        found = [[image_hash(pixels) for pixels in images.pixels(value_at(row, each), place)] for each in (one, other)]
    except Unusable:
        return True
    return not all(found) or found[0] == found[1]


def _first_index(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> int:
    """1 where answers are numbers that only fit if the first option has number 1, else 0."""
    if not layout.choices or layout.answer is None:
        return 0
    pairs: list[tuple[int, int]] = []
    for row in rows:
        answer = plain(value_at(row, layout.answer))
        if isinstance(answer, str) and answer.strip().isdecimal() and len(answer.strip()) < 4:
            answer = int(answer)
        if isinstance(answer, int) and not isinstance(answer, bool):
            try:
                pairs.append((answer, len(options_of(row, layout.choices))))
            except ValueError:
                continue
    numbers = [number for number, _ in pairs]
    return int(bool(pairs) and min(numbers) > 0 and any(number == count for number, count in pairs))


# ── what a sample tells ─────────────────────────────────────────────────────────────────────────────────────


def answers_of(pool: Pool) -> list[str]:
    """What the assistant says in sampled rows."""
    return [draft.demonstration for draft in pool.sample if draft.demonstration is not None]


def form_in(pool: Pool) -> OneOf | NumberBetween | Wrapped | None:
    """The form of the answers in sampled rows; None where they have none."""
    return form_of(answers_of(pool), [len(draft.options) for draft in pool.sample if draft.options])


def texts_in(pool: Pool) -> tuple[str, ...]:
    """Texts of prompts and answers in sampled rows."""
    texts: dict[str, None] = {}
    for draft in pool.drafts(SAMPLED_TEXTS):
        texts |= dict.fromkeys(turn.text[:LONGEST_SAMPLE] for turn in draft.turns)
        if draft.demonstration is not None:
            texts[draft.demonstration[:LONGEST_SAMPLE]] = None
    return tuple(text for text in texts if not is_missing(text))
