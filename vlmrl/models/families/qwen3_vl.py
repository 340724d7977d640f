"""Qwen3-VL, dense (`qwen3_vl`) and with mixtures of experts (`qwen3_vl_moe`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmrl.config.model import TinyConfig
from vlmrl.models.families.base import CheckpointRecipe, Family, ImageBounds

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 16, 2, 2
"""Pixels per side of a patch; patches per side of a token; frames that a patch spans (a still image is repeated)."""

TOKEN_PIXELS = PATCH_SIZE * MERGE_SIZE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen3-VL's own, in the order of their ids (151643 …)."""

ATOMIC_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if 'text' in part -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set begin = 0 -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}
{%- set begin = 1 -%}
{{ text_of(messages[0].content) + '\\n\\n' }}
{%- endif -%}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools -%}{{ '\\n' }}{{ tool | tojson }}{%- endfor -%}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}' }}
{{- '\\n</tool_call><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages[begin:] -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + parts(message.content) + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + parts(message.content) }}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{ '\\n' }}{%- endif -%}
{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""The published template, in fewer words."""

RECIPE = CheckpointRecipe(
    architecture="Qwen3VLForConditionalGeneration",
    special_tokens=SPECIAL_TOKENS,
    atomic_tokens=ATOMIC_TOKENS,
    end_of_text="<|endoftext|>",
    end_of_turn="<|im_end|>",
    config_tokens={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    tokenizer_class="Qwen2Tokenizer",
    pre_tokenizer_regex=PRE_TOKENIZER_REGEX,
    chat_words=("system\n", "user\n", "assistant\n"),
    chat_template=CHAT_TEMPLATE,
    preprocessor_config={
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    video_preprocessor_config={
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "cap_pixels_per_frame": False,
    },
    # One token to 16,384 tokens, the upper bound of the released checkpoints; a tiny checkpoint allows 1,024 tokens.
    made_here=ImageBounds(TOKEN_PIXELS**2, 16 * 1024 * 1024),
    tiny=ImageBounds(TOKEN_PIXELS**2, 1024 * 1024),
)


class Qwen3VL(Family):
    """Dense Qwen3-VL: patches of 16 × 16 pixels, merged 2 × 2 into a token; deepstack; interleaved MRoPE."""

    token_pixels = TOKEN_PIXELS
    processed_bytes_per_pixel = 3 * TEMPORAL_PATCH_SIZE * 4
    released_bounds = ImageBounds(256 * 256, 16 * 1024 * 1024)
    released_video_bounds = ImageBounds(4096, 25165824)
    writes_times = True
    recipe: CheckpointRecipe | None = RECIPE

    def image_tokens(self, width: int, height: int, bounds: ImageBounds) -> int:
        """Each side is rounded to whole tokens, then the area is scaled into `bounds`.

        >>> family = Qwen3VL(None)
        >>> [family.image_tokens(32, 32, ImageBounds(least, 1 << 24)) for least in (32 * 32, 256 * 256)]
        [1, 64]
        >>> [family.image_tokens(*size, ImageBounds(256 * 256, 1 << 24)) for size in ((448, 448), (1000, 600))]
        [196, 589]
        """
        rounded = [round(side / TOKEN_PIXELS) * TOKEN_PIXELS for side in (height, width)]
        if math.prod(rounded) > bounds.most:
            scale = math.sqrt(height * width / bounds.most)
            rounded = [max(TOKEN_PIXELS, math.floor(s / scale / TOKEN_PIXELS) * TOKEN_PIXELS) for s in (height, width)]
        elif math.prod(rounded) < bounds.least:
            scale = math.sqrt(bounds.least / (height * width))
            rounded = [math.ceil(s * scale / TOKEN_PIXELS) * TOKEN_PIXELS for s in (height, width)]
        return math.prod(rounded) // TOKEN_PIXELS**2

    def video_tokens(self, frames: int, width: int, height: int, bounds: ImageBounds) -> int:
        """As `image_tokens` for the area of all frames together; each pair of frames is one grid of tokens.

        >>> family = Qwen3VL(None)
        >>> [family.video_tokens(8, *size, ImageBounds(4096, 25165824)) for size in ((64, 96), (640, 480))]
        [24, 1200]
        """
        if min(height, width) < TOKEN_PIXELS:
            scale = max(TOKEN_PIXELS / height, TOKEN_PIXELS / width)
            height, width = int(height * scale), int(width * scale)
        shown = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE
        rounded = [round(side / TOKEN_PIXELS) * TOKEN_PIXELS for side in (height, width)]
        if shown * math.prod(rounded) > bounds.most:
            scale = math.sqrt(frames * height * width / bounds.most)
            rounded = [max(TOKEN_PIXELS, math.floor(s / scale / TOKEN_PIXELS) * TOKEN_PIXELS) for s in (height, width)]
        elif shown * math.prod(rounded) < bounds.least:
            scale = math.sqrt(bounds.least / (frames * height * width))
            rounded = [math.ceil(s * scale / TOKEN_PIXELS) * TOKEN_PIXELS for s in (height, width)]
        return math.ceil(frames / TEMPORAL_PATCH_SIZE) * math.prod(rounded) // TOKEN_PIXELS**2

    def vision_parameters(self, vision: Mapping[str, Any]) -> int:
        """Patches, positions, blocks with biases, and a merger for the output and for each deepstack level."""
        width, inner = vision["hidden_size"], vision["intermediate_size"]
        merged = width * vision["spatial_merge_size"] ** 2
        patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        merger = merged * merged + merged + merged * vision["out_hidden_size"] + vision["out_hidden_size"]
        levels = len(vision["deepstack_visual_indexes"])
        return int(
            patch * width
            + width
            + vision["num_position_embeddings"] * width
            + vision["depth"] * block
            + merger
            + 2 * width
            + levels * (merger + 2 * merged)
        )

    def tiny_config(self, tiny: TinyConfig, vocab_size: int) -> dict[str, Any]:
        return {
            "text_config": {
                "vocab_size": vocab_size,
                "hidden_size": tiny.hidden_size,
                "intermediate_size": tiny.intermediate_size,
                "num_hidden_layers": tiny.num_hidden_layers,
                "num_attention_heads": tiny.num_attention_heads,
                "num_key_value_heads": tiny.num_key_value_heads,
                "head_dim": tiny.head_dim,
                "max_position_embeddings": tiny.max_position_embeddings,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_interleaved": True,
                    "mrope_section": mrope_section(tiny.head_dim),
                },
                "initializer_range": tiny.initializer_range,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "depth": tiny.vision_depth,
                "hidden_size": tiny.vision_hidden_size,
                "intermediate_size": tiny.vision_intermediate_size,
                "num_heads": tiny.vision_num_heads,
                "out_hidden_size": tiny.hidden_size,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": list(tiny.deepstack_visual_indexes),
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": TEMPORAL_PATCH_SIZE,
                "initializer_range": tiny.initializer_range,
            },
            "tie_word_embeddings": True,
        }

    def tiny_problem(self, tiny: TinyConfig) -> str | None:
        head_dim_vision, rest = divmod(tiny.vision_hidden_size, tiny.vision_num_heads)
        if tiny.num_attention_heads % tiny.num_key_value_heads:
            return (
                f"num_attention_heads={tiny.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={tiny.num_key_value_heads}"
            )
        if tiny.head_dim % 2 or tiny.head_dim < 8:
            return f"head_dim={tiny.head_dim} is odd or below 8, so MRoPE has no room for time, height and width"
        if rest or head_dim_vision % 4:
            return (
                f"vision_hidden_size={tiny.vision_hidden_size} / vision_num_heads={tiny.vision_num_heads} "
                "is not a multiple of 4, so the vision tower's rotary embedding does not fit"
            )
        indexes = tiny.deepstack_visual_indexes
        if len(indexes) > tiny.num_hidden_layers or not all(0 <= index < tiny.vision_depth for index in indexes):
            return (
                f"deepstack_visual_indexes={list(indexes)} name layers that "
                f"vision_depth={tiny.vision_depth} or num_hidden_layers={tiny.num_hidden_layers} does not have"
            )
        return None


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with mixtures of experts."""

    has_experts = True
    recipe = replace(RECIPE, architecture="Qwen3VLMoeForConditionalGeneration", tiny=None)


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width, in Qwen3-VL's proportions; they sum to head_dim / 2.

    >>> mrope_section(128), mrope_section(32)
    ([24, 20, 20], [6, 5, 5])
    """
    half = head_dim // 2
    space = half * 20 // 64
    return [half - 2 * space, space, space]
