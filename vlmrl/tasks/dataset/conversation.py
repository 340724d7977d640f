"""From a row to the turns of a conversation, with a place for every image.

    prompt text, or list of messages ──▶ turns of text and slots ──template──▶ … ──place_images──▶ turns with pixels

A **slot** is where an image stands. Lists of parts (`{"type": "image"}`, `image_url`) give slots; otherwise the markers
`<image>` in the texts do. Slots without an image of their own take those of the image columns, in order. Without any
slot the images come first in the first user message. Any other number is `Unusable`.

Text that spells a control token of a model stays text: the renderer sees to it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmrl.rendering.images import Pixels
from vlmrl.tasks.dataset.columns import Unusable, as_json, as_list, as_text, is_missing, number_text, parsed, short

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function", "ipython"), "tool"),
}
"""What data sets call a role → ours."""

MARKER = "<image>"
"""Marks where an image stands."""

_MARKER = re.compile(r"<image(?:[ _-]?(\d{1,3}))?>")
_BOX_MARKER = re.compile(r"<bbox>|<ref-object>")


@dataclass(frozen=True)
class Slot:
    """A place of an image."""

    cell: Any = None
    """The image, where the message holds it itself; None: it comes from the columns of images."""
    number: int | None = None
    """Which image of the columns, from 0; None: the next one."""


Piece: TypeAlias = str | Slot


@dataclass(frozen=True)
class Turn:
    """One message before its images are placed."""

    role: Role
    pieces: tuple[Piece, ...]
    value: Any = None
    """What an assistant turn is, where it is no text: a list of numbers, for example."""

    @property
    def text(self) -> str:
        """The text, with a marker for each slot."""
        return "".join(piece if isinstance(piece, str) else MARKER for piece in self.pieces)


# ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────


def turns_of(value: Any, column: str) -> list[Turn]:
    """The turns of a list of messages: `role`/`content`, `from`/`value`, or pairs of `user` and `assistant`. Raises
    `Unusable`.

    >>> [(turn.role, turn.text) for turn in turns_of([{"from": "human", "value": "Hi <image>"}], "conversations")]
    [('user', 'Hi <image>')]
    """
    turns: list[Turn] = []
    for message in as_list(value):
        if isinstance(message, str) and isinstance(found := parsed(message), Mapping):
            message = found
        if not isinstance(message, Mapping):
            raise Unusable(f"the column {column} has the message {short(message)}, which is no struct of role and text")
        turns.extend(_turns_of_message(message, column))
    if not turns:
        raise Unusable(f"the column {column} has no message, so there is no prompt: fill it or leave the row out")
    return turns


def _turns_of_message(message: Mapping[str, Any], column: str) -> Iterator[Turn]:
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in message and text_key in message and message[role_key] is not None:
            name = message[role_key]
            role = ROLES.get(str(name).strip().lower())
            if role is None:
                raise Unusable(
                    f"the column {column} has a message of role {short(name)}, which is none of {', '.join(ROLES)}: "
                    "rename it"
                )
            yield Turn(role, tuple(pieces_of(message[text_key], column)), _value_of(message[text_key]))
            return
    asked = next((name for name in ("user", "human") if name in message), None)
    if asked is not None and "assistant" in message:
        yield Turn("user", tuple(pieces_of(message[asked], column)))
        yield Turn("assistant", tuple(pieces_of(message["assistant"], column)), _value_of(message["assistant"]))
        return
    raise Unusable(f"the column {column} has the message {short(message)}, whose role or text is not known")


def _value_of(content: Any) -> Any:
    """The content where it is no text and no list of parts: a box, or a number."""
    is_parts = isinstance(content, list | tuple) and all(isinstance(part, str | Mapping) for part in content)
    return None if content is None or isinstance(content, str | Mapping) or is_parts else content


def pieces_of(content: Any, column: str) -> Iterator[Piece]:
    """Texts and slots of a message's content. Raises `Unusable`."""
    if content is None:
        return
    if _value_of(content) is not None:
        yield as_json(content)
    elif isinstance(content, str):
        yield content
    else:
        for part in content if isinstance(content, list | tuple) else [content]:
            yield part if isinstance(part, str) else _piece(part, column)


def _piece(part: Mapping[str, Any], column: str) -> Piece:
    """One part: `{"type": "text", "text": …}`, `{"type": "image"}`, `{"type": "image_url", "image_url": {"url": …}}`.

    Arrow gives every part the fields of all parts, so those that are None say nothing.
    """
    filled = {name: value for name, value in part.items() if value is not None}
    kind = str(filled.get("type", "")).lower()
    if kind in ("text", "input_text", "output_text") or (not kind and "text" in filled):
        return as_text(filled.get("text", filled.get("content", "")))
    if kind.startswith(("video", "audio", "input_audio")):
        raise Unusable(f"the column {column} has a part of type {kind}, and only text and images are read")
    if kind in ("image", "image_url", "input_image") or "image_url" in filled or "image" in filled:
        number = filled.pop("image") if isinstance(filled.get("image"), int) else filled.get("index")
        cell = {name: value for name, value in filled.items() if name not in ("type", "index", "text", "detail")}
        source = cell.get("source")
        if isinstance(source, Mapping):  # Anthropic's {"type": "base64", "data": …}
            cell = {name: value for name, value in source.items() if name in ("data", "url")}
        return Slot(_image_cell(cell), int(number) if isinstance(number, int) and not cell else None)
    raise Unusable(f"the column {column} has the part {short(part)}, whose type is not known")


def _image_cell(cell: Mapping[str, Any]) -> Any:
    """The image of a part; None where it has none."""
    if set(cell) == {"image_url"} and isinstance(cell["image_url"], Mapping):
        return cell["image_url"].get("url")
    return dict(cell) if any(not is_missing(value) for value in cell.values()) else None


def with_markers(turns: Sequence[Turn]) -> list[Turn]:
    """Turns in which the markers in the texts have become slots. Where a list of parts has given slots already, its
    texts are left as they are. Assistant turns are text."""
    if any(isinstance(piece, Slot) for turn in turns for piece in turn.pieces):
        return list(turns)
    shown: set[int] = set()
    return [
        turn if turn.role == "assistant" else dataclasses.replace(turn, pieces=tuple(_split(turn.text, shown)))
        for turn in turns
    ]


def _split(text: str, shown: set[int]) -> Iterator[Piece]:
    """A text as texts and slots. `<image 2>` (MMMU) is image number 2, shown where it is named first; `shown` collects
    the numbers."""
    end = 0
    for found in _MARKER.finditer(text):
        number = None if found[1] is None else int(found[1]) - 1
        if number is not None and number in shown:
            continue
        if found.start() > end:
            yield text[end : found.start()]
        end = found.end()
        if number is not None:
            shown.add(number)
        yield Slot(number=number)
    if end < len(text):
        yield text[end:]


# ── boxes in texts (ms-swift) ───────────────────────────────────────────────────────────────────────────────


BOX_FIELDS = ("bbox", "bboxes", "boxes", "box")
"""Where a struct has its boxes."""


def boxes_of(value: Any) -> list[Any]:
    """The boxes of a cell: those of ms-swift's `objects`, one box, or a list of boxes.

    >>> boxes_of({"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}), boxes_of([1, 2, 3, 4]), boxes_of(None)
    ([[1, 2, 3, 4]], [[1, 2, 3, 4]], [])
    """
    if isinstance(value, str):
        value = parsed(value)
    if isinstance(value, Mapping):
        value = next(
            (value[name] for name in ("bbox", "bboxes", "boxes", "box") if not is_missing(value.get(name))), None
        )
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return [box for item in value for box in boxes_of(item)]
    if is_missing(value) or isinstance(value, str):
        return []
    items = as_list(value)
    return [items] if all(isinstance(item, int | float) for item in items) else items


def with_boxes(turns: Sequence[Turn], value: Any, column: str) -> list[Turn]:
    """Turns in which `<bbox>` and `<ref-object>` are replaced by the boxes and names of a cell, in order. Raises
    `Unusable` where their numbers differ."""
    markers = [found[0] for turn in turns for found in _BOX_MARKER.finditer(turn.text)]
    if not markers:
        return list(turns)
    refs = as_list(value.get("ref")) if isinstance(value, Mapping) else []
    texts = {"<bbox>": [_box_text(box) for box in boxes_of(value)], "<ref-object>": [as_text(ref) for ref in refs]}
    for marker, found in texts.items():
        if markers.count(marker) not in (0, len(found)):
            raise Unusable(
                f"the texts have {markers.count(marker)} times {marker}, but the column {column} has {len(found)} of "
                "them, so it is not clear which stands where: correct the row"
            )
    remaining = {marker: iter(found) for marker, found in texts.items()}

    def filled(turn: Turn) -> Turn:
        pieces = tuple(
            _BOX_MARKER.sub(lambda found: next(remaining[found[0]]), piece) if isinstance(piece, str) else piece
            for piece in turn.pieces
        )
        return dataclasses.replace(turn, pieces=pieces)

    return [filled(turn) for turn in turns]


def _box_text(box: Any) -> str:
    """
    >>> _box_text([90.9, 160.8, 135.0, 212])
    '[90.9, 160.8, 135, 212]'
    """
    return f"[{', '.join(number_text(number) for number in as_list(box))}]"


# ── images in their places ──────────────────────────────────────────────────────────────────────────────────


Placed: TypeAlias = tuple[Role, tuple[str | Pixels, ...]]
"""Role, and texts and pixels in order."""


def check_markers(turns: Sequence[Turn], images: int) -> None:
    """Raise `Unusable` unless `images` images of the columns fit into the slots of the turns."""
    slots = [piece for turn in turns for piece in turn.pieces if isinstance(piece, Slot)]
    empty = [slot for slot in slots if slot.cell is None]
    numbers = [slot.number for slot in empty if slot.number is not None]
    if not empty:
        if slots and images:
            raise Unusable(
                f"the messages hold {len(slots)} images themselves, and the columns of images {images} more without a "
                "place: remove one of them, or set task.columns.images=[]"
            )
        return
    if numbers and len(numbers) == len(empty):
        if max(numbers) >= images:
            raise Unusable(
                f"the text names image {max(numbers) + 1}, but the row has {images}, so it is not clear what it shows: "
                "correct the row"
            )
    elif len(empty) != images:
        raise Unusable(
            f"the prompt has {_count(len(empty), 'place')} for images (<image>) and the row {_count(images, 'image')}, "
            "so it is not clear which stands where: correct the row"
        )


def _count(number: int, noun: str) -> str:
    """
    >>> _count(1, "image"), _count(2, "image")
    ('1 image', '2 images')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def place_images(turns: Sequence[Turn], images: Sequence[Pixels], own: Sequence[Pixels]) -> list[Placed]:
    """The turns with pixels: `own` in the slots that hold an image themselves, `images` in the others, each list in
    order. Images without a slot come first in the first user message. `check_markers` has held."""
    inline, rest = iter(own), list(range(len(images)))
    numbers = {piece.number for turn in turns for piece in turn.pieces if isinstance(piece, Slot)} - {None}
    unnumbered = iter([index for index in rest if index not in numbers])
    has_places = any(isinstance(piece, Slot) and piece.cell is None for turn in turns for piece in turn.pieces)
    taken: set[int] = set()

    def pixels_of(slot: Slot) -> Pixels:
        if slot.cell is not None:
            return next(inline)
        index = slot.number if slot.number is not None else next(unnumbered)
        taken.add(index)
        return images[index]

    placed = [
        (
            turn.role,
            tuple(pixels_of(piece) if isinstance(piece, Slot) else piece for piece in turn.pieces if piece != ""),
        )
        for turn in turns
    ]
    first = [images[index] for index in rest if index not in taken] if numbers or not has_places else []
    at = next((number for number, (role, _) in enumerate(placed) if role == "user"), 0)
    return [(role, (*first, *pieces) if number == at else pieces) for number, (role, pieces) in enumerate(placed)]
