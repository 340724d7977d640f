"""Which earlier tokens a token attends to, per layer. The model's own mask function is asked, so no family is named.

    rule                          row i attends to key j, both counted along their own sequence
    AttentionRule()               j ≤ i
    AttentionRule(window=w)       i − w < j ≤ i
    AttentionRule(…, image_runs)  the same, with the last token of i's run of image tokens in place of j ≤ i

transformers puts a mask together from functions of (query index, key index), one mask per layer type. `attention_rules`
lets it do so for a made-up sequence with two images, reads the rule off a few rows of that mask, and compares all of
these rows with the rule. A mask that no rule describes (chunks, a bidirectional prompt) is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_masks_for_generate

from vlmrl.errors import ModelError
from vlmrl.models.attention.prefix_tree import image_ends

MASK_NAME = "vlmrl_mask_function"
"""Name in transformers' registry of mask implementations: `_keep_function`."""

IMAGE_TOKENS = 6
"""Length of the first image of the made-up sequence. The second one is longer than the window."""

UNWINDOWED_LENGTH = 64
"""Length of the made-up sequence for a model without a window."""


@dataclass(frozen=True)
class AttentionRule:
    """Which keys a row of one layer attends to."""

    window: int | None = None
    """Keys that are this many tokens or more before the row are hidden; None for no limit. 1 shows only the row."""
    image_runs: bool = False
    """Whether a row of an image also attends to the later rows of its image."""


@dataclass(frozen=True)
class AttentionRules:
    """The rules of a model's layers. Different rules have different windows."""

    layers: tuple[AttentionRule | None, ...]
    """The rule of each layer; None for a layer without attention. A single entry holds for all layers."""

    @property
    def distinct(self) -> tuple[AttentionRule, ...]:
        """Each rule once, in the order of its first layer."""
        return tuple(dict.fromkeys(rule for rule in self.layers if rule is not None))

    @property
    def image_runs(self) -> bool:
        """Whether some layer lets the tokens of an image attend to its later tokens."""
        return any(rule.image_runs for rule in self.distinct)

    def of_layer(self, index: int) -> AttentionRule | None:
        """The rule of layer `index`."""
        return self.layers[0] if len(self.layers) == 1 else self.layers[index]


CAUSAL = AttentionRules((AttentionRule(),))
"""Every row of every layer attends to all rows before it."""


@dataclass(frozen=True, eq=False)
class _Mask:
    """A mask as a function. `shows(query, key)` broadcasts two int64 tensors → bool."""

    shows: Callable[[Tensor, Tensor], Tensor]


def _keep_function(mask_function: Callable[..., Tensor], **_: Any) -> _Mask:
    """A mask implementation of transformers that returns the function itself, not an array."""
    zero = torch.tensor(0)
    return _Mask(lambda query, key: mask_function(zero, zero, query, key))


AttentionMaskInterface.register(MASK_NAME, _keep_function)


def attention_rules(model_class: type, config: Any) -> AttentionRules:
    """The rules of the layers of a model of `model_class` with `config` (its weights are not needed).

    Raises `ModelError` for a mask that no rule describes, or a layer type whose mask transformers does not make.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text._attn_implementation = MASK_NAME
    window = getattr(text, "sliding_window", None) or 0
    types, rows = _made_up_sequence(window)
    name = model_class.__name__
    try:
        masks = getattr(model_class, "create_masks_for_generate", create_masks_for_generate)(
            config=config,
            inputs_embeds=torch.zeros(1, 1, 1).expand(1, len(types), 1),
            attention_mask=None,
            past_key_values=None,
            position_ids=None,
            token_type_ids=types[None],
            mm_token_type_ids=types[None],
        )
    except Exception as error:  # code of any family; for chunked attention transformers itself fails here
        raise ModelError(
            f"{name}'s mask function failed, so the policy cannot know which tokens attend to which: choose a model "
            f"with full or sliding-window attention ({type(error).__name__}: {error})"
        ) from error
    layer_types = getattr(text, "layer_types", None)
    if isinstance(masks, _Mask):
        return AttentionRules((_rule_of(masks, types, rows, name),))
    if not isinstance(masks, Mapping) or layer_types is None:
        raise ModelError(
            f"{name}'s mask function does not know its layers, of type {', '.join(dict.fromkeys(layer_types or ()))}, "
            "so the policy cannot know which tokens attend to which: choose a model with full or sliding-window "
            "attention"
        )
    rules: dict[str, AttentionRule | None] = {}
    for kind in dict.fromkeys(layer_types):
        if kind not in masks:
            raise ModelError(
                f"{name} has layers of type {kind!r}, for which its mask function makes no mask of their own, so the "
                "policy cannot know which tokens they attend to: choose a model with full or sliding-window attention"
            )
        # Layers that carry a state need a mask only for padding, so theirs is None here.
        rules[kind] = None if masks[kind] is None else _rule_of(masks[kind], types, rows, name)
    found = AttentionRules(tuple(rules[kind] for kind in layer_types))
    if len({rule.window for rule in found.distinct}) < len(found.distinct):
        raise ModelError(
            f"{name} has layers with the same window of which some show an image's later tokens and some do not, and "
            "the policy tells layers apart by their window: choose a model whose layers of one window are alike"
        )
    return found


def _made_up_sequence(window: int) -> tuple[Tensor, list[int]]:
    """Token types int64 [L], 1 on the tokens of two images, and the rows whose mask is read: at the borders of the
    images and of the window, and the last row, which is text and at least a window away from the images."""
    second = 4 * IMAGE_TOKENS + window
    end = second + window + IMAGE_TOKENS
    length = max(UNWINDOWED_LENGTH, end + window + IMAGE_TOKENS)
    types = torch.zeros(length, dtype=torch.int64)
    types[IMAGE_TOKENS : 2 * IMAGE_TOKENS] = 1
    types[second:end] = 1
    borders = (1, IMAGE_TOKENS, 2 * IMAGE_TOKENS, window, second, second + window, end, length)
    return types, sorted({row for at in borders for row in (at - 1, at, at + 1) if 0 <= row < length})


def _rule_of(mask: _Mask, types: Tensor, rows: list[int], name: str) -> AttentionRule:
    """The rule that describes `mask` on `rows`."""
    length = len(types)
    key = torch.arange(length)

    def shown(row: int) -> Tensor:
        return mask.shows(torch.tensor(row), key).expand(length)

    visible = int(shown(length - 1).sum())
    rule = AttentionRule(
        window=None if visible == length else visible,
        image_runs=bool(shown(IMAGE_TOKENS)[IMAGE_TOKENS + 1]),
    )
    last = torch.from_numpy(image_ends(types.numpy()).copy()) if rule.image_runs else key
    for row in rows:
        expected = (key <= last[row]) & (key > row - (rule.window or length))
        wrong = (shown(row) != expected).nonzero()
        if len(wrong):
            other, verb = int(wrong[0]), "hides" if expected[wrong[0]] else "shows"
            raise ModelError(
                f"{name} masks attention in a way that the policy does not compute: its mask {verb} token {other} to "
                f"token {row}, which no window and no image explains; chunks and bidirectional prompts do that. Choose "
                "a model with full or sliding-window attention"
            )
    return rule
