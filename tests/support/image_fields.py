"""What vLLM's items of images consist of, as its processors report it (vLLM 0.32)."""

from __future__ import annotations

from vlmrl.inference.vllm.image_fields import ImageField, ImageFields

QWEN = ImageFields(
    (ImageField("pixel_values", "flat", False, 2), ImageField("image_grid_thw", "batched", True, 1)), has_gaps=False
)
"""Qwen-VL: its processor's tensors as they are."""

TILED = ImageFields(
    (
        ImageField("pixel_values", "flat", False, 4),
        ImageField("pixel_attention_mask", "flat", False, 3),
        ImageField("num_patches", "batched", False, 0),
    ),
    has_gaps=True,
)
"""Idefics 3: without the batch dimension, and with a count of tiles."""

QWEN2_VIDEOS = ImageFields(
    (
        ImageField("pixel_values_videos", "flat", False, 2),
        ImageField("second_per_grid_ts", "batched", True, 0),
        ImageField("video_grid_thw", "batched", True, 1),
    ),
    has_gaps=False,
)
"""Qwen2.5-VL."""
