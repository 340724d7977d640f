"""Rules about `model.vlm.video`: families that have videos, their token, and the sizes of a video."""

from __future__ import annotations

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of
from vlmrl.preflight.auto_model import known_families


def family_has_videos(config: RunConfig) -> None:
    """The features and positions of the family's videos are known to be those of transformers."""
    vlm = config.model.vlm
    if vlm is None or vlm.video is None:
        return
    known = [name for name, fields in known_families().items() if "video" in fields]
    if vlm.family not in known:
        raise ConfigError(
            f"model.vlm.video is set and model.vlm.family={vlm.family} is not known to have videos here, so the policy "
            "might see other frames or times than the model was trained with: set model.vlm.video=null and show the "
            f"frames as images, or choose one of {', '.join(known)}"
        )
    recipe = family_of(vlm).recipe
    tokens = [] if recipe is None else list(recipe.config_tokens.values())
    if vlm.video.token == vlm.image_token or (tokens and vlm.video.token not in tokens):
        raise ConfigError(
            f"model.vlm.video.token={vlm.video.token} is no video token of model.vlm.family={vlm.family}, so no "
            f"placeholder would be found: set it to {known_families()[vlm.family]['video']['token']}"
        )


def video_sizes_are_possible(config: RunConfig) -> None:
    """Some size of a video is within its bounds."""
    video = config.model.vlm.video if config.model.vlm is not None else None
    if video is None or video.min_pixels is None or video.max_pixels is None:
        return
    if video.min_pixels > video.max_pixels:
        raise ConfigError(
            f"model.vlm.video.min_pixels={video.min_pixels} is above model.vlm.video.max_pixels={video.max_pixels}, so "
            "no video has an allowed size: lower the first or raise the second"
        )
