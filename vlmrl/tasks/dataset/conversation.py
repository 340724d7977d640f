"""From a row to the turns of a conversation, with a place for every image and video.

    prompt text, or list of messages ──▶ turns of text and slots ──template──▶ … ──place_media──▶ turns with pixels

A **slot** is where an image or a video stands. Lists of parts (`{"type": "image"}`, `image_url`, `video`) give slots;
otherwise the markers `<image>` and `<video>` in the texts do. Slots without an image (video) of their own take those of
the image (video) columns, in order. Without any slot for images they come first in the first user message, and then the
videos, if these have none. Any other number is `Unusable`.

Text that spells a control token of a model stays text: the renderer sees to it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmrl.tasks.dataset.columns import Unusable, as_json, as_list, as_text, is_missing, number_text, parsed, short
from vlmrl.types import Modality

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function", "ipython"), "tool"),
}
"""What data sets call a role → ours."""

MARKERS: dict[Modality, str] = {"image": "<image>", "video": "<video>"}
"""Mark where an image and a video stand."""

_MARKER = re.compile(r"<(?P<modality>image|video)(?:[ _-]?(?P<number>\d{1,3}))?>")
_BOX_MARKER = re.compile(r"<bbox>|<ref-object>")


@dataclass(frozen=True)
class Slot:
    """A place of an image or a video."""

    cell: Any = None
    """The image or video, where the message holds it itself; None: it comes from the columns."""
    number: int | None = None
    """Which image or video of the columns, from 0; None: the next one."""
    modality: Modality = "image"


Piece: TypeAlias = str | Slot


@dataclass(frozen=True)
class Turn:
    """One message before its images and videos are placed."""

    role: Role
    pieces: tuple[Piece, ...]
    value: Any = None
    """What an assistant turn is, where it is no text: a list of numbers, for example."""

    @property
    def text(self) -> str:
        """The text, with a marker for each slot."""
        return "".join(piece if isinstance(piece, str) else MARKERS[piece.modality] for piece in self.pieces)


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
    if kind.startswith(("audio", "input_audio")):
        raise Unusable(f"the column {column} has a part of type {kind}, and only text, images and videos are read")
    if kind in ("video", "video_url", "input_video") or "video_url" in filled or "video" in filled:
        return _video_slot(filled)
    if kind in ("image", "image_url", "input_image") or "image_url" in filled or "image" in filled:
        number = filled.pop("image") if isinstance(filled.get("image"), int) else filled.get("index")
        cell = {name: value for name, value in filled.items() if name not in ("type", "index", "text", "detail")}
        source = cell.get("source")
        if isinstance(source, Mapping):  # Anthropic's {"type": "base64", "data": …}
            cell = {name: value for name, value in source.items() if name in ("data", "url")}
        return Slot(_image_cell(cell), int(number) if isinstance(number, int) and not cell else None)
    raise Unusable(f"the column {column} has the part {short(part)}, whose type is not known")


def _video_slot(filled: Mapping[str, Any]) -> Slot:
    """`{"type": "video", "video": …, "fps": …}`, `{"type": "video_url", "video_url": {"url": …}}`, or `{"type":
    "video"}`, whose video is in a column."""
    number = filled.get("index")
    cell = {name: value for name, value in filled.items() if name not in ("type", "index", "text", "detail")}
    if not any(not is_missing(value) for value in cell.values()):
        return Slot(None, int(number) if isinstance(number, int) else None, "video")
    return Slot(cell, None, "video")


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
    shown: set[tuple[str, int]] = set()
    return [
        turn if turn.role == "assistant" else dataclasses.replace(turn, pieces=tuple(_split(turn.text, shown)))
        for turn in turns
    ]


def _split(text: str, shown: set[tuple[str, int]]) -> Iterator[Piece]:
    """A text as texts and slots. `<image 2>` (MMMU) is image number 2, shown where it is named first; `shown` collects
    the numbers."""
    end = 0
    for found in _MARKER.finditer(text):
        modality: Modality = "image" if found["modality"] == "image" else "video"
        number = None if found["number"] is None else int(found["number"]) - 1
        if number is not None and (modality, number) in shown:
            continue
        if found.start() > end:
            yield text[end : found.start()]
        end = found.end()
        if number is not None:
            shown.add((modality, number))
        yield Slot(number=number, modality=modality)
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
