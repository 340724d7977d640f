"""Images and videos → features, by the model's own `get_image_features` and `get_video_features`.

    items, each processed alone  ──▶ groups whose arrays have equal shapes behind dim 0 ──▶ one call per group
                                 ──▶ features in the order of the items, `num_tokens` of each

A processor returns other arrays for each family: patches of all sizes side by side (Qwen-VL), tiles (InternVL,
Idefics 3), one picture of its own size (Pixtral). Arrays that agree behind their first dimension stand side by side in
one call; a family whose pictures differ in size gets a call per size, and no picture is padded to another's size.

Arrays are passed by the names that these methods take. Integers and booleans are geometry, floats are pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmrl.errors import ModelError
from vlmrl.models.attention.fused import VISION_ATTENTION, VISION_ATTENTION_BY_IMAGE
from vlmrl.models.blocks import has_compiled_blocks, uncompiled_in_inference
from vlmrl.models.families.positions import SECONDS
from vlmrl.models.families.vision_geometry import tower_arguments
from vlmrl.models.features import Levels, concatenate_on
from vlmrl.models.patch_products import project_by_products
from vlmrl.types import MMItem, Modality


def image_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters that make the features of images: the vision tower and what leads from it to the language model.
    Everything that is neither in the decoder nor in the head; empty for a text-only model."""
    base = model.base_model
    if not hasattr(base, "get_image_features"):
        return []
    head = model.get_output_embeddings()
    others = {id(p) for module in (base.get_decoder(), head) for p in module.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in others]


def image_tower(model: Any) -> Any:
    """The module that is the vision tower; None where transformers names none."""
    tower = model.get_encoder(modality="image")
    return None if tower is model else tower


def encodes(model: Any, images: Sequence[MMItem]) -> bool:
    """Whether `model` makes as many features of these images as they have image tokens."""
    with torch.inference_mode():
        try:
            VisionEncoder(model).encode(images, model.device, fused=False)
        except Exception:  # noqa: BLE001  code of any family
            return False
    return True


class VisionEncoder:
    """Encodes the images of a vision-language model."""

    def __init__(self, model: Any) -> None:
        """Raises `ModelError` for a model whose decoder looks at images in another way than through features that take
        the place of tokens."""
        self._model = model.base_model
        self._tower: Any = image_tower(model)
        if self._tower is not None:
            project_by_products(self._tower)
        methods: dict[Modality, Any] = {
            "image": getattr(self._model, "get_image_features", None),
            "video": getattr(self._model, "get_video_features", None),
        }
        self._encode = {kind: method for kind, method in methods.items() if method is not None}
        self._takes = {kind: set(inspect.signature(method).parameters) for kind, method in self._encode.items()}
        self._forward_takes = set(inspect.signature(self._model.forward).parameters)
        self.parameters = image_parameters(model)
        self._own_attention = None if self._tower is None else self._tower.config._attn_implementation
        # A tower that takes all images side by side hands their bounds to its attention.
        self._packs = self._tower is not None and "grid_thw" in inspect.signature(self._tower.forward).parameters

    @property
    def is_there(self) -> bool:
        """Whether the model has a vision tower."""
        return self._tower is not None

    @property
    def learns(self) -> bool:
        """Whether some of the parameters that make features are trainable."""
        return any(parameter.requires_grad for parameter in self.parameters)

    @property
    def version(self) -> int:
        """Changes whenever the parameters change: torch counts in-place changes."""
        return sum(parameter._version for parameter in self.parameters)

    def encode(self, items: Sequence[MMItem], device: torch.device, *, fused: bool) -> Levels:
        """float [F, hidden] per level, the features of `items` one after another; F is the sum of their `num_tokens`.

        `fused`: with the attention kernel of fused.py, where the tower can use it. Raises `ModelError` where the model
        makes more or fewer features than the items have tokens.
        """
        if self._tower is not None:
            # Chosen at each call: the doctor computes in another dtype for a while, and flash attention has no float32.
            # Without it the tower keeps torch's own attention, image by image.
            by_image = VISION_ATTENTION_BY_IMAGE if has_compiled_blocks(self._tower) else self._own_attention
            chosen = VISION_ATTENTION if fused else by_image
            self._tower.config._attn_implementation = chosen if self._packs else self._own_attention
        features: dict[int, Sequence[Tensor]] = {}
        for members in alike(items):
            group = [items[i] for i in members]
            if sum(item.num_tokens for item in group) == 1:
                # Mistral 3 drops the first dimension of a single feature, so it is encoded next to itself.
                levels = [level[:1] for level in self._encode_alike(2 * group, device)]
            else:
                levels = self._encode_alike(group, device)
            parts = zip(*(torch.split(level, [items[i].num_tokens for i in members]) for level in levels), strict=True)
            features.update(zip(members, parts, strict=True))
        ordered = [features[i] for i in range(len(items))]
        return [torch.cat(level) if len(level) > 1 else level[0] for level in zip(*ordered, strict=True)]

    def _encode_alike(self, items: Sequence[MMItem], device: torch.device) -> Levels:
        """The features of items of one kind whose arrays can stand side by side."""
        kind = items[0].modality
        geometry: dict[str, Tensor] = {}
        pixels: dict[str, Tensor] = {}
        for name, first in items[0].mm_kwargs.items():
            if name not in self._takes[kind]:
                self._refuse_lost(name)
                continue
            arrays = [item.mm_kwargs[name] for item in items]
            # Geometry stays on the host: reading it back from the device would synchronize.
            if first.dtype.kind == "f":
                pixels[name] = concatenate_on(arrays, device)
            else:
                geometry[name] = torch.from_numpy(np.concatenate(arrays))
        arguments = tower_arguments(self._tower, geometry, device)
        with uncompiled_in_inference():
            out = self._encode[kind](**pixels, **arguments, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        joined = [_joined(level) for level in levels]
        expected = [item.num_tokens for item in items]
        for level, features in zip(levels, joined, strict=True):
            made = [len(features)] if isinstance(level, Tensor) else [part.shape[:-1].numel() for part in level]
            if made != expected and (len(made) == len(expected) or sum(made) != sum(expected)):
                raise ModelError(
                    f"{type(self._model).__name__} makes {made} features of {kind}s that stand for {expected} tokens, "
                    "so the features have no place: the checkpoint's processor and its model do not fit each other; "
                    "use the processor files that belong to the checkpoint"
                )
        return joined

    def _refuse_lost(self, name: str) -> None:
        if name in self._forward_takes and name != SECONDS:  # the positions have the seconds of a video
            raise ModelError(
                f"{type(self._model).__name__} takes {name} beside the features of its images, which the policy would "
                "not hand over, so it would see something else: choose a model whose images become features in place "
                "of tokens"
            )


def alike(items: Sequence[MMItem]) -> list[list[int]]:
    """The indices of items whose arrays have the same names, dtypes and shapes behind dim 0, in order of appearance.

    >>> from vlmrl.types import ImageItem
    >>> def item(*shape): return ImageItem("", np.zeros((1, 1, 3), np.uint8), {"pixel_values": np.zeros(shape)}, 1)
    >>> alike([item(8, 6), item(1, 3, 2), item(4, 6)])
    [[0, 2], [1]]
    """
    groups: dict[tuple[tuple[str, str, tuple[int, ...]], ...], list[int]] = {}
    for index, item in enumerate(items):
        form = tuple((name, array.dtype.str, array.shape[1:]) for name, array in item.mm_kwargs.items())
        groups.setdefault(form, []).append(index)
    return list(groups.values())


def _joined(level: Tensor | Sequence[Tensor]) -> Tensor:
    """Features of any leading dimensions, or a list of them per image → [features, hidden]."""
    parts = [level] if isinstance(level, Tensor) else list(level)
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
