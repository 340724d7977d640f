"""The policy as trainer and embedded engine use it: `forward(token_ids, position_ids, mm_token_type_ids, **mm_kwargs)`.

Nothing here knows a model family: images go in by the forward names that the renderer gave them (`mm_kwargs`), the
model's own `get_image_features` encodes them, and its own layers run with our attention plugged in. Images are
encoded apart from the tokens, so each distinct image of a pass is encoded once and its features are placed wherever
it is shown; the gradient is the sum over those places.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from vlmrl.errors import ModelError
from vlmrl.models.positions import PositionFunction
from vlmrl.models.tree_attention import ATTENTION_NAME, KVPool, TreePlan, tree_attention_forward
from vlmrl.types import ImageItem

AttentionInterface.register(ATTENTION_NAME, tree_attention_forward)


@dataclass(frozen=True, eq=False)
class _ImageOutputs:
    """What a model's forward takes in place of pixels (`mm_encoder_outputs`); it reads these two attributes."""

    pooler_output: tuple[Tensor]
    deepstack_features: list[tuple[Tensor]]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The distinct images of a pass, encoded. F is the sum of their `num_tokens`."""

    levels: list[Tensor]
    """float [F, hidden] each: the features put in place of the placeholders, then the deepstack levels if any."""
    first: dict[str, int]
    """Image hash → index of its first feature."""


def _arguments(module: Any) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


class Policy:
    """A Hugging Face model with tree attention. Weights are the model's own; the policy holds no state but them."""

    def __init__(self, model: Any, positions: PositionFunction, banned_token_ids: Sequence[int]) -> None:
        self.model = model
        self.positions = positions
        self.config = model.config
        text = self.config.get_text_config()
        if getattr(text, "sliding_window", None) or getattr(text, "attn_logit_softcapping", None):
            raise ModelError(
                f"model {self.config.model_type!r} uses sliding windows or soft-capped attention, which tree attention "
                "leaves out: choose a model with plain softmax attention"
            )
        if "get_image_features" in dir(model.base_model) and "mm_encoder_outputs" not in _arguments(model.base_model):
            # Without this check the features would be swallowed by **kwargs and the policy would be blind.
            raise ModelError(
                f"{type(model.base_model).__name__}.forward takes no mm_encoder_outputs, so images could not be "
                "placed: install transformers 5.19"
            )
        # Rows without images of their own may still stand behind images: with MRoPE they need all four positions.
        self._mrope = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
        # The vision tower keeps torch's own attention; set by name on the text config alone.
        text._attn_implementation = ATTENTION_NAME
        self._banned = torch.tensor(sorted(banned_token_ids), dtype=torch.int64, device=self.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def fused_attention(self) -> bool:
        """Whether the trainer's passes are planned for FlexAttention (see tree_attention)."""
        first = next(self.model.parameters())
        return first.is_cuda and first.dtype in (torch.bfloat16, torch.float16)

    def encode_images(self, images: Sequence[ImageItem]) -> ImageFeatures | None:
        """Run the vision tower once over `images`, which are distinct. None for none."""
        if not images:
            return None
        mm_kwargs = {
            name: torch.from_numpy(np.concatenate([image.mm_kwargs[name] for image in images])).to(self.device)
            for name in images[0].mm_kwargs
        }
        out = self.model.base_model.get_image_features(**mm_kwargs, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        features = [level if isinstance(level, Tensor) else torch.cat(list(level)) for level in levels]
        first, total = {}, 0
        for image in images:
            first[image.hash] = total
            total += image.num_tokens
        assert features[0].shape[0] == total, f"{features[0].shape[0]} image features for {total} placeholder tokens"
        return ImageFeatures(features, first)

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
        arguments: dict[str, Any] = {"position_ids": position_ids[:, None, :] if self._mrope else position_ids[:1]}
        if features is not None:
            arguments["mm_token_type_ids"] = mm_token_type_ids[None]
            if len(feature_rows):
                placed = [level.index_select(0, feature_rows) for level in features.levels]
                arguments["mm_encoder_outputs"] = {
                    "image": _ImageOutputs(pooler_output=(placed[0],), deepstack_features=[(p,) for p in placed[1:]])
                }
        out = self.model.base_model(input_ids=token_ids[None], use_cache=False, tree_plan=plan, **arguments)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """float32 [n, vocabulary] of the distribution that is sampled from and learned: banned tokens −inf, then
        divided by the temperature, then log-softmax. `temperature=0` gives the plain distribution (greedy reads its
        maximum)."""
        head = self.model.get_output_embeddings()
        # In float32 whatever the weights are and whatever is cast around us: a rounded logit moves every probability.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), head.bias)
        if len(self._banned):
            logits = logits.index_fill(1, self._banned, float("-inf"))
        return torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)

    def kv_pool(self, slots: int) -> KVPool:
        """An empty pool of keys and values for the embedded engine."""
        text = self.config.get_text_config()
        shape = (text.num_key_value_heads, slots, text.head_dim)
        dtype = next(self.model.parameters()).dtype

        def layer_tensors() -> list[Tensor]:
            return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(text.num_hidden_layers)]

        return KVPool(layer_tensors(), layer_tensors())
