"""What vlmrl knows of a model family, beyond what its checkpoint and its YAML file say.

    conf/model/vlm/<family>.yaml   data: model_type, renderers, position function, image token, flat mm_kwargs
    families/<family>.py           code: a subclass of `Family` that overrides what is different (optional)
    family_of(config.model.vlm)    the one way to get it; no other module compares family names

    preflight   bounds and tokens of an image, parameters of the vision tower, experts, tiny sizes
    runs        the position function, the number of placeholder tokens (handed to the renderer)
    checkpoints how a tokenizer and a config.json are made here (`model.tiny`, `model.init=random`)

To add a family:

1. Write `conf/model/vlm/<family>.yaml`. Its `family` is the `model_type` of the checkpoint's config.json. That is all
   for a family that counts the tokens of an image as Qwen-VL does (`image_grid_thw`) and uses a position function of
   positions.py: `family_of` gives it the neutral `Family`. The estimates of a dry run then say "unknown" where they
   depend on the family, and `model.tiny` and `model.init=random` are refused.
2. If something else is different, write `families/<family>.py` with a subclass of `Family`, and enter it in `FAMILIES`
   below. A new position function goes into positions.py, under a name that the YAML can use.
3. Nothing else changes. A test (tests/unit/models/families/test_families.py) fails where another module compares
   family names.

Nothing here imports torch or transformers when it is imported: preflight uses it at every start. (vision_geometry.py
does, and is imported by the policy only.)
"""

from __future__ import annotations

from vlmrl.config.model import VLMConfig
from vlmrl.models.families.base import Family
from vlmrl.models.families.qwen3_vl import Qwen3VL, Qwen3VLMoe

FAMILIES: dict[str, type[Family]] = {
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VLMoe,
}
"""By `model.vlm.family`. A family that is not listed gets the neutral `Family`."""


def family_of(vlm: VLMConfig | None) -> Family:
    """The family of `model.vlm`. A text-only model (None) and an unlisted family get the neutral one.

    >>> vlm = VLMConfig(family="qwen3_vl", positions="mrope", image_token="<|image_pad|>")
    >>> family_of(vlm).has_experts, family_of(vlm).token_pixels, family_of(None).token_pixels
    (False, 32, None)
    """
    return Family(None) if vlm is None else FAMILIES.get(vlm.family, Family)(vlm)
