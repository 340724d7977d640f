"""vLLM's items of images, inside the server: decoded from the renderer's tensors, or made from pictures and compared.

`image_fields.py` says which images arrive in which form. Uses public names of vLLM only: its processor of the served
model, of which it makes one of its own, because the server's has a cache that belongs to the server's own requests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
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
            item, place = _item_of(self._processor, picture.pixels)
        check_same({name: _digest(element.data) for name, element in item.items()}, picture.tensors)
        length, gaps = place
        features = length - sum(count for _, count in gaps)
        if features != picture.num_tokens:
            raise ValueError(f"vLLM writes {features} image tokens for it, the renderer {picture.num_tokens}")
        self._layouts.put(hash, place, 1)
        return item

    def check_layouts(self, images: Iterable[Any]) -> None:
        """Raise `ValueError` where an image tokens' places are not those that vLLM's processor has for its picture;
        `images` as in `frames.request_header`. The engine would put features at the wrong tokens."""
        for hash, _, length, gaps in images:
            known = self._layouts.get(hash)
            if known is not None and known != (length, tuple(map(tuple, gaps))):
                raise ValueError(
                    f"image {hash} has {length} tokens with the gaps {gaps}; vLLM's processor writes {known[0]} tokens "
                    f"with the gaps {[list(gap) for gap in known[1]]}"
                )


def _processor_of(model_config: Any) -> Any:
    """vLLM's processor of the served model, with the image processor that the renderer has: transformers' versions of
    it, for PIL and for torchvision, resize with other rounding."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    processor.info.get_hf_processor().image_processor = load_image_processor(Path(model_config.model))
    return processor


def _item_of(processor: Any, pixels: np.ndarray) -> tuple[Any, tuple[int, Gaps]]:
    """vLLM's item of a picture alone (uint8 [H, W, 3]), and the layout of its image tokens."""
    from PIL import Image

    text = processor.dummy_inputs.get_dummy_text({"image": 1})
    made = processor(text, processor.info.parse_mm_data({"image": [Image.fromarray(pixels)]}))
    place = made["mm_placeholders"]["image"][0]
    marks = [True] * place.length if place.is_embed is None else place.is_embed.tolist()
    return made["mm_kwargs"]["image"][0], layout(marks)


def reported_fields(model_config: Any) -> dict[str, Any] | None:
    """What the items of the served model consist of, for `image_fields.ImageFields.of`; None for a text model."""
    if model_config.multimodal_config is None or model_config.multimodal_config.get_limit_per_prompt("image") == 0:
        return None
    rows = np.arange(PROBE_SIZE[0] * PROBE_SIZE[1] * 3) % 251
    item, (_, gaps) = _item_of(_processor_of(model_config), rows.astype(np.uint8).reshape(*PROBE_SIZE, 3))
    fields = [[name, _kind(element), element.field.keep_on_cpu, _dims(element.data)] for name, element in item.items()]
    return {"fields": fields, "has_gaps": bool(gaps)}


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
