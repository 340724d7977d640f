"""`model=auto`: what the checkpoint says fills what the user left open, after composing and before checking.

    model.vlm.<field>=auto   the family's file in conf/model/vlm, where there is one; else the checkpoint's own files
    model.vlm.video          null for a family whose file has no videos
    model.vlm                null for a checkpoint without a vision tower
    model.dtype=auto         the checkpoint's own on a GPU, float32 on a CPU; inference.dtype=auto likewise
    orchestrator.renderer    `template` for a text-only model for which none is set

A value that the user set is never replaced. config.yaml holds what was filled in, so a resumed run keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmrl.config.conf_folder import CONF
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, Init, ModelConfig, VideoConfig, VLMConfig
from vlmrl.config.orchestrator import TEMPLATE
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError

if TYPE_CHECKING:  # it imports torch, which a refused configuration should not wait for
    from vlmrl.models.checkpoints.facts import Facts

AUTO = "auto"

FOUND = ("family", "renderers", "positions", "image_token")
"""The fields of `model.vlm` that can be found in a checkpoint."""


def fill_model(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` without a field that waits for the checkpoint, and what was found, for the user to read.

    Raises `ConfigError` where the checkpoint cannot be read or does not say what it has to.
    """
    model = config.model
    notes: list[str] = []
    if model.vlm is not None and _open_fields(model.vlm):
        if model.tiny is not None or model.init is Init.random:
            setting = "model.tiny" if model.tiny is not None else "model.init=random"
            raise ConfigError(
                f"{setting} builds a checkpoint, and model.vlm.{_open_fields(model.vlm)[0]}=auto is read from one, so "
                "the family to build is not known: choose it with model=qwen3vl or model/vlm=<family>"
            )
        from vlmrl.models.checkpoints.facts import read_facts

        vlm, notes = _filled(model, read_facts(model.name))
        model = dataclasses.replace(model, vlm=vlm)
    if model.dtype is Dtype.auto:
        model = dataclasses.replace(model, dtype=_dtype(model))
    config = dataclasses.replace(config, model=model)
    if isinstance(config.inference, VllmConfig) and config.inference.dtype is Dtype.auto:
        config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, dtype=model.dtype))
    renderer = config.orchestrator.renderer
    if model.vlm is None and model.tiny is None and renderer is not None and renderer.name == AUTO:
        renderer = dataclasses.replace(renderer, name=TEMPLATE)
        config = dataclasses.replace(config, orchestrator=dataclasses.replace(config.orchestrator, renderer=renderer))
    return config, notes


def known_families() -> dict[str, dict[str, Any]]:
    """`model_type` → the content of its file in conf/model/vlm."""
    import yaml

    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((CONF / "model/vlm").glob("*.yaml"))]
    return {fields["family"]: fields for fields in found if fields["family"] != AUTO}


def _open_fields(vlm: VLMConfig) -> list[str]:
    fields = [name for name in FOUND if getattr(vlm, name) in (AUTO, [AUTO])]
    return [*fields, "video.token"] if vlm.video is not None and vlm.video.token == AUTO else fields


def _filled(model: ModelConfig, facts: Facts) -> tuple[VLMConfig | None, list[str]]:
    """`model.vlm` with what was found, and the sentences that say so."""
    assert model.vlm is not None
    where = f"model.name={model.name}: config.json says model_type={facts.family}"
    if not facts.has_images:
        return None, [f"{where}, without a vision tower, so it is a text-only model (as ~model/vlm would say)"]
    known = known_families().get(facts.family, {})
    fields = {name: _found(name, facts, known) for name in _open_fields(model.vlm) if name in FOUND}
    if fields.get("image_token", "") is None:
        from vlmrl.models.checkpoints.facts import IMAGE_TOKEN_KEYS

        raise ConfigError(
            f"{where}, and it has no {' or '.join(IMAGE_TOKEN_KEYS)} that tokenizer.json spells, so no placeholder "
            "would be found: set model.vlm.image_token=<the token that stands for an image>"
        )
    vlm = dataclasses.replace(model.vlm, **fields, video=_video(model.vlm, facts, known))
    source = f"conf/model/vlm has its family: model/vlm={_file_of(facts.family)}" if known else "as model/vlm=<file>"
    return vlm, [f"{where}; {source}", *_as_yaml(vlm)]


def _found(name: str, facts: Facts, known: Mapping[str, Any]) -> Any:
    """The value of one field of `model.vlm`; None where nothing says it."""
    if known.get(name, AUTO) not in (AUTO, [AUTO]):
        return known[name]
    return {
        "family": facts.family,
        "renderers": [TEMPLATE],
        "positions": facts.positions,
        "image_token": facts.image_token,
    }[name]


def _video(vlm: VLMConfig, facts: Facts, known: Mapping[str, Any]) -> VideoConfig | None:
    """`model.vlm.video` with the checkpoint's own token. None for a family whose file in conf/model/vlm has no videos,
    and for a checkpoint without a token for them."""
    if vlm.video is None or vlm.video.token != AUTO:
        return vlm.video
    if "video" not in known or facts.video_token is None:
        return None
    return dataclasses.replace(vlm.video, token=facts.video_token)


def _file_of(family: str) -> str:
    import yaml

    paths = sorted((CONF / "model/vlm").glob("*.yaml"))
    return next(p.stem for p in paths if yaml.safe_load(p.read_text(encoding="utf-8"))["family"] == family)


def _as_yaml(vlm: VLMConfig) -> list[str]:
    """The lines of a file for conf/model/vlm."""
    import yaml

    fields = {name: getattr(vlm, name) for name in FOUND}
    if vlm.video is not None:
        fields["video"] = {"token": vlm.video.token}
    text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    return [f"    {line}" for line in text.splitlines()]


def _dtype(model: ModelConfig) -> Dtype:
    """The number format that `model.dtype=auto` means on this machine."""
    from vlmrl.models.checkpoints.facts import read_facts
    from vlmrl.models.checkpoints.load import resolve_device

    if resolve_device(model).type == "cpu":
        return Dtype.float32
    own = None if model.tiny is not None or model.init is Init.random else read_facts(model.name).dtype
    return Dtype(own) if own in ("bfloat16", "float16", "float32") else Dtype.bfloat16
