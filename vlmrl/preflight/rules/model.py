"""The model, its renderer and its sizes fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmrl.config.import_paths import is_import_path
from vlmrl.config.model import Init, Part, SizeConfig
from vlmrl.config.orchestrator import TEMPLATE
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of
from vlmrl.models.families.base import POSITION_NAMES
from vlmrl.preflight.estimate.sizes import find_sizes
from vlmrl.preflight.site import Site
from vlmrl.rendering.package import KEY, package_config

LARGEST_SIZE = 2**24
"""The highest value of a whole number in `model.size`."""

LARGEST_TINY = 10**9
"""The most parameters of a checkpoint that `model.tiny` builds on one CPU: 4 GB in float32."""


def renderer_is_there(config: RunConfig) -> None:
    """Only the renderer makes tokens and pixels, so every model needs one."""
    if config.orchestrator.renderer is not None:
        return
    made = "image tokens and pixels" if config.model.vlm is not None else "tokens"
    name = "" if config.model.vlm is not None else " orchestrator.renderer.name=qwen3, or another name of `renderers`"
    raise ConfigError(
        f"orchestrator.renderer=null leaves model.name={config.model.name} without a renderer, so nothing would make "
        f"its {made}: set orchestrator/renderer=auto{name}"
    )


def renderer_serves_family(config: RunConfig) -> None:
    """The renderer knows the placeholders of the model's family."""
    vlm, renderer = config.model.vlm, config.orchestrator.renderer
    assert renderer is not None, "renderer_is_there runs before"
    if vlm is None:
        if renderer.name == "auto":
            raise ConfigError(
                "orchestrator.renderer.name=auto takes the first of model.vlm.renderers, and model.vlm is null, so no "
                "renderer is chosen: set orchestrator/renderer=template, orchestrator.renderer.name=qwen3, or another "
                "name of the `renderers` package"
            )
        return
    if renderer.name == TEMPLATE or is_import_path(renderer.name):
        return  # the checkpoint's own template and processor serve every family
    if not vlm.renderers:
        raise ConfigError(
            "model.vlm.renderers=[] names no renderer, so nothing would make the model's image tokens and pixels: set "
            "it to [template], or to a name of the `renderers` package"
        )
    if renderer.name != "auto" and renderer.name not in vlm.renderers:
        raise ConfigError(
            f"orchestrator.renderer.name={renderer.name} does not serve model.vlm.family={vlm.family}, so tokens and "
            "pixels would differ from those that the model was trained on: set orchestrator/renderer=auto, or "
            f"orchestrator.renderer.name to one of {', '.join(vlm.renderers)}"
        )


def renderer_exists(config: RunConfig, site: Site) -> None:
    """The `renderers` package, whose import takes half a second, has a renderer of that name, with these options."""
    renderer, vlm = config.orchestrator.renderer, config.model.vlm
    assert renderer is not None, "renderer_is_there comes first"
    name = renderer.name
    if name == "auto":
        assert vlm is not None, "renderer_serves_family comes first"
        name = vlm.renderers[0]
    if name == TEMPLATE or is_import_path(name):
        return  # the template and the user's class are read where the run is built
    package_config(name, renderer.options, "model.vlm.renderers" if renderer.name == "auto" else KEY)


def frame_budgets_fit(config: RunConfig) -> None:
    """A video may have the frames that are shown of it, and an episode those of one video."""
    video = config.model.vlm.video if config.model.vlm is not None else None
    if video is None:
        return
    if video.num_frames is not None and video.num_frames > video.max_frames:
        raise ConfigError(
            f"model.vlm.video.num_frames={video.num_frames} is more than model.vlm.video.max_frames="
            f"{video.max_frames}, so every video would be refused: set model.vlm.video.max_frames={video.num_frames}, "
            "or show fewer frames"
        )
    if video.max_frames > video.max_episode_frames:
        raise ConfigError(
            f"model.vlm.video.max_frames={video.max_frames} is more than model.vlm.video.max_episode_frames="
            f"{video.max_episode_frames}, so a video of that length would end its episode before the first answer: set "
            f"model.vlm.video.max_episode_frames={video.max_frames} or lower model.vlm.video.max_frames"
        )


def positions_are_known(config: RunConfig) -> None:
    """`model.vlm.positions` names a position function."""
    vlm = config.model.vlm
    if vlm is not None and vlm.positions not in POSITION_NAMES:
        raise ConfigError(
            f"model.vlm.positions={vlm.positions} names no position function, so tokens would have no position ids: "
            f"set it to one of {', '.join(POSITION_NAMES)}"
        )


def image_token_is_known(config: RunConfig) -> None:
    """`model.vlm.image_token` is a token of the family, where the tokens of the family are known."""
    vlm, recipe = config.model.vlm, family_of(config.model.vlm).recipe
    if vlm is None or recipe is None:
        return
    known = list(recipe.config_tokens.values())
    if vlm.image_token not in known:
        raise ConfigError(
            f"model.vlm.image_token={vlm.image_token} is no image token of model.vlm.family={vlm.family}, so no "
            f"placeholder would be found: set it to {known[0]}"
        )


def size_is_numbers(config: RunConfig) -> None:
    """The numbers of `model.size` are numbers: their keys come from a config.json, which has no schema here."""
    if config.model.size is not None:
        for key, value, demand in _wrong_sizes(config.model.size):
            raise ConfigError(
                f"{key}={value} is no size of a model, so there is no such architecture: set it to {demand}, or choose "
                "model/size=2b|4b|8b|30b_a3b"
            )


WHOLE_NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings"),
    *("depth", "num_heads", "out_hidden_size", "patch_size", "temporal_patch_size", "spatial_merge_size"),
    *("num_position_embeddings", "decoder_sparse_step"),
)
"""Keys of `text_config` and `vision_config` that are whole numbers."""


def _wrong_sizes(size: SizeConfig) -> Iterator[tuple[str, Any, str]]:
    for group, numbers in (("text", size.text), ("vision", size.vision)):
        for name, value in numbers.items():
            key = f"model.size.{group}.{name}"
            if name in WHOLE_NUMBERS and not (type(value) is int and 1 <= value <= LARGEST_SIZE):
                yield key, value, f"a whole number from 1 to {LARGEST_SIZE}"
            elif name in ("rms_norm_eps", "initializer_range") and not (type(value) is float and 0 < value <= 1):
                yield key, value, "a number above 0 and at most 1"
            elif name in ("deepstack_visual_indexes", "mlp_only_layers"):
                if not isinstance(value, list) or not all(type(index) is int and 0 <= index < 1024 for index in value):
                    yield key, value, "a list of layers, counted from 0"
            elif name == "rope_parameters" and not isinstance(value, Mapping):
                yield key, value, "a dictionary"


def random_has_size(config: RunConfig) -> None:
    """Random weights belong to an architecture whose numbers are in the configuration."""
    model = config.model
    if model.tiny is not None and (model.size is not None or model.init is Init.random):
        setting = "model.size" if model.size is not None else "model.init=random"
        raise ConfigError(
            f"{setting} has no effect with model.tiny, which has sizes of its own, so another model than the one meant "
            "would be built: set model=qwen3vl"
        )
    if model.init is not Init.random:
        return
    if model.size is None or model.vlm is None:
        raise ConfigError(
            "model.init=random needs model.size and model.vlm, because no architecture to build is known without them: "
            "set model=qwen3vl or model=qwen3vl_moe, and a size with model/size=2b|4b|8b|30b_a3b"
        )
    if family_of(model.vlm).recipe is None:
        raise ConfigError(
            f"model.init=random cannot build model.vlm.family={model.vlm.family}, because no recipe for its tokenizer "
            "and image processor is known: load a checkpoint with model.init=pretrained, or choose model=qwen3vl"
        )
    moe = "num_experts" in model.size.text
    if moe != family_of(model.vlm).has_experts:
        raise ConfigError(
            f"model/size of {model.size.name} belongs to another family than model.vlm.family={model.vlm.family}, so "
            f"its numbers would build another model: set model={'qwen3vl_moe' if moe else 'qwen3vl'}"
        )


def something_learns(config: RunConfig) -> None:
    """Freezing and adapters leave something to train and do not contradict each other."""
    vlm, lora = config.model.vlm, config.model.lora
    if lora is not None and not lora.targets:
        raise ConfigError(
            "model.lora.targets=[] gives no layer an adapter, so nothing would learn: set "
            "model.lora.targets=[q_proj,v_proj], or leave it out"
        )
    if lora is not None:
        _adapted_parts_exist(lora.parts, has_images=vlm is not None)
    if vlm is None or not (vlm.freeze_vision or vlm.freeze_language):
        return
    if vlm.freeze_vision and vlm.freeze_language:
        raise ConfigError(
            "model.vlm.freeze_vision=true and model.vlm.freeze_language=true freeze the whole model, so nothing would "
            "learn: set one of them to false"
        )
    if lora is not None:
        key = "model.vlm.freeze_vision" if vlm.freeze_vision else "model.vlm.freeze_language"
        raise ConfigError(
            f"{key}=true has no effect with model.lora, which freezes everything but the adapters of model.lora.parts: "
            f"set {key}=false"
        )


def _adapted_parts_exist(parts: list[Part], *, has_images: bool) -> None:
    """Raise `ConfigError` for parts that can have no adapters."""
    shown = f"model.lora.parts=[{','.join(part.value for part in parts)}]"
    if not parts:
        raise ConfigError(
            f"{shown} gives no part adapters, so nothing would learn: set model.lora.parts=[language_model]"
        )
    if Part.head in parts:
        raise ConfigError(
            f"{shown} names the head, which gets no adapters, because logprobs are computed from its weight itself: "
            "drop head from model.lora.parts"
        )
    if not has_images and set(parts) != {Part.language_model}:
        raise ConfigError(
            f"{shown} names parts that a model without images (model.vlm=null) does not have: set "
            "model.lora.parts=[language_model]"
        )


def tiny_is_a_model(config: RunConfig) -> None:
    """The checkpoint of `model.tiny` can be built: the family has one, and its sizes fit each other."""
    tiny, family = config.model.tiny, family_of(config.model.vlm)
    if tiny is None:
        return
    if not family.builds_tiny:
        raise ConfigError(
            f"model.tiny cannot build a checkpoint of model.vlm.family={family.name or 'null'}, so there would be no "
            "model: drop the change to model.vlm, or load a checkpoint with model=auto model.name=<folder>"
        )
    if problem := family.tiny_problem(tiny):
        raise ConfigError(f"model.tiny.{problem}, so there is no such model: change one of them")
    parameters = find_sizes(config.model).parameters
    if parameters is not None and parameters > LARGEST_TINY:
        raise ConfigError(
            f"model.tiny has {parameters:,} parameters, and it is built and initialized on one CPU, so the run would "
            f"not begin for a long time: lower the sizes to {LARGEST_TINY:,} parameters or fewer, or choose "
            "model=qwen3vl model.init=random"
        )
