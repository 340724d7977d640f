"""`model` and its groups `vlm`, `size` and `lora`: the policy, and what makes it a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import LARGEST_SEED, NAME, Form, Resume, setting

NO_MODEL = "there is no such model"
"""The consequence of a size below 1."""


EVERY_LINEAR_LAYER = "all"
"""In `model.lora.targets`: every linear layer, whatever its name."""


class Init(Enum):
    """Where the weights come from."""

    pretrained = "pretrained"
    """From a checkpoint."""
    random = "random"
    """From a random generator (`seed`): the architecture of `model.size`, with a tokenizer that is made on the spot."""


class Dtype(Enum):
    """Number format of weights and activations."""

    auto = "auto"
    """The checkpoint's own on a GPU, `float32` on a CPU."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    """Three bits more precision than bfloat16 in the same time, so sampler and trainer differ eight times less. The
    trainer scales its loss for it. Activations above 65504 become infinite, and some pretrained models have them."""


class Part(Enum):
    """A part of the model."""

    vision_tower = "vision_tower"
    projector = "projector"
    """What leads from the vision tower to the language model; transformers also calls it merger or connector."""
    language_model = "language_model"
    """Embedding, layers and last norm. A head that is tied to the embedding is one tensor with it."""
    head = "head"
    """A head of its own (`tie_word_embeddings: false`)."""


@dataclass
class VideoConfig:
    """Videos of a VLM family: how a video is sampled, and how large it may be."""

    token: str = setting(MISSING, on_resume=Resume.refused)
    """The placeholder token of a video, as the tokenizer spells it."""
    fps: float = setting(
        2.0, on_resume=Resume.noted, low=1e-3, high=1000, outside="no frame or every frame would be shown"
    )
    """Frames per second that are shown of a video, by the rule of the checkpoint's own video processor. A video that
    comes sampled already shows one every 1 / `fps` seconds."""
    num_frames: int | None = setting(
        None, on_resume=Resume.noted, low=2, high=2**16, outside="a video of one frame shows no time"
    )
    """If set, so many frames are shown of each video, at even distances, instead of `fps` a second."""
    max_frames: int = setting(
        64, on_resume=Resume.noted, low=2, high=2**16, outside="a video of one frame shows no time"
    )
    """The most frames of a video. A video that has more at `fps` is refused, and ends its rollout."""
    max_episode_frames: int = setting(
        256, on_resume=Resume.noted, low=2, high=2**20, outside="a video of one frame shows no time"
    )
    """The most frames of all videos in a prompt together. An episode that shows more ends there."""
    min_pixels: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**31, outside="no video has so many pixels"
    )
    """Videos with fewer pixels are scaled up to this. Qwen3-VL counts the pixels of all frames, Qwen2-VL and Qwen2.5-VL
    those of each frame. None is the checkpoint's own bound."""
    max_pixels: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**31, outside="no video has so many pixels"
    )
    """Videos with more pixels, counted in the same way, are scaled down to this. None is the checkpoint's own bound."""


@dataclass
class VLMConfig:
    """What a VLM family needs beyond tokens. A new family is one YAML file in `conf/model/vlm/`."""

    family: str = setting(MISSING, on_resume=Resume.refused, form=NAME)
    """`model_type` in the checkpoint's config.json; a checkpoint of another family is refused. `auto`, here and in the
    fields below, is what the checkpoint says."""
    renderers: list[str] = setting(MISSING, on_resume=Resume.noted, form=NAME)
    """Names of `orchestrator.renderer` that can serve this family; `auto` takes the first."""
    positions: str = setting(MISSING, on_resume=Resume.refused, form=NAME)
    """Name of the position function in `vlmrl.models.families.positions` (`mrope`, `sequential`)."""
    image_token: str = setting(MISSING, on_resume=Resume.refused)
    """The placeholder token, as the tokenizer spells it."""
    min_pixels: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**31, outside="no image has so many pixels"
    )
    """Images with fewer pixels are scaled up to this area. None is the checkpoint's own bound. Only for processors that
    bound an area (Qwen-VL, GLM-V); `image_settings` serves the others."""
    max_pixels: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**31, outside="no image has so many pixels"
    )
    """Images with more pixels are scaled down to this area. None is the checkpoint's own bound."""
    image_settings: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Other settings of the checkpoint's image processor, such as `size`, `max_patches` or `do_image_splitting`."""
    video: VideoConfig | None = None
    """If set, the family takes videos, with `orchestrator/renderer=template`."""
    freeze_vision: bool = setting(False, on_resume=Resume.refused)
    """Do not train the vision tower; train the language model only."""
    freeze_language: bool = setting(False, on_resume=Resume.refused)
    """Do not train the language model, its embedding and its head; train the vision tower only."""


@dataclass
class TinyConfig:
    """Sizes of a checkpoint that the run builds itself, with random weights; the architecture is the real one."""

    hidden_size: int = setting(64, on_resume=Resume.refused, low=1, high=2**16, outside=NO_MODEL)
    """Width of the language model."""
    intermediate_size: int = setting(128, on_resume=Resume.refused, low=1, high=2**18, outside=NO_MODEL)
    """Width of the language model's MLPs."""
    num_hidden_layers: int = setting(2, on_resume=Resume.refused, low=1, high=1024, outside=NO_MODEL)
    """Layers of the language model."""
    num_attention_heads: int = setting(4, on_resume=Resume.refused, low=1, high=1024, outside=NO_MODEL)
    """Query heads of the language model."""
    num_key_value_heads: int = setting(2, on_resume=Resume.refused, low=1, high=1024, outside=NO_MODEL)
    """Key and value heads; their number divides that of the query heads."""
    head_dim: int = setting(32, on_resume=Resume.refused, low=1, high=4096, outside=NO_MODEL)
    """Width of a head; even."""
    vision_depth: int = setting(1, on_resume=Resume.refused, low=1, high=1024, outside=NO_MODEL)
    """Layers of the vision tower."""
    vision_hidden_size: int = setting(64, on_resume=Resume.refused, low=1, high=2**16, outside=NO_MODEL)
    """Width of the vision tower."""
    vision_intermediate_size: int = setting(128, on_resume=Resume.refused, low=1, high=2**18, outside=NO_MODEL)
    """Width of the vision tower's MLPs."""
    vision_num_heads: int = setting(4, on_resume=Resume.refused, low=1, high=1024, outside=NO_MODEL)
    """Heads of the vision tower; their number divides its width."""
    deepstack_visual_indexes: list[int] = setting(
        [0], on_resume=Resume.refused, low=0, high=1023, outside="there is no such layer"
    )
    """0-based vision layers whose features are added to the first layers of the language model, in order."""
    bpe_merges: int = setting(128, on_resume=Resume.refused, low=0, high=10**5, outside="it is not a number of merges")
    """Merges of the byte-level BPE beyond its 256 bytes; trained on the words of the prompts."""
    max_position_embeddings: int = setting(4096, on_resume=Resume.refused, low=1, high=2**24, outside=NO_MODEL)
    """The most tokens of a sequence."""
    initializer_range: float = setting(
        0.08, on_resume=Resume.refused, low=1e-8, high=10, outside="all weights are equal or none is finite"
    )
    """Standard deviation of the random weights. 0.02 learns far slower at this width."""
    seed: int = setting(0, on_resume=Resume.refused, low=0, high=LARGEST_SEED, outside="it seeds no generator")
    """Seed of the random weights; the same config and seed give the same bytes."""


@dataclass
class SizeConfig:
    """A size of a family, by the numbers in its config.json."""

    name: str = setting(MISSING, on_resume=Resume.refused)
    """Hub name of the checkpoint of this size."""
    tie_word_embeddings: bool = setting(MISSING, on_resume=Resume.refused)
    """Whether the head uses the weights of the embedding."""
    text: dict[str, Any] = setting(MISSING, on_resume=Resume.refused)
    """`text_config`; with `init=random`, the run fills in the token ids."""
    vision: dict[str, Any] = setting(MISSING, on_resume=Resume.refused)
    """`vision_config`."""


class BaseDtype(Enum):
    """Number format of the linear layers that adapters stand next to."""

    auto = "auto"
    """That of the model (`model.dtype`)."""
    nf4 = "nf4"
    """Every linear layer of the language model in 4.5 bits a weight (QLoRA, arXiv 2305.14314; bitsandbytes). The layer
    computes in `model.dtype`. Sampler and exported model have the same rounded weights."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) next to linear layers; nothing else is trained."""

    rank: int = setting(16, on_resume=Resume.refused, low=1, high=2**16, outside="an adapter has no column")
    """Rank of the product B A: columns of B and rows of A."""
    alpha: float = setting(
        32.0, on_resume=Resume.refused, low=1e-6, high=1e6, outside="adapters have no effect or drown the model"
    )
    """The weight of an adapter is alpha / rank."""
    targets: list[str] = setting([EVERY_LINEAR_LAYER], on_resume=Resume.refused, form=NAME)
    """Last parts of the names of the layers that get adapters, such as `q_proj`; `all` is every linear layer of
    `parts`. The experts of a mixture are not linear layers and get none."""
    parts: list[Part] = setting([Part.language_model], on_resume=Resume.refused)
    """Parts of the model whose linear layers get adapters. The vision tower and the projector may be among them, the
    head may not."""
    base_dtype: BaseDtype = setting(BaseDtype.auto, on_resume=Resume.refused)
    """Number format of the frozen layers of the language model."""


@dataclass
class ModelConfig:
    """The policy."""

    init: Init = setting(Init.pretrained, on_resume=Resume.refused)
    """Where the weights come from. `random` needs no download: use it to train from scratch, or to measure speed,
    memory and sharding without the real weights."""
    name: str = setting(MISSING, on_resume=Resume.refused)
    """Local folder or hub name of a Hugging Face checkpoint; with `tiny`, the name of the checkpoint that is built."""
    dtype: Dtype = setting(Dtype.float32, on_resume=Resume.noted)
    """Number format of weights and activations."""
    device: str = setting(
        "auto",
        on_resume=Resume.free,
        form=Form(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:<number>", "the model has no place"),
    )
    """`auto` is `cuda` where the machine has one, else `cpu`."""
    vlm: VLMConfig | None = None
    """What makes the model a VLM; None is a text-only model."""
    size: SizeConfig | None = None
    """The size that `init=random` builds. With `init=pretrained`, `name` is taken from it unless it is set."""
    lora: LoraConfig | None = None
    """If set, adapters are trained and the model stays as it is."""
    tiny: TinyConfig | None = None
    """If set, the run builds a small checkpoint instead of loading one."""


def most_frames(model: ModelConfig) -> int | None:
    """Frames that all videos of a prompt may have together; None for a model without videos."""
    return model.vlm.video.max_episode_frames if model.vlm is not None and model.vlm.video is not None else None
