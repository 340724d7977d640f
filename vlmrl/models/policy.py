"""The policy as trainer and embedded engine use it: `forward(token_ids, position_ids, mm_token_type_ids, **mm_kwargs)`.

Nothing here knows a model family: images go in by the forward names that the renderer gave them (`mm_kwargs`), the
model's own `get_image_features` encodes them, and its own layers run with our attention plugged in. Images are
encoded apart from the tokens, so each distinct image of a pass is encoded once and its features are placed wherever
it is shown; the gradient is the sum over those places.

Nothing in a pass waits for a GPU, forward or backward: what depends on sizes alone is computed on the host, and
features are placed by row numbers. A model of transformers places them by a mask, which has to be counted first, and so
lets the GPU run empty a dozen times in a pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from vlmrl.errors import ModelError
from vlmrl.models.attention.fused import VISION_ATTENTION, Kernel, vision_attention_forward
from vlmrl.models.attention.tree import ATTENTION_NAME, KVPool, TreePlan, tree_attention_forward
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.models.families.positions import PositionFunction
from vlmrl.models.families.vision_geometry import tower_arguments
from vlmrl.models.features import FeatureCache, ImageFeatures, Levels, first_features
from vlmrl.models.head import token_logprobs
from vlmrl.models.transfer import side_by_side
from vlmrl.types import ImageItem

AttentionInterface.register(ATTENTION_NAME, tree_attention_forward)
AttentionInterface.register(VISION_ATTENTION, vision_attention_forward)


def _arguments(module: Any) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


class _AddFeatures:
    """Stands in for a decoder's own `_deepstack_process`."""

    def __init__(self, decoder: Any) -> None:
        self._by_mask: Callable[[Tensor, Tensor, Tensor], Tensor] = decoder._deepstack_process

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        """hidden_states [1, T, hidden], visual_embeds [P, hidden]. `visual_pos_masks` are the P rows, int64; if it is
        not the policy that asks, a mask over [B, T]."""
        if visual_pos_masks.dtype is torch.bool:
            return self._by_mask(hidden_states, visual_pos_masks, visual_embeds)
        return hidden_states.index_add(1, visual_pos_masks, visual_embeds.to(hidden_states.dtype)[None])


class Policy:
    """A Hugging Face model with tree attention. Weights are the model's own; beside them the policy holds nothing but
    features of a frozen vision tower, `feature_cache_bytes` at most."""

    def __init__(
        self,
        model: Any,
        positions: PositionFunction,
        banned_token_ids: Sequence[int],
        *,
        feature_cache_bytes: int = 0,
    ) -> None:
        self.model = model
        first = next(model.parameters())
        # Of the computation. A trainer may hold the weights in another place and format.
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype
        self.positions = positions
        self.config = model.config
        text = self.config.get_text_config()
        if getattr(text, "sliding_window", None) or getattr(text, "attn_logit_softcapping", None):
            raise ModelError(
                f"model {self.config.model_type!r} uses sliding windows or soft-capped attention, which tree attention "
                "leaves out: choose a model with plain softmax attention"
            )
        layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if layers - {"linear_attention"}:
            raise ModelError(
                f"model {self.config.model_type!r} has layers of {', '.join(sorted(layers))}, and what a prefix leaves "
                "behind in them is not known: choose a model with softmax attention"
            )
        self.is_recurrent = bool(layers)
        """Some layers carry a state from token to token: samples can neither share a prefix nor stand side by side."""
        self._decoder = model.base_model.get_decoder()
        # With several levels of features, the others are added to the outputs of the first layers.
        self._takes_levels = "deepstack_visual_embeds" in _arguments(self._decoder)
        if self._takes_levels:
            if not hasattr(self._decoder, "_deepstack_process"):
                raise ModelError(
                    f"{type(self._decoder).__name__} has no _deepstack_process, so the features of images could not be "
                    "placed: install transformers 5.19"
                )
            if not isinstance(self._decoder._deepstack_process, _AddFeatures):
                self._decoder._deepstack_process = _AddFeatures(self._decoder)
        # Rows without images of their own may still stand behind images: with MRoPE they need all four positions.
        self._mrope = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
        text._attn_implementation = ATTENTION_NAME
        tower = model.get_encoder(modality="image")
        self._tower = None if tower is model else tower
        if self._tower is not None and self._is_fused:
            # Elsewhere the tower keeps torch's own attention, image by image.
            self._tower.config._attn_implementation = VISION_ATTENTION
        self._banned = torch.zeros(len(model.get_output_embeddings().weight), dtype=torch.bool, device=self.device)
        self._banned[sorted(banned_token_ids)] = True
        self._cache = FeatureCache(feature_cache_bytes)
        self._encoded, self._reused = 0, 0

    @property
    def tower_learns(self) -> bool:
        """Whether there is a vision tower and something of it is trained."""
        return self._tower is not None and any(p.requires_grad for p in self._tower.parameters())

    @property
    def _is_fused(self) -> bool:
        """Whether attention over the rows of a pass is one kernel (fused_attention.py)."""
        return self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    def kernel(self, *, shared: bool) -> Kernel:
        """What a trainer's pass is planned for, whose rows share prefixes or do not."""
        if not self._is_fused:
            return Kernel.blocks
        return Kernel.flex if shared else Kernel.varlen

    def encode_images(self, images: Sequence[ImageItem]) -> ImageFeatures | None:
        """Run the vision tower once over `images`, which are distinct; where it is frozen, over those alone whose
        features are not kept. None for none."""
        if not images:
            return None
        if self._tower is not None and not self.tower_learns:
            # In-place changes are counted by torch: a checkpoint that is loaded is another version.
            version = sum(p._version for p in self._tower.parameters())
            # Features outlive the engine's inference mode, whose tensors no backward pass may touch.
            with torch.inference_mode(False), torch.no_grad():
                features, encoded = self._cache.encode(images, version, self._encode)
        else:
            features, encoded = ImageFeatures(self._encode(images), first_features(images)), len(images)
        self._encoded += encoded
        self._reused += len(images) - encoded
        return features

    def take_image_counters(self) -> dict[str, float]:
        """Since the last call: images that went through the vision tower, images whose features were still there; and
        what those take, in bytes."""
        counters = {"images/encoded": self._encoded, "images/cached": self._reused, "images/cache_bytes": 0}
        counters["images/cache_bytes"] = self._cache.num_bytes
        self._encoded, self._reused = 0, 0
        return {name: float(value) for name, value in counters.items()}

    def _encode(self, images: Sequence[ImageItem]) -> Levels:
        sizes: dict[str, Tensor] = {}
        pixels: dict[str, Tensor] = {}
        for name, first in images[0].mm_kwargs.items():
            arrays = [image.mm_kwargs[name] for image in images]
            # Integers are geometry: to read them back from a device would wait for it.
            if first.dtype.kind in "iu":
                sizes[name] = torch.from_numpy(np.concatenate(arrays))
            else:
                pixels[name] = side_by_side(arrays, self.device)
        arguments = tower_arguments(self._tower, sizes, self.device)
        with uncompiled_in_inference():
            out = self.model.base_model.get_image_features(**pixels, **arguments, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        if len(levels) > 1 and not self._takes_levels:
            raise ModelError(
                f"{type(self._decoder).__name__}.forward takes no deepstack_visual_embeds, so {len(levels) - 1} of the "
                f"{len(levels)} levels of features that {type(self._tower).__name__} gives could not be placed"
            )
        features = [level if isinstance(level, Tensor) else torch.cat(list(level)) for level in levels]
        total = sum(image.num_tokens for image in images)
        assert features[0].shape[0] == total, f"{features[0].shape[0]} image features for {total} placeholder tokens"
        return features

    def hidden_states(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        mm_token_type_ids: Tensor,
        plan: TreePlan,
        features: ImageFeatures | None,
        feature_rows: Tensor,
    ) -> Tensor:
        """One pass over T rows → float [T, hidden], after the final norm.

        token_ids, mm_token_type_ids int64 [T]; position_ids int64 [4, T]; feature_rows int64 [placeholder rows]: the
        feature that each placeholder row takes, in row order.
        """
        rows = self.model.get_input_embeddings()(token_ids)
        levels: dict[str, Any] = {}
        if features is not None and len(feature_rows):
            shown = mm_token_type_ids.nonzero_static(size=len(feature_rows))[:, 0]
            first, *others = (level.index_select(0, feature_rows) for level in features.levels)
            rows = rows.index_copy(0, shown, first.to(rows.dtype))
            if others:
                levels = {"visual_pos_masks": shown, "deepstack_visual_embeds": others}
        with uncompiled_in_inference():
            out = self._decoder(
                inputs_embeds=rows[None],
                position_ids=position_ids[:, None, :] if self._mrope else position_ids[:1],
                use_cache=False,
                tree_plan=plan,
                **levels,
            )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """float32 [n, vocabulary] of the distribution that is sampled from and learned: banned tokens −inf, then
        divided by the temperature, then log-softmax. `temperature=0` gives the plain distribution (greedy reads its
        maximum)."""
        head = self.model.get_output_embeddings()
        # In float32 whatever the weights are and whatever is cast around us: a rounded logit moves every probability.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), head.bias)
        logits = logits.masked_fill(self._banned, float("-inf"))
        return torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)

    def token_logprobs(
        self, hidden: Tensor, entry: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Of the same distribution: float32 [N] logprobs of `targets`, each predicted by row `entry` of `hidden`
        [U, hidden size], with gradient, and float32 [U] entropies (head.py). Holds no row of the vocabulary."""
        head = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logprobs(hidden, head.weight, bias, self._banned, entry, targets, temperature or 1.0)

    def kv_pool(self, slots: int) -> KVPool:
        """An empty pool of keys and values for the embedded engine."""
        text = self.config.get_text_config()
        shape = (text.num_key_value_heads, slots, text.head_dim)
        dtype = next(self.model.parameters()).dtype

        def layer_tensors() -> list[Tensor]:
            return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(text.num_hidden_layers)]

        return KVPool(layer_tensors(), layer_tensors())
