"""From a row to an example: the prompt with pixels, the answer, and what a demonstration says.

    row ──layout──▶ turns, image cells, answer cell ──▶ template, markers ──▶ decode ──▶ Example      `Unusable`

Nothing here knows splits, order or seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.rendering.images import Pixels
from vlmrl.tasks.dataset.column_kinds import is_conversation
from vlmrl.tasks.dataset.columns import (
    Unusable,
    as_json,
    as_list,
    as_reference,
    as_text,
    choice_letter,
    is_missing,
    lettered_lines,
    options_of,
    read,
    value_at,
)
from vlmrl.tasks.dataset.conversation import (
    Slot,
    Turn,
    boxes_of,
    turns_of,
    with_boxes,
    with_markers,
)
from vlmrl.tasks.dataset.files import Place
from vlmrl.tasks.dataset.images import ImageReader, flat
from vlmrl.tasks.dataset.layouts import Layout
from vlmrl.tasks.dataset.placing import (
    MODALITIES,
    Placed,
    check_markers,
    image_markers_as_videos,
    place_media,
    slots_of,
)
from vlmrl.tasks.dataset.template import PromptTemplate
from vlmrl.tasks.dataset.videos import LoadedVideo, Media, VideoCell, VideoReader, cells_of
from vlmrl.types import Modality


@dataclass(frozen=True)
class Draft:
    """A row as text: all of an example but its pixels."""

    question: tuple[str, ...]
    """The texts of the prompt as they stand in the row, without the run's system prompt and template; these decide
    whether the row is held out."""
    turns: tuple[Turn, ...]
    """The prompt; it ends with a turn that the policy answers."""
    cells: tuple[Any, ...]
    """The images of the image columns, one by one."""
    videos: tuple[VideoCell, ...]
    """The videos of the video columns, one by one."""
    own: tuple[Any, ...]
    """The images and videos (`VideoCell`) that messages hold themselves, one by one."""
    answer: Any
    """What rewards compare with; None where the data set has no answers."""
    demonstration: str | None
    """What the assistant says; None where no column has it."""
    options: tuple[str, ...]

    @property
    def shows_videos(self) -> bool:
        """Whether the prompt shows a video."""
        return bool(self.videos) or any(isinstance(cell, VideoCell) for cell in self.own)


@dataclass(frozen=True)
class Drafting:
    """What a row is read with. Thread-safe."""

    layout: Layout
    system_prompt: str | None
    template: PromptTemplate | None
    first_index: int
    """The number of the first option, where answers are numbers of options."""
    labels: tuple[str, ...] = ()
    """The names of the classes, where the answer is the number of one (`ClassLabel` of `datasets`)."""

    def draft(self, row: Mapping[str, Any]) -> Draft:
        """The text of a row. Decodes no image and no video. Raises `Unusable`."""
        layout = self.layout
        options = options_of(row, layout.choices) if layout.choices else []
        cells = tuple(cell for column in layout.images for cell in flat(value_at(row, column)))
        videos = tuple(cell for column in layout.videos for cell in cells_of(value_at(row, column)))
        counts: dict[Modality, int] = {"image": len(cells), "video": len(videos)}
        turns = self._turns(row, options)
        if layout.boxes is not None:
            turns = with_boxes(turns, value_at(row, layout.boxes), layout.boxes)
        said = turns.pop() if turns and turns[-1].role == "assistant" else None
        question = tuple(turn.text for turn in turns if turn.role not in ("system", "assistant"))
        if self.template is not None:
            turns = self._templated(row, turns, counts)
            if layout.prompt is None and layout.messages is None:
                question = (turns[-1].text,)
        turns = image_markers_as_videos(with_markers(self._with_system(row, turns)), counts)
        _check_prompt(turns, has_media=any(counts.values()))
        check_markers(turns, counts)
        return Draft(
            question=question,
            turns=tuple(turns),
            cells=cells,
            videos=videos,
            own=tuple(_single(slot) for slot in slots_of(turns) if slot.cell is not None),
            answer=self._answer(row, options, said),
            demonstration=self._demonstration(row, options, said),
            options=tuple(options),
        )

    # ── the prompt ──────────────────────────────────────────────────────────────────────────────────────────

    def _turns(self, row: Mapping[str, Any], options: Sequence[str]) -> list[Turn]:
        layout = self.layout
        if layout.messages is not None:
            turns = turns_of(value_at(row, layout.messages), layout.messages)
            if options and turns:
                at = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=0)
                turns[at] = _with_options(turns[at], options)
            return turns
        if layout.prompt is None:
            return [Turn("user", ())]
        text = "" if value_at(row, layout.prompt) is None else read(row, layout.prompt, as_text)
        if layout.input is not None and not is_missing(value_at(row, layout.input)):
            text = f"{text}\n{read(row, layout.input, as_text)}"
        turns = []
        for pair in as_list(value_at(row, layout.history)) if layout.history is not None else ():
            question, answer = (*as_list(pair), "", "")[:2]
            turns += [Turn("user", (as_text(question),)), Turn("assistant", (as_text(answer),))]
        return [*turns, _with_options(Turn("user", (text,)), options)]

    def _templated(self, row: Mapping[str, Any], turns: list[Turn], counts: Mapping[Modality, int]) -> list[Turn]:
        """The turns with the template's text in the last one. Slots of that turn keep their images and videos, in
        order."""
        assert self.template is not None
        last = turns[-1] if turns else Turn("user", ())
        slots = slots_of([last])
        held: dict[Modality, int] = {modality: len(slots_of([last], modality)) for modality in MODALITIES}
        columns: dict[Modality, tuple[str, ...]] = {"image": self.layout.images, "video": self.layout.videos}
        text = self.template.render(row, last.text, {m: held[m] or counts[m] for m in MODALITIES}, columns)
        made = Turn(last.role, (text,))
        if slots:
            (made,) = with_markers([made])
            places = slots_of([made])
            if not places:
                made = Turn(last.role, (*slots, text))
            elif [slot.modality for slot in places] != [slot.modality for slot in slots]:
                raise Unusable(
                    f"task.template shows {_named(places)} and the message {_named(slots)}, so it is not clear which "
                    "stands where: correct the template"
                )
            else:
                remaining = iter(slots)
                pieces = tuple(next(remaining) if isinstance(piece, Slot) else piece for piece in made.pieces)
                made = Turn(last.role, pieces)
        return [*turns[:-1], made]

    def _with_system(self, row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
        system, column = self.system_prompt, self.layout.system
        has_own = any(turn.role == "system" for turn in turns)
        if system is None and column is not None and not has_own and not is_missing(value_at(row, column)):
            system = read(row, column, as_text)
        if system is None:
            return turns
        return [Turn("system", (system,)), *(turn for turn in turns if turn.role != "system")]

    # ── the answer ──────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, row: Mapping[str, Any], options: Sequence[str], said: Turn | None) -> Any:
        """The answer of the row: from its column, else the last assistant turn, else the boxes."""
        layout = self.layout
        if layout.answer is not None and not is_missing(value_at(row, layout.answer)):
            if options:
                return read(row, layout.answer, lambda value: choice_letter(value, options, self.first_index))
            value = value_at(row, layout.answer)
            if is_conversation(value):  # TRL's `completion`
                return as_reference(turns_of(value, layout.answer)[-1].text)
            reference = self._label(read(row, layout.answer, as_reference))
            if not is_missing(reference):
                return reference
        if said is not None and not is_missing(said.text):
            return as_reference(said.value if said.value is not None else said.text)
        if layout.boxes is not None and (boxes := boxes_of(value_at(row, layout.boxes))):
            return boxes[0] if len(boxes) == 1 else boxes
        sources = [f"the column {column}" for column in (layout.answer, layout.boxes) if column is not None]
        sources += ["a last assistant turn"] if layout.messages is not None else []
        if sources and layout.rejected is None:  # a pair of answers has no other
            raise Unusable(f"the row has no answer in {' or '.join(sources)}, so it cannot be scored: fill it")
        return None

    def _label(self, answer: Any) -> Any:
        """The name of a class for its number; -1, as test splits have it, is no answer."""
        if not self.labels or not isinstance(answer, int) or isinstance(answer, bool) or answer >= len(self.labels):
            return answer
        return self.labels[answer] if answer >= 0 else None

    def _demonstration(self, row: Mapping[str, Any], options: Sequence[str], said: Turn | None) -> str | None:
        layout = self.layout
        if layout.demonstration is not None:
            return _said_in(value_at(row, layout.demonstration), layout.demonstration)
        if said is not None and said.text.strip():
            return said.text
        if layout.answer is not None:
            if options:
                return str(self._answer(row, options, said))
            return _said_in(self._label(value_at(row, layout.answer)), layout.answer)
        answer = self._answer(row, options, said)
        return None if answer is None else as_json(answer)


def _said_in(value: Any, column: str) -> str | None:
    """What the assistant says, by a cell: its text, the last of its messages, or the first of accepted answers."""
    if is_missing(value):
        return None
    if is_conversation(value):
        return turns_of(value, column)[-1].text or None
    if isinstance(value, list | tuple) and all(isinstance(item, str | Mapping) for item in value):
        accepted = as_reference(value)
        return as_json(accepted[0])
    return as_json(value)


def _single(slot: Slot) -> Any:
    """The image or the video (`VideoCell`) that a part of a message holds."""
    found = list(flat(slot.cell) if slot.modality == "image" else cells_of(slot.cell))
    if len(found) != 1:
        kind = slot.modality
        article = "an" if kind == "image" else "a"
        raise Unusable(f"{article} {kind} part of a message holds {len(found)} {kind}s: give each a part of its own")
    return found[0]


def _named(slots: Sequence[Slot]) -> str:
    """
    >>> _named([Slot(), Slot(modality="video")]), _named([])
    ('1 images and 1 videos', '0 images')
    """
    videos = sum(slot.modality == "video" for slot in slots)
    return f"{len(slots) - videos} images" + (f" and {videos} videos" if videos else "")


def _with_options(turn: Turn, options: Sequence[str]) -> Turn:
    """The question with its options below, unless it has them already."""
    text = turn.text
    if not options or all(option.strip() and option.strip() in text for option in options):
        return turn
    end = "" if text.endswith("\n") or not text else "\n"
    return dataclasses.replace(turn, pieces=(*turn.pieces, end + lettered_lines(options)))


def _check_prompt(turns: Sequence[Turn], *, has_media: bool) -> None:
    if not turns or turns[-1].role not in ("user", "tool"):
        last = f"its last message is of role {turns[-1].role}" if turns else "no message comes before the answer"
        raise Unusable(f"the prompt does not end with a user message, so there is nothing to answer: {last}")
    said = any(turn.text.strip() for turn in turns if turn.role in ("user", "tool"))
    if not said and not (has_media and any(turn.text.strip() for turn in turns)):
        raise Unusable("the prompt is empty, so there is nothing to answer: fill its column, or leave the row out")


@dataclass(frozen=True, eq=False)
class Example:
    """A row with its pixels."""

    draft: Draft
    images: tuple[Pixels, ...]
    """Of the image columns."""
    videos: tuple[LoadedVideo, ...]
    """Of the video columns."""
    own: tuple[Media, ...]
    """Of the messages themselves."""

    @property
    def media(self) -> tuple[Media, ...]:
        """All images and videos, in an order that is a function of the row."""
        return (*self.own, *self.images, *self.videos)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What each of `media` is."""
        return tuple("video" if isinstance(each, LoadedVideo) else "image" for each in self.media)

    def placed(self, shown: tuple[Media, ...] | None = None) -> list[Placed]:
        """The prompt with its images and videos, or with others of the same number and `modalities` (`shown`, in the
        order of `media`)."""
        media = self.media if shown is None else shown
        own, rest = media[: len(self.own)], media[len(self.own) :]
        columns: dict[Modality, tuple[Media, ...]] = {
            "image": rest[: len(self.images)],
            "video": rest[len(self.images) :],
        }
        return place_media(self.draft.turns, columns, own)


@dataclass(frozen=True)
class Readers:
    """What reads the images and videos of a data set. Thread-safe."""

    images: ImageReader
    videos: VideoReader

    def media(self, cell: Any, place: Place) -> list[Media]:
        """The images of a cell, or the video of a `VideoCell`. Raises `Unusable`."""
        return [self.videos.load(cell, place)] if isinstance(cell, VideoCell) else [*self.images.pixels(cell, place)]


def example_of(drafting: Drafting, readers: Readers, row: Mapping[str, Any], place: Place) -> Example:
    """Read a row, decode its images and look at its videos. Raises `Unusable`."""
    draft = drafting.draft(row)
    return Example(
        draft,
        images=tuple(pixels for cell in draft.cells for pixels in readers.images.pixels(cell, place)),
        videos=tuple(readers.videos.load(cell, place) for cell in draft.videos),
        own=tuple(media for cell in draft.own for media in readers.media(cell, place)),
    )
