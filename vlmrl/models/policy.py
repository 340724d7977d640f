"""The policy of trainer and embedded engine: `forward(token_ids, position_ids, mm_token_type_ids, **mm_kwargs)`.

Nothing here names a model family. Images and videos are passed under the forward names that the renderer gave them
(`mm_kwargs`), the model's own `get_image_features` and `get_video_features` encode them, and its own layers run with
our attention plugged in. They are encoded separately from the tokens: each distinct item of a pass is encoded once, its
features are placed wherever it is shown, and the gradient is the sum over those places.

No forward or backward pass synchronizes with the GPU: what depends only on sizes is computed on the host, and features
are placed by row numbers. transformers places them by a mask, which must be counted first and leaves the GPU idle a
dozen times per pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from vlmrl.errors import ModelError
from vlmrl.models.attention.fused import (
    VISION_ATTENTION,
    VISION_ATTENTION_BY_IMAGE,
    Kernel,
    fits_flash,
    vision_attention_by_image,
    vision_attention_forward,
)
from vlmrl.models.attention.plan import TreePlan
from vlmrl.models.attention.recurrent import share_states
from vlmrl.models.attention.rules import attention_rules
from vlmrl.models.attention.tree import ATTENTION_NAME, passing, tree_attention_forward
from vlmrl.models.families.positions import PositionFunction
from vlmrl.models.features import FeatureCache, Levels, VisionFeatures, first_features
from vlmrl.models.head import final_logits, float_logits, most_likely, token_and_top_logprobs, token_logprobs
from vlmrl.models.logit_map import logit_map
from vlmrl.models.supports import PackedSupports, support_logprobs
from vlmrl.models.vision_encoder import VisionEncoder
from vlmrl.types import MMItem

AttentionInterface.register(ATTENTION_NAME, tree_attention_forward)
AttentionInterface.register(VISION_ATTENTION, vision_attention_forward)
AttentionInterface.register(VISION_ATTENTION_BY_IMAGE, vision_attention_by_image)


def _arguments(module: Any) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


class _AddFeatures:
    """Replaces a decoder's `_deepstack_process`: adds features at row numbers instead of at a mask."""

    def __init__(self, decoder: Any) -> None:
        self._by_mask: Callable[[Tensor, Tensor, Tensor], Tensor] = decoder._deepstack_process

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        """hidden_states [1, T, hidden], visual_embeds [P, hidden]. The policy passes the P row numbers (int64) as
        `visual_pos_masks`; other callers pass a mask (bool [B, T])."""
        if visual_pos_masks.dtype is torch.bool:
            return self._by_mask(hidden_states, visual_pos_masks, visual_embeds)
        return hidden_states.index_add(1, visual_pos_masks, visual_embeds.to(hidden_states.dtype)[None])


class Policy:
    """A Hugging Face model with tree attention. The weights are the model's own. Apart from them the policy holds only
    features of a frozen vision tower, at most `feature_cache_bytes`."""

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
        # Device and dtype of the computation. A trainer may hold the weights elsewhere and in another dtype.
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype
        self.positions = positions
        self.config = model.config
        text = self.config.get_text_config()
        self.rules = attention_rules(type(model), self.config)
        """Which tokens attend to which, per layer."""
        self._decoder = model.base_model.get_decoder()
        self._layers_learn = any(parameter.requires_grad for parameter in self._decoder.parameters())
        kinds = enumerate(getattr(text, "layer_types", None) or ())
        stateful = {index: kind for index, kind in kinds if self.rules.of_layer(index) is None}
        self.is_recurrent = share_states(self._decoder, text.hidden_size, stateful)
        """Whether some layers carry a state from token to token (attention/recurrent.py)."""
        self.logit_map = logit_map(model)
        is_capped = getattr(text, "attn_logit_softcapping", None) is not None
        self._fits_varlen = fits_flash(self._decoder) and not is_capped and not self.rules.image_runs
        self._takes_layer_inputs = bool(getattr(text, "hidden_size_per_layer_input", 0))
        # Deepstack: levels of features after the first are added to the outputs of the first layers.
        self._takes_levels = "deepstack_visual_embeds" in _arguments(self._decoder)
        if self._takes_levels:
            if not hasattr(self._decoder, "_deepstack_process"):
                raise ModelError(
                    f"{type(self._decoder).__name__} has no _deepstack_process, so the policy could not place the "
                    "features of images: install transformers 5.19"
                )
            if not isinstance(self._decoder._deepstack_process, _AddFeatures):
                self._decoder._deepstack_process = _AddFeatures(self._decoder)
        # With MRoPE, rows without images may still come after images, so they too need all four positions.
        self._mrope = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
        text._attn_implementation = ATTENTION_NAME
        self._vision = VisionEncoder(model)
        self.banned = torch.zeros(len(model.get_output_embeddings().weight), dtype=torch.bool, device=self.device)
        """bool [vocabulary]; True for tokens that have probability 0."""
        self.banned[sorted(banned_token_ids)] = True
        self._cache = FeatureCache(feature_cache_bytes)
        self._encoded, self._reused = 0, 0

    @property
    def tower_learns(self) -> bool:
        """Whether what makes the features of images has trainable parameters."""
        return self._vision.learns

    @property
    def tower_version(self) -> int | None:
        """A number that changes whenever the weights change that make the features of images. None where they are
        trained, or where there are none."""
        return self._vision.version if self._vision.is_there and not self.tower_learns else None

    @property
    def _is_fused(self) -> bool:
        """Whether one kernel computes the attention of a pass (attention/fused.py)."""
        return self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    def kernel(self, *, shared: bool) -> Kernel:
        """The kernel to plan a trainer's pass for. `shared`: whether rows share prefixes."""
        if not self._is_fused:
            return Kernel.blocks
        return Kernel.varlen if self._fits_varlen and not shared else Kernel.flex

    def encode_items(self, items: Sequence[MMItem]) -> VisionFeatures | None:
        """Run the vision tower once over images and videos, which must be distinct. A frozen tower encodes only those
        whose features are not cached. None for no items."""
        if not items:
            return None
        if self._vision.is_there and not self.tower_learns:
            # Cached features are used outside the engine's inference mode, whose tensors no backward pass may touch.
            with torch.inference_mode(False), torch.no_grad():
                features, encoded = self._cache.encode(items, self._vision.version, self._encode)
        else:
            features, encoded = VisionFeatures(self._encode(items), first_features(items)), len(items)
        self._encoded += encoded
        self._reused += len(items) - encoded
        return features

    def take_image_counters(self) -> dict[str, float]:
        """`images/encoded` and `images/cached` since the last call: images and videos that the vision tower encoded,
        and those whose features were cached. `images/cache_bytes`: bytes of the cached features now."""
        counters = {"images/encoded": self._encoded, "images/cached": self._reused, "images/cache_bytes": 0}
        counters["images/cache_bytes"] = self._cache.num_bytes
        self._encoded, self._reused = 0, 0
        return {name: float(value) for name, value in counters.items()}

    def _encode(self, items: Sequence[MMItem]) -> Levels:
        levels = self._vision.encode(items, self.device, fused=self._is_fused)
        if len(levels) > 1 and not self._takes_levels:
            raise ModelError(
                f"{type(self._decoder).__name__}.forward takes no deepstack_visual_embeds, so {len(levels) - 1} of the "
                f"{len(levels)} levels of features that {type(self.model.base_model).__name__} returns could not be "
                "placed: choose a model whose decoder takes them"
            )
        return levels

    def hidden_states(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        mm_token_type_ids: Tensor,
        plan: TreePlan,
        features: VisionFeatures | None,
        feature_rows: Tensor,
    ) -> Tensor:
        """One pass over T rows → float [T, hidden], after the final norm.

        token_ids, mm_token_type_ids int64 [T]; position_ids int64 [4, T]; feature_rows int64 [placeholder rows]: the
        index of the feature that each placeholder row gets, in row order.
        """
        assert plan.rules.distinct == self.rules.distinct, "the pass was planned for another model"
        is_shown = features is not None and len(feature_rows) > 0
        # The id of an image token may lie outside the vocabulary (Gemma 3). Its embedding is replaced below.
        ids = token_ids.masked_fill(mm_token_type_ids != 0, 0) if is_shown else token_ids
        rows = self.model.get_input_embeddings()(ids)
        if self._layers_learn and self.tower_learns and torch.is_grad_enabled() and not rows.requires_grad:
            # Next to a frozen embedding, the first layer has a gradient for its input only where an image is shown.
            # FSDP reduces a layer's gradients when it gets there, and the ranks must reduce in the same order.
            rows.requires_grad_()
        extra: dict[str, Any] = {}
        if self._takes_layer_inputs:
            extra["per_layer_inputs"] = self._layer_inputs(token_ids, mm_token_type_ids != 0)
        if features is not None and is_shown:
            shown = mm_token_type_ids.nonzero_static(size=len(feature_rows))[:, 0]
            first, *others = (level.index_select(0, feature_rows) for level in features.levels)
            rows = rows.index_copy(0, shown, first.to(rows.dtype))
            if others:
                extra |= {"visual_pos_masks": shown, "deepstack_visual_embeds": others}
        with passing(plan):
            out = self._decoder(
                inputs_embeds=rows[None],
                position_ids=position_ids[:, None, :] if self._mrope else position_ids[:1],
                use_cache=False,
                tree_plan=plan,
                **extra,
            )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def _layer_inputs(self, token_ids: Tensor, is_image: Tensor) -> Tensor:
        """Gemma 4's second embedding, float [1, T, layers, size]: every layer gets a vector of its own for each token.
        Image tokens count as padding there."""
        padding = self.config.get_text_config().pad_token_id
        inputs: Tensor = self._decoder.get_per_layer_inputs(token_ids.masked_fill(is_image, padding)[None], None)
        return inputs

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities float32 [n, vocabulary] of the distribution that the engine samples from and the trainer
        learns: the model's own scale and soft cap, banned tokens −inf, then the division by the temperature, then
        log-softmax. `temperature=0` gives the distribution at temperature 1; greedy sampling takes its maximum."""
        logits = final_logits(self.raw_logits(hidden), self.banned, temperature or 1.0, self.logit_map)
        return torch.log_softmax(logits, dim=-1)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The head's own output, float32 [n, vocabulary]; `head.final_logits` makes of it what is sampled from."""
        head = self.model.get_output_embeddings()
        # In float32, for any dtype of the weights and under autocast: a rounded logit moves every probability.
        with torch.autocast(hidden.device.type, enabled=False):
            return float_logits(hidden, head.weight, head.bias)

    def token_logprobs(
        self, hidden: Tensor, entry: Tensor, targets: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logprobs float32 [N] of `targets` under the same distribution and entropies float32 [U], both with gradient
        (head.py). Row `entry` of `hidden` [U, hidden size] predicts each target; each row may have a temperature of its
        own, float32 [U] above 0. Never holds a full row of logits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logprobs(*self._head(hidden, entry, targets, temperature), self.logit_map)

    def token_and_top_logprobs(
        self, hidden: Tensor, entry: Tensor, targets: Tensor, temperature: float | Tensor, top_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `token_logprobs`, and the logprobs of the tokens `top_ids` int64 [U, k] of each row and of all its others
        together, float32 [U, k + 1], with gradient."""
        with torch.autocast(hidden.device.type, enabled=False):
            return token_and_top_logprobs(*self._head(hidden, entry, targets, temperature), self.logit_map, top_ids)

    def most_likely(
        self, hidden: Tensor, entry: Tensor, targets: Tensor, temperature: float | Tensor, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Logprobs of `targets` as those of `token_logprobs`, without gradient. With k > 0 also the k most likely
        tokens of each row, int64 [U, k], and their logprobs and that of all others together, float32 [U, k + 1]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return most_likely(*self._head(hidden, entry, targets, temperature), self.logit_map, k)

    def _head(
        self, hidden: Tensor, entry: Tensor, targets: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, float | Tensor]:
        """What the functions of head.py take first."""
        head = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.detach()
        divisor = temperature if isinstance(temperature, Tensor) else temperature or 1.0
        return hidden, head.weight, bias, self.banned, entry, targets, divisor

    def support_logprobs(
        self,
        hidden: Tensor,
        entry: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
        supports: PackedSupports,
    ) -> tuple[Tensor, Tensor]:
        """As `token_logprobs`, where some of the N tokens were sampled from a truncated distribution: logprobs and
        entropies, float32 [N] each, of the distributions over their supports (supports.py)."""
        _, weight, bias, *_, divisor = self._head(hidden, entry, targets, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, entropies = support_logprobs(hidden, weight, bias, supports, entry, divisor, self.logit_map)
        if supports.whole is None:
            return logprobs, entropies
        rows = entry[supports.whole]
        of_whole, entropy_of_row = self.token_logprobs(hidden, rows, targets[supports.whole], temperature)
        order = torch.cat([supports.truncated, supports.whole]).argsort()
        return torch.cat([logprobs, of_whole])[order], torch.cat([entropies, entropy_of_row[rows]])[order]
