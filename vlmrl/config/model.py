"""`model` and `model/vlm`: which policy is trained, and what makes it a vision-language model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Init(Enum):
    """Where the weights come from."""

    pretrained = "pretrained"
    """A checkpoint."""
    random = "random"
    """Nowhere: the architecture of `model.size` with random weights (of `seed`), and a tokenizer that is made here."""


class Dtype(Enum):
    """Dtype of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    """Three bits more than bfloat16 for the same time, so that sampler and trainer round eight times less apart; the
    trainer scales its loss for it. Activations above 65504 are infinite in it: some pretrained models have them."""


@dataclass
class VLMConfig:
    """What a VLM family needs beyond tokens. A new family is one YAML file in `conf/model/vlm/`."""

    family: str = MISSING
    """`model_type` of the checkpoint's config.json; a checkpoint of another family is refused."""
    renderers: list[str] = MISSING
    """Names of `orchestrator.renderer` that can serve this family; `auto` takes the first."""
    positions: str = MISSING
    """Name of the position function in `vlmrl.models.families.positions` (`mrope`, `sequential`)."""
    image_token: str = MISSING
    """The placeholder token, as the tokenizer spells it."""
    flat_mm_kwargs: list[str] = MISSING
    """Names of `mm_kwargs` whose rows are not images (Qwen-VL: `pixel_values`, a row per patch); vLLM must be told."""
    freeze_vision: bool = False
    """Keep the vision tower as it is; only the language model learns."""
    freeze_language: bool = False
    """Keep the language model as it is, embedding and head included; only the vision tower learns."""


@dataclass
class TinyConfig:
    """Sizes of a checkpoint that is built here, with random weights; the architecture is the real one."""

    hidden_size: int = 64
    """Width of the language model."""
    intermediate_size: int = 128
    """Width of its MLPs."""
    num_hidden_layers: int = 2
    """Layers of the language model."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads; divides the query heads."""
    head_dim: int = 32
    """Width of a head; even."""
    vision_depth: int = 1
    """Layers of the vision tower."""
    vision_hidden_size: int = 64
    """Width of the vision tower."""
    vision_intermediate_size: int = 128
    """Width of its MLPs."""
    vision_num_heads: int = 4
    """Heads of the vision tower; divides its width."""
    deepstack_visual_indexes: list[int] = field(default_factory=lambda: [0])
    """0-based vision layers whose features are added to the first layers of the language model, in order."""
    bpe_merges: int = 128
    """Merges of the byte-level BPE beyond its 256 bytes; trained on the prompts' own words."""
    max_position_embeddings: int = 4096
    """Tokens."""
    initializer_range: float = 0.08
    """Standard deviation. 0.02 learns far slower at this width."""
    seed: int = 0
    """Seed of the weights; the same config and seed give the same bytes."""


@dataclass
class SizeConfig:
    """A size of a family, by the numbers of its config.json."""

    name: str = MISSING
    """Hub name of the checkpoint of this size."""
    tie_word_embeddings: bool = MISSING
    """Whether the head is the embedding."""
    text: dict[str, Any] = MISSING
    """`text_config`; with `init=random`, token ids are filled in."""
    vision: dict[str, Any] = MISSING
    """`vision_config`."""


@dataclass
class LoraConfig:
    """Low-rank adapters beside linear layers of the language model; nothing else learns (models/lora.py)."""

    rank: int = 16
    """Rank of B A: columns of B, rows of A."""
    alpha: float = 32.0
    """The weight of an adapter is alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Last parts of the layers' names. The experts of a mixture are no linear layers and have no adapters."""


@dataclass
class ModelConfig:
    """The policy."""

    init: Init = Init.pretrained
    """Where the weights come from. `random` needs no download: to learn from scratch, and to measure speed, memory and
    sharding where no weights are."""
    name: str = MISSING
    """Local folder or hub name of a Hugging Face checkpoint; with `tiny`, the name of the checkpoint that is built."""
    dtype: Dtype = Dtype.float32
    """Of weights and activations."""
    device: str = "auto"
    """`auto` is `cuda` where there is one, else `cpu`."""
    vlm: VLMConfig | None = None
    """None is a text-only model."""
    size: SizeConfig | None = None
    """What `init=random` builds; with `pretrained`, where `name` comes from when nothing else is said."""
    lora: LoraConfig | None = None
    """Set: adapters learn, and the model stays as it is."""
    tiny: TinyConfig | None = None
    """Set: build the checkpoint instead of loading one."""
