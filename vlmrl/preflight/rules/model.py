"""The model, its renderer and its numbers fit each other."""

from __future__ import annotations

from vlmrl.config.model import Init
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of


def renderer_is_there(config: RunConfig) -> None:
    """Nobody but the renderer makes tokens and pixels."""
    if config.orchestrator.renderer is not None:
        return
    if config.model.vlm is not None:
        raise ConfigError(
            "model.vlm requires orchestrator.renderer, else nobody makes the image tokens and pixels that "
            f"{config.model.name} is trained on: set orchestrator/renderer=auto"
        )
    raise ConfigError(
        f"model.name={config.model.name} requires orchestrator.renderer, else nobody makes its tokens: set "
        "orchestrator/renderer=auto orchestrator.renderer.name=qwen3, or another name of the `renderers` package"
    )


def renderer_serves_family(config: RunConfig) -> None:
    """The renderer knows the model's placeholders."""
    vlm, renderer = config.model.vlm, config.orchestrator.renderer
    assert renderer is not None, "renderer_is_there comes first"
    if vlm is None:
        if renderer.name == "auto":
            raise ConfigError(
                "orchestrator.renderer.name=auto requires model.vlm, else there are no model.vlm.renderers to take "
                "the first of: set orchestrator.renderer.name=qwen3, or another name of the `renderers` package"
            )
        return
    if not vlm.renderers:
        raise ConfigError(
            "model.vlm.renderers=[] requires at least one name, else no renderer can serve the model: "
            "name one of the `renderers` package"
        )
    if renderer.name != "auto" and renderer.name not in vlm.renderers:
        raise ConfigError(
            f"orchestrator.renderer.name={renderer.name} requires a model that it can serve, else tokens and pixels "
            f"are not those that model.vlm.family={vlm.family} was made for: set orchestrator/renderer=auto, "
            f"or one of model.vlm.renderers={','.join(vlm.renderers)}"
        )


def random_has_size(config: RunConfig) -> None:
    """Random weights are those of an architecture that is written down."""
    model = config.model
    if model.tiny is not None and (model.size is not None or model.init is Init.random):
        raise ConfigError(
            "model.size and model.init=random require a model without model.tiny, which has its own sizes, else they "
            "change nothing: set model=qwen3vl"
        )
    if model.init is not Init.random:
        return
    if model.size is None or model.vlm is None:
        raise ConfigError(
            "model.init=random requires model.size and model.vlm, else nobody knows what to build: choose "
            "model=qwen3vl or model=qwen3vl_moe, and a size with model/size=2b|4b|8b|30b_a3b"
        )
    moe = "num_experts" in model.size.text
    if moe != family_of(model.vlm).has_experts:
        raise ConfigError(
            f"model/size of {model.size.name} requires another family than model.vlm.family={model.vlm.family}, else "
            f"its numbers build another model: set model={'qwen3vl_moe' if moe else 'qwen3vl'}"
        )


def something_learns(config: RunConfig) -> None:
    """Freezing and adapters leave something to learn, once."""
    vlm, lora = config.model.vlm, config.model.lora
    if vlm is None or not (vlm.freeze_vision or vlm.freeze_language):
        return
    if vlm.freeze_vision and vlm.freeze_language:
        raise ConfigError(
            "model.vlm.freeze_vision=true requires model.vlm.freeze_language=false, else nothing learns: set one of "
            "them"
        )
    if lora is not None:
        raise ConfigError(
            "model.lora requires neither model.vlm.freeze_vision nor model.vlm.freeze_language, since nothing but the "
            "adapters learns anyway, and they are the language model's: leave both false"
        )


def tiny_is_a_model(config: RunConfig) -> None:
    """A checkpoint that is built here is a Qwen3-VL whose sizes fit each other."""
    if config.model.tiny is None:
        return
    family = family_of(config.model.vlm)
    if not family.builds_tiny:
        raise ConfigError(
            "model.tiny requires model.vlm.family=qwen3_vl, else the Qwen3-VL that it builds is loaded as another "
            "model: drop the change to model.vlm, or load a checkpoint with model=qwen3vl model.name=…"
        )
    if problem := family.tiny_problem(config.model.tiny):
        raise ConfigError(f"model.tiny.{problem}: change one of them")
