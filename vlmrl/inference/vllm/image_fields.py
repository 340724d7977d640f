"""How an image gets to a server: as the renderer's tensors, or as its picture with the digests of these tensors.

vLLM's own processor of a model makes an item from a picture: tensors by name, each with its kind of field. The server
reports what that item consists of (`in_server/worker.py`), so no table of families is needed here. A video always goes
as tensors.

    all tensors of the item are the renderer's, by name and shape,    ─▶ wire.encode_item: the tensors themselves
    and the image tokens of one image follow each other                  (Qwen-VL, GLM-V, LLaVA)
    otherwise: counts of tiles, other names, no batch dimension,      ─▶ `picture_document`: the pixels; the server
    rows or tiles of image tokens with other tokens between them         makes the item and compares digests, which
    (InternVL, Idefics 3, Mistral 3, Gemma)                              takes 1 to 3 ms (`in_server/items.py`)

Either way the engine computes with the renderer's bytes. No I/O, no import of vLLM.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import orjson

from vlmrl.types import ImageItem, MMItem

MARK = b"\xc1picture"
"""Begins a picture's document. No msgpack document begins with 0xc1, so it is not one of `wire.encode_item`."""

_LENGTH = struct.Struct("<I")

Gaps: TypeAlias = tuple[tuple[int, int], ...]
"""As `vlmrl.types.Placeholder.gaps`."""


@dataclass(frozen=True)
class ImageField:
    """One tensor of vLLM's item for an image or a video."""

    name: str
    kind: str
    """`batched`: the tensor lacks the batch dimension, and vLLM stacks the tensors of images. `flat`: its rows are not
    images, and vLLM concatenates them. `other`: anything else."""
    keep_on_cpu: bool
    """Whether vLLM reads the tensor on the host: sizes and seconds, not pixels."""
    dims: int
    """Number of the tensor's dimensions."""

    def holds(self, array: np.ndarray | None) -> bool:
        """Whether the renderer's `array` of this name is the tensor, but for the batch dimension of a batched one."""
        if array is None:
            return False
        if self.kind == "batched":
            return array.shape[0] == 1 and array.ndim == self.dims + 1
        return self.kind == "flat" and array.ndim == self.dims


@dataclass(frozen=True)
class ImageFields:
    """What vLLM's processor makes of an image or of a video of the served model."""

    fields: tuple[ImageField, ...]
    has_gaps: bool
    """Whether other tokens stand between the image (video) tokens of one item."""
    has_lead: bool = False
    """Whether vLLM's place of an item begins before its first image (video) token: Qwen3-VL's model looks for the token
    that begins each frame of a video from there on."""

    @staticmethod
    def of(reported: Mapping[str, Any]) -> ImageFields:
        """From the answer of `vlmrl_settings`.

        >>> ImageFields.of({"fields": [["pixel_values", "flat", False, 2]], "has_gaps": False}).fields[0].kind
        'flat'
        """
        fields = tuple(ImageField(*field) for field in reported["fields"])
        return ImageFields(fields, reported["has_gaps"], reported.get("has_lead", False))

    def are_tensors_of(self, image: MMItem) -> bool:
        """Whether the renderer's tensors of `image`, which may be a video, are all that the item consists of. Integers
        of the renderer may be left over, because vLLM's model takes no others; floats may not. Other tokens between
        those of an image mean that vLLM makes it from tiles or rows; between those of a video there are times."""
        names = {field.name for field in self.fields}
        floats = {name for name, array in image.mm_kwargs.items() if array.dtype.kind == "f"}
        return (
            (image.modality == "video" or not self.has_gaps)
            and floats <= names
            and all(field.holds(image.mm_kwargs.get(field.name)) for field in self.fields)
        )


# ── digests ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TensorDigest:
    """Content of a tensor: equal for the same numbers in the same shape, but for leading dimensions of 1."""

    is_float: bool
    shape: tuple[int, ...]
    sha256: str

    @staticmethod
    def of(array: np.ndarray, *, is_float: bool) -> TensorDigest:
        """`is_float`: `array` holds floats, or their bits (bfloat16 as uint16). Other arrays are compared as int64.

        >>> sizes = np.array([[84, 140]])
        >>> TensorDigest.of(sizes, is_float=False) == TensorDigest.of(sizes[0].astype(np.int32), is_float=False)
        True
        """
        if not is_float:
            array = array.astype(np.int64)
        shape = array.shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        return TensorDigest(is_float, shape, hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest())


def check_same(made: Mapping[str, TensorDigest], sent: Mapping[str, TensorDigest]) -> None:
    """Raise `ValueError` unless the tensors that vLLM's processor `made` are those that the renderer `sent`.

    A tensor may have another name, if its content is the same. vLLM may add a single integer (a count of tiles, the id
    of the image token), and may leave out integers that its model does not take.

    >>> pixels, count = TensorDigest(True, (2, 3), "ab"), TensorDigest(False, (), "cd")
    >>> check_same({"pixel_values": pixels, "num_patches": count}, {"pixel_values": pixels})
    >>> check_same({"pixel_values": TensorDigest(True, (2, 3), "ff")}, {"pixel_values": pixels})
    Traceback (most recent call last):
    ...
    ValueError: pixel_values of vLLM's processor has other values than the renderer's
    """
    for name, tensor in made.items():
        if name in sent and sent[name] != tensor:
            what = "values" if sent[name].shape == tensor.shape else f"dimensions ({tensor.shape}, {sent[name].shape})"
            raise ValueError(f"{name} of vLLM's processor has other {what} than the renderer's")
        if tensor not in sent.values() and (tensor.is_float or math.prod(tensor.shape) > 1):
            raise ValueError(f"{name} of vLLM's processor, {tensor.shape}, equals no tensor of the renderer")
    lost = [name for name, tensor in sent.items() if tensor.is_float and tensor not in made.values()]
    if lost:
        raise ValueError(f"vLLM's processor makes no tensor that equals {', '.join(lost)} of the renderer")


# ── the picture ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture's document, as the server reads it."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    num_tokens: int
    """Number of image tokens that the renderer writes for it."""
    tensors: Mapping[str, TensorDigest]
    """The renderer's tensors, by name."""
    sizes: Mapping[str, Any]
    """As for `picture_document`."""


def picture_document(
    image: ImageItem, tensors: Mapping[str, TensorDigest], sizes: Mapping[str, Any] = MappingProxyType({})
) -> bytes:
    """The document of an image whose item the server makes itself. `tensors`: digests of its `mm_kwargs`, with floats
    in the engine's dtype. `sizes`: what the run sets of the image processor (`image_size.size_settings`).

    >>> image = ImageItem("ab", np.full((1, 2, 3), 7, np.uint8), {}, 4)
    >>> picture = unpack_picture(picture_document(image, {"x": TensorDigest(True, (2,), "cd")}))
    >>> picture.pixels.tolist(), picture.num_tokens, picture.tensors["x"].shape
    ([[[7, 7, 7], [7, 7, 7]]], 4, (2,))
    """
    header = orjson.dumps(
        {
            "size": image.pixels.shape[:2],
            "num_tokens": image.num_tokens,
            "sizes": dict(sizes),
            "tensors": {name: [tensor.is_float, tensor.shape, tensor.sha256] for name, tensor in tensors.items()},
        }
    )
    return b"".join((MARK, _LENGTH.pack(len(header)), header, np.ascontiguousarray(image.pixels).data))


def is_picture(document: memoryview) -> bool:
    """Whether a document is one of `picture_document`."""
    return bytes(document[: len(MARK)]) == MARK


def unpack_picture(document: memoryview | bytes) -> Picture:
    """Read the output of `picture_document`."""
    document = memoryview(document)
    start = len(MARK) + _LENGTH.size
    (length,) = _LENGTH.unpack_from(document, len(MARK))
    header = orjson.loads(document[start : start + length])
    height, width = header["size"]
    pixels = np.frombuffer(document[start + length :], np.uint8).reshape(height, width, 3)
    tensors = {name: TensorDigest(kind, tuple(shape), sha) for name, (kind, shape, sha) in header["tensors"].items()}
    return Picture(pixels, header["num_tokens"], tensors, header["sizes"])


# ── the layout of an image's tokens ─────────────────────────────────────────────────────────────────────────


def layout(is_image: Iterable[bool]) -> tuple[int, Gaps]:
    """The marks of image tokens in the text of one image → number of tokens from the first image token to the last,
    and the gaps between them.

    >>> layout([False, True, True, False, True, False])
    (4, ((2, 1),))
    """
    at = np.flatnonzero(np.fromiter(is_image, np.bool_))
    steps = np.diff(at)
    gaps = tuple((int(at[i] - at[0]) + 1, int(steps[i]) - 1) for i in np.flatnonzero(steps > 1))
    return (int(at[-1] - at[0]) + 1 if len(at) else 0), gaps
