"""The neutral family, for models that vlmrl has no special knowledge of. Other families override parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmrl.config.model import Init, ModelConfig, TinyConfig, VLMConfig

if TYPE_CHECKING:  # preflight refuses a configuration in half a second, and numpy alone takes a tenth
    import numpy as np

    from vlmrl.models.families.positions import PositionFunction

POSITION_NAMES = ("mrope", "sequential")
"""Values of `model.vlm.positions`: the names of the functions in positions.py."""


@dataclass(frozen=True)
class ImageBounds:
    """Bounds of an image's area in pixels: the image processor scales smaller images up and larger ones down."""

    least: int
    most: int


@dataclass(frozen=True)
class CheckpointRecipe:
    """How the files of a checkpoint of this family are made here, without a download (checkpoints/text_files.py)."""

    architecture: str
    """Name of the model's class in transformers."""
    special_tokens: tuple[str, ...]
    """Tokens that `skip_special_tokens` removes from a text, in the order of their ids."""
    atomic_tokens: tuple[str, ...]
    """Tokens after them that are never split either, but count as text."""
    end_of_text: str
    """The special token that ends a document; also the padding."""
    end_of_turn: str
    """The special token that ends a message."""
    config_tokens: Mapping[str, str]
    """Key of config.json that holds a token id → the token."""
    tokenizer_class: str
    """Name of the tokenizer's class in transformers."""
    pre_tokenizer_regex: str
    """Splits a text into the pieces that BPE merges do not cross."""
    chat_words: tuple[str, ...]
    """Texts that the chat template writes itself; the BPE merges are also trained on them."""
    chat_template: str
    """In Jinja."""
    preprocessor_config: Mapping[str, Any]
    """preprocessor_config.json without `size`, which holds the bounds of an image."""
    video_preprocessor_config: Mapping[str, Any]
    """video_preprocessor_config.json without `size`, which holds the same bounds, here of all frames of a video."""
    made_here: ImageBounds
    """Bounds that the image processor of a checkpoint with `model.init=random` has."""
    tiny: ImageBounds | None
    """Bounds that the image processor of a checkpoint of `model.tiny` has. None: no tiny checkpoint can be built."""


class Family:
    """A model family, or a text-only model where `vlm` is None."""

    has_experts: bool = False
    """Whether the MLPs are mixtures of experts."""
    token_pixels: int | None = None
    """Pixels per side of the square that one image token covers. None where a token does not cover a fixed area."""
    frame_tokens: int = 2
    """Tokens that enclose an image's placeholder tokens."""
    processed_bytes_per_pixel: int = 12
    """Bytes of `mm_kwargs` per pixel of an image: float32 in 3 channels, times what the processor repeats."""
    released_bounds: ImageBounds | None = None
    """Bounds of an image in the checkpoints that the family's authors released. None where they are not known. A family
    that states them also overrides `image_tokens`."""
    released_video_bounds: ImageBounds | None = None
    """Bounds of a video, counted as the video processor does, in the checkpoints that the family's authors released.
    None where they are not known. A family that states them also overrides `video_tokens`."""
    writes_times: bool = False
    """Whether the prompt has a time as text before each grid of a video's patches, and a marker around each grid."""
    recipe: CheckpointRecipe | None = None
    """None: no checkpoint of this family can be made here (`model.tiny`, `model.init=random`)."""

    def __init__(self, vlm: VLMConfig | None) -> None:
        self.vlm = vlm

    @property
    def name(self) -> str:
        """The `model_type` of config.json; empty for a text-only model."""
        return self.vlm.family if self.vlm is not None else ""

    @property
    def image_token(self) -> str | None:
        """The placeholder token, as the tokenizer spells it; None for a text-only model."""
        return self.vlm.image_token if self.vlm is not None else None

    @property
    def builds_tiny(self) -> bool:
        """Whether `model.tiny` can build a checkpoint of this family."""
        return self.recipe is not None and self.recipe.tiny is not None

    def position_function(self, model_config: Any) -> PositionFunction:
        """The function of `model.vlm.positions`; `model_config` is the loaded model's own `config`."""
        from vlmrl.models.families.positions import position_function

        if self.vlm is None:
            return position_function("sequential")
        vision = getattr(model_config, "vision_config", None)
        merge, per_second = (getattr(vision, name, 1) for name in ("spatial_merge_size", "tokens_per_second"))
        return position_function(self.vlm.positions, merge, per_second)

    def placeholder_tokens(self, mm_kwargs: Mapping[str, np.ndarray], image_processor: Any) -> int:
        """Placeholder tokens of one image, from the processor's output: `image_grid_thw` counts patches, of which
        `merge_size`² become a token."""
        return int(mm_kwargs["image_grid_thw"].prod()) // int(image_processor.merge_size) ** 2

    def processed_size(self, mm_kwargs: Mapping[str, np.ndarray], image_processor: Any) -> tuple[int, int] | None:
        """(width, height) in pixels of one image, or of each frame of one video, after the processor resized it:
        `image_grid_thw` and `video_grid_thw` count patches of `patch_size`² pixels. None where the processor does not
        tell."""
        grid = mm_kwargs.get("image_grid_thw", mm_kwargs.get("video_grid_thw"))
        patch_size = getattr(image_processor, "patch_size", None)
        if grid is None or not isinstance(patch_size, int):
            return None
        _, rows, columns = (int(count) for count in grid[0])
        return columns * patch_size, rows * patch_size

    def processed_pixels(self, mm_kwargs: Mapping[str, np.ndarray], image_processor: Any) -> np.ndarray | None:
        """uint8 [H, W, 3]: one image as the processor made it, for people to look at. None where that is not known."""
        from vlmrl.models.families.patches import picture_of

        return picture_of(mm_kwargs, image_processor)

    def image_bounds(self, model: ModelConfig) -> ImageBounds | None:
        """Bounds of an image, as far as the configuration tells; None where they are not known."""
        bounds = self.released_bounds
        if self.recipe is not None and model.tiny is not None:
            bounds = self.recipe.tiny
        elif self.recipe is not None and model.init is Init.random:
            bounds = self.recipe.made_here
        if bounds is None or self.vlm is None:
            return bounds
        return ImageBounds(self.vlm.min_pixels or bounds.least, self.vlm.max_pixels or bounds.most)

    def image_tokens(self, width: int, height: int, bounds: ImageBounds) -> int:
        """Placeholder tokens of an image of width × height pixels. Only for a family that knows its `token_pixels`."""
        raise NotImplementedError(f"model.vlm.family={self.name} has no formula for the tokens of an image")

    def video_bounds(self, model: ModelConfig) -> ImageBounds | None:
        """Bounds of a video, as far as the configuration tells; None where they are not known, or without videos."""
        video = None if self.vlm is None else self.vlm.video
        if video is None or self.released_video_bounds is None:
            return None
        bounds = self.released_video_bounds
        if self.recipe is not None and model.tiny is not None:
            bounds = self.recipe.tiny or bounds
        elif self.recipe is not None and model.init is Init.random:
            bounds = self.recipe.made_here
        return ImageBounds(video.min_pixels or bounds.least, video.max_pixels or bounds.most)

    def video_tokens(self, frames: int, width: int, height: int, bounds: ImageBounds) -> int:
        """Placeholder tokens of a video. Only for a family that states its `released_video_bounds`."""
        raise NotImplementedError(f"model.vlm.family={self.name} has no formula for the tokens of a video")

    def vision_parameters(self, vision: Mapping[str, Any]) -> int | None:
        """Parameters of the vision tower of a `vision_config`; None where there is no formula. Raises `KeyError` where
        a number that the formula needs is missing."""
        return None

    def tiny_config(self, tiny: TinyConfig, vocab_size: int) -> dict[str, Any]:
        """`text_config`, `vision_config` and `tie_word_embeddings` of the checkpoint that `tiny` describes."""
        raise NotImplementedError(f"model.vlm.family={self.name} cannot build a tiny checkpoint")

    def tiny_problem(self, tiny: TinyConfig) -> str | None:
        """What keeps the sizes of `model.tiny` from being a model, beginning with a key; None where they are one."""
        return None
