"""vLLM's items of images, inside the server: decoded from the renderer's tensors, or made from pictures and compared.

`image_fields.py` says which images arrive in which form. Uses public names of vLLM only: its processor of the served
model, of which it makes one of its own, because the server's has a cache that belongs to the server's own requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import VLMConfig
from vlmrl.inference.vllm.image_fields import (
    Gaps,
    Picture,
    TensorDigest,
    check_same,
    is_picture,
    layout,
    unpack_picture,
)
from vlmrl.models.checkpoints.load import load_image_processor

REMEMBERED_LAYOUTS = 2**16
"""For how many pictures the server remembers where their image tokens are."""

PROBE_SIZE = (96, 160)
"""(height, width) of the picture that shows what items consist of: large enough for two rows of image tokens."""


class ItemMaker:
    """Makes the items of a server's images. `make` runs in a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a tokenizer is not to be used by two threads at a time
        self._processor: Any = None
        self._image_processors: dict[str, Any] = {}
        """The renderer's image processor for each set of sizes, as JSON."""
        self._layouts: ByteLRU[str, tuple[int, Gaps]] = ByteLRU(REMEMBERED_LAYOUTS)

    def make(self, documents: Mapping[str, memoryview], model_config: Any) -> dict[str, Any]:
        """Hash → vLLM's item, or the `ValueError` that says why there is none. `model_config` is vLLM's."""
        from vllm.multimodal.inputs import MultiModalKwargsItem
        from vllm.v1.serial_utils import MsgpackDecoder

        decoder = MsgpackDecoder(t=MultiModalKwargsItem)
        made: dict[str, Any] = {}
        for hash, document in documents.items():
            if not is_picture(document):
                made[hash] = decoder.decode(document)
                continue
            try:
                made[hash] = self._from_picture(hash, unpack_picture(document), model_config)
            except ValueError as error:
                made[hash] = ValueError(f"image {hash}: {error}")
        return made

    def _from_picture(self, hash: str, picture: Picture, model_config: Any) -> Any:
        with self._lock:
            if self._processor is None:
                self._processor = _processor_of(model_config)
            sizes = json.dumps(picture.sizes, sort_keys=True)
            if sizes not in self._image_processors:
                self._image_processors[sizes] = _image_processor(model_config, picture.sizes)
            # Set each time, because transformers' processor inside vLLM's is shared.
            self._processor.info.get_hf_processor().image_processor = self._image_processors[sizes]
            item, place = _item_of(self._processor, picture.pixels)
        check_same({name: _digest(element.data) for name, element in item.items()}, picture.tensors)
        length, gaps = place
        features = length - sum(count for _, count in gaps)
        if features != picture.num_tokens:
            raise ValueError(f"vLLM writes {features} image tokens for it, the renderer {picture.num_tokens}")
        self._layouts.put(hash, place, 1)
        return item

    def check_layouts(self, items: Iterable[Any]) -> None:
        """Raise `ValueError` where an image tokens' places are not those that vLLM's processor has for its picture;
        `items` as in `frames.request_header`. The engine would put features at the wrong tokens."""
        for hash, _, length, gaps, *_ in items:
            known = self._layouts.get(hash)
            if known is not None and known != (length, tuple(map(tuple, gaps))):
                raise ValueError(
                    f"image {hash} has {length} tokens with the gaps {gaps}; vLLM's processor writes {known[0]} tokens "
                    f"with the gaps {[list(gap) for gap in known[1]]}"
                )


class ServedImages:
    """What the server's own processor makes of pictures. A worker has one; it does not change the processor."""

    def __init__(self, model_config: Any) -> None:
        """`model_config` is vLLM's, of a model that takes images."""
        from vllm.multimodal import MULTIMODAL_REGISTRY

        self._processor = MULTIMODAL_REGISTRY.create_processor(model_config)
        rows = np.arange(PROBE_SIZE[0] * PROBE_SIZE[1] * 3) % 251
        item, (_, gaps) = _item_of(self._processor, rows.astype(np.uint8).reshape(*PROBE_SIZE, 3))
        fields = [[name, _kind(part), part.field.keep_on_cpu, _dims(part.data)] for name, part in item.items()]
        self.reported: dict[str, Any] = {"fields": fields, "has_gaps": bool(gaps)}
        """What items consist of, for `image_fields.ImageFields.of`."""

    def video_fields(self) -> dict[str, Any]:
        """What items of videos consist of, for `image_fields.ImageFields.of`. Lists of times are left out: vLLM's model
        reads them only where it prunes videos. Raises what vLLM raises for a model without videos."""
        frames = (np.arange(4 * PROBE_SIZE[0] * PROBE_SIZE[1] * 3) % 251).astype(np.uint8).reshape(4, *PROBE_SIZE, 3)
        times = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
        metadata = {**times, "video_backend": "opencv", "do_sample_frames": False}
        text = self._processor.dummy_inputs.get_dummy_text({"video": 1})
        made = self._processor(text, self._processor.info.parse_mm_data({"video": [(frames, metadata)]}))
        marks = _marks(made["mm_placeholders"]["video"][0])
        item = made["mm_kwargs"]["video"][0]
        fields = [[name, _kind(part), part.field.keep_on_cpu, _dims(part.data)] for name, part in item.items()]
        return {
            "fields": [field for field in fields if field[3] >= 0],
            "has_gaps": bool(layout(marks)[1]),
            "has_lead": not marks[0],
        }

    def compare(self, document: bytes) -> dict[str, Any]:
        """Make an image from a picture, as vLLM's own endpoint would, and compare it with the renderer's → what is
        written for it, for `content_parts.Written.of`. Raises `ValueError` where it differs."""
        picture = unpack_picture(document)
        info = self._processor.info
        text = self._processor.dummy_inputs.get_dummy_text({"image": 1})
        around = info.get_tokenizer().encode(text, add_special_tokens=False)
        made = self._processor(around, info.parse_mm_data({"image": [_pil(picture.pixels)]}))
        tensors = {name: _digest(part.data) for name, part in made["mm_kwargs"]["image"][0].items()}
        check_same(tensors, picture.tensors)
        place, ids = made["mm_placeholders"]["image"][0], list(made["prompt_token_ids"])
        written = ids[place.offset : place.offset + place.length]
        behind = ids[place.offset + place.length :]
        placeholder = around[place.offset : len(around) - len(behind)]
        if ids[: place.offset] + placeholder + behind != around or not placeholder:
            raise ValueError("vLLM's processor finds no token of its own that stands for it")
        marks = _marks(place)
        length, gaps = layout(marks)
        features = length - sum(count for _, count in gaps)
        if features != picture.num_tokens:
            raise ValueError(f"vLLM writes {features} image tokens for it, the renderer {picture.num_tokens}")
        first = marks.index(True)
        after = written[first + length :]
        return {"placeholder": placeholder, "before": written[:first], "after": after, "length": length, "gaps": gaps}


def takes_images(model_config: Any) -> bool:
    """Whether the served model takes images, and the server's limits allow one; `model_config` is vLLM's."""
    multimodal = model_config.multimodal_config
    return multimodal is not None and multimodal.get_limit_per_prompt("image") != 0


def _processor_of(model_config: Any) -> Any:
    """vLLM's processor of the served model."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(model_config)


def _image_processor(model_config: Any, sizes: Mapping[str, Any]) -> Any:
    """The image processor that the renderer has: its sizes of images, and transformers' version of it for PIL, because
    the one for torchvision resizes with other rounding."""
    vlm = VLMConfig(family="", renderers=[], positions="", image_token="", **sizes)
    return load_image_processor(Path(model_config.model), vlm)


def _item_of(processor: Any, pixels: np.ndarray) -> tuple[Any, tuple[int, Gaps]]:
    """vLLM's item of a picture alone (uint8 [H, W, 3]), and the layout of its image tokens."""
    text = processor.dummy_inputs.get_dummy_text({"image": 1})
    made = processor(text, processor.info.parse_mm_data({"image": [_pil(pixels)]}))
    return made["mm_kwargs"]["image"][0], layout(_marks(made["mm_placeholders"]["image"][0]))


def _pil(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _marks(place: Any) -> list[bool]:
    """Which tokens of vLLM's place of an image are image tokens."""
    return [True] * place.length if place.is_embed is None else list(place.is_embed.tolist())


def _kind(element: Any) -> str:
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFlatField

    if isinstance(element.field, MultiModalBatchedField):
        return "batched"
    return "flat" if isinstance(element.field, MultiModalFlatField) and element.field.dim == 0 else "other"


def _dims(data: Any) -> int:
    return int(data.ndim) if hasattr(data, "ndim") else -1


def _digest(data: Any) -> TensorDigest:
    """Digest of a tensor, or of a plain number that vLLM keeps as it is."""
    import torch

    if not isinstance(data, torch.Tensor | int):
        raise ValueError(f"vLLM's processor makes a {type(data).__name__} of it, and only tensors can be compared")
    tensor = torch.as_tensor(data)
    if not tensor.is_floating_point():
        return TensorDigest.of(tensor.numpy(), is_float=False)
    bits = tensor.contiguous().view(torch.int16) if tensor.element_size() == 2 else tensor
    return TensorDigest.of(bits.numpy(), is_float=True)
