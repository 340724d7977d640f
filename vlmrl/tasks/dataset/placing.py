"""Images and videos in their places in a conversation: the slots of its turns take those of the row.

turns of text and slots + images, videos ──check_markers──▶ their numbers agree ──place_media──▶ turns with pixels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias, get_args

from vlmrl.tasks.dataset.columns import Unusable
from vlmrl.tasks.dataset.conversation import MARKERS, Role, Slot, Turn
from vlmrl.tasks.dataset.videos import Media
from vlmrl.types import Modality

MODALITIES: tuple[Modality, ...] = get_args(Modality)

Placed: TypeAlias = tuple[Role, tuple[str | Media, ...]]
"""Role, and texts, images and videos in order."""


def slots_of(turns: Sequence[Turn], modality: Modality | None = None) -> list[Slot]:
    """The slots of the turns in order: all of them, or those of a modality."""
    slots = [piece for turn in turns for piece in turn.pieces if isinstance(piece, Slot)]
    return [slot for slot in slots if modality is None or slot.modality == modality]


def image_markers_as_videos(turns: Sequence[Turn], counts: Mapping[Modality, int]) -> list[Turn]:
    """Turns in which `<image>` stands for a video, where a row has videos and no image, and as many such markers as
    videos: LLaVA-Video and its relatives write their data in this way."""
    slots = slots_of(turns)
    is_llava = not counts["image"] and len(slots) == counts["video"] > 0
    if not is_llava or any(slot.modality != "image" or slot.cell is not None for slot in slots):
        return list(turns)

    def changed(turn: Turn) -> Turn:
        pieces = tuple(dataclasses.replace(p, modality="video") if isinstance(p, Slot) else p for p in turn.pieces)
        return dataclasses.replace(turn, pieces=pieces)

    return [changed(turn) for turn in turns]


def check_markers(turns: Sequence[Turn], counts: Mapping[Modality, int]) -> None:
    """Raise `Unusable` unless the images and videos of the columns, of which there are `counts`, fit into the slots of
    the turns."""
    for modality in MODALITIES:
        _check_markers_of(modality, slots_of(turns, modality), counts[modality])


def _check_markers_of(modality: Modality, slots: Sequence[Slot], count: int) -> None:
    empty = [slot for slot in slots if slot.cell is None]
    numbers = [slot.number for slot in empty if slot.number is not None]
    if not empty:
        if slots and count:
            raise Unusable(
                f"the messages hold {len(slots)} {modality}s themselves, and the columns of {modality}s {count} more "
                f"without a place: remove one of them, or set task.columns.{modality}s=[]"
            )
        return
    if numbers and len(numbers) == len(empty):
        if max(numbers) >= count:
            raise Unusable(
                f"the text names {modality} {max(numbers) + 1}, but the row has {count}, so it is not clear what it "
                "shows: correct the row"
            )
    elif len(empty) != count:
        raise Unusable(
            f"the prompt has {_count(len(empty), 'place')} for {modality}s ({MARKERS[modality]}) and the row "
            f"{_count(count, modality)}, so it is not clear which stands where: correct the row"
        )


def _count(number: int, noun: str) -> str:
    """
    >>> _count(1, "image"), _count(2, "image")
    ('1 image', '2 images')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Waiting:
    """The images, or the videos, of the columns of one row, which slots take."""

    def __init__(self, slots: Sequence[Slot], media: Sequence[Media]) -> None:
        self._media = media
        self._numbers = {slot.number for slot in slots} - {None}
        self._unnumbered = iter([index for index in range(len(media)) if index not in self._numbers])
        self._has_places = any(slot.cell is None for slot in slots)
        self._taken: set[int] = set()

    def take(self, slot: Slot) -> Media:
        index = slot.number if slot.number is not None else next(self._unnumbered)
        self._taken.add(index)
        return self._media[index]

    @property
    def first(self) -> list[Media]:
        """Those that no slot has taken, which come first in the first user message."""
        if not self._numbers and self._has_places:
            return []
        return [media for index, media in enumerate(self._media) if index not in self._taken]


def place_media(turns: Sequence[Turn], media: Mapping[Modality, Sequence[Media]], own: Sequence[Media]) -> list[Placed]:
    """The turns with pixels: `own` in the slots that hold an image or a video themselves, `media`, by modality, in the
    others, each list in order. Those without a slot come first in the first user message. `check_markers` has held."""
    inline = iter(own)
    waiting = {modality: _Waiting(slots_of(turns, modality), media[modality]) for modality in MODALITIES}

    def taken(slot: Slot) -> Media:
        return next(inline) if slot.cell is not None else waiting[slot.modality].take(slot)

    placed = [
        (turn.role, tuple(taken(piece) if isinstance(piece, Slot) else piece for piece in turn.pieces if piece != ""))
        for turn in turns
    ]
    first = [each for modality in MODALITIES for each in waiting[modality].first]
    at = next((number for number, (role, _) in enumerate(placed) if role == "user"), 0)
    return [(role, (*first, *pieces) if number == at else pieces) for number, (role, pieces) in enumerate(placed)]
