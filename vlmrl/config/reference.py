"""`reference`: a second model that scores what the policy samples."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from vlmrl.config.fields import Resume, setting
from vlmrl.config.model import Dtype


@dataclass
class ReferenceConfig:
    """What every choice of a reference has."""

    kind: str = setting("none", on_resume=Resume.refused)
    """The choice; set by the option that `reference=` chooses. Runs of older versions have none."""


@dataclass
class CopyConfig:
    """How a second copy of a model is held."""

    dtype: Dtype = setting(Dtype.auto, on_resume=Resume.refused)
    """The number format of its weights; `auto` takes that of the policy (`model.dtype`). A smaller one saves memory,
    and moves its logprobs by its rounding."""
    offload: bool = setting(False, on_resume=Resume.free)
    """Keep its weights in the host's memory, and on the GPU only while they score a batch. Without a GPU it has no
    effect."""


@dataclass
class NoReferenceConfig(ReferenceConfig):
    """No second model."""

    kind: str = setting("none", on_resume=Resume.refused)
    """`none`: what needs a reference (`algorithm.kl`) is refused."""


@dataclass
class InitialReferenceConfig(ReferenceConfig, CopyConfig):
    """The policy as it was before the first step of reinforcement learning, after the warm-up where there is one. With
    LoRA and no warm-up it is the model without its adapters, which takes no memory of its own."""

    kind: str = setting("initial", on_resume=Resume.refused)
    """`initial` keeps the policy near what it was."""
    refresh_every: int = setting(0, on_resume=Resume.noted, low=0, high=10**9, outside="it counts no steps")
    """Take the policy's weights anew after so many optimizer steps; 0 never does."""


@dataclass
class FolderReferenceConfig(ReferenceConfig, CopyConfig):
    """Another checkpoint of the same family and vocabulary, of any size: a teacher."""

    kind: str = setting("folder", on_resume=Resume.refused)
    """`folder` is for distillation, and for staying near a model that the run did not start from."""
    folder: str = setting(MISSING, on_resume=Resume.refused)
    """The checkpoint: a folder as `mode=export` or transformers writes it."""


@dataclass
class EmaReferenceConfig(ReferenceConfig, CopyConfig):
    """An exponential moving average of the policy's weights, kept in float32."""

    kind: str = setting("ema", on_resume=Resume.refused)
    """`ema` is a reference that follows the policy slowly."""
    decay: float = setting(0.99, on_resume=Resume.noted, low=0, high=1, outside="it is no average")
    """The share of itself that the average keeps at each optimizer step; the rest comes from the policy's weights. 0.99
    looks back about 100 steps."""
