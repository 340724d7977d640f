"""What makes a family's tiny checkpoint, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.families.vocabulary import Vocabulary, padded_size, tokenizer_config, trained
from support.families.weights import Scales, write_weights

TEMPLATES = Path(__file__).parent / "templates"

Ids = Mapping[str, int]
"""The id of every token; `ids["vocab_size"]` is the number of rows of the embedding."""

Origin = Literal["packaged", "transcribed", "invented"]


@dataclass(frozen=True)
class Recipe:
    """A family: which classes of transformers, which tokenizer, template and processor."""

    model_type: str
    """Of config.json; the key of transformers' auto classes."""
    vocabulary: Vocabulary
    config: Callable[[Ids], dict[str, Any]]
    """Arguments of the family's config class."""
    template: str
    """The file in templates/, without its suffix."""
    template_source: tuple[Origin, str]
    """How the template came here, and the public repository and file that it follows."""
    stop: tuple[str, ...]
    """Tokens that end a turn: `eos_token_id` of generation_config.json."""
    image_token: str | None = None
    """The token whose positions take an image's features; None for a text model."""
    placeholder: str | None = None
    """What the template writes for an image, where it is not `image_token`."""
    processor_class: str | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json."""
    video_processor: dict[str, Any] = field(default_factory=dict)
    """video_preprocessor_config.json; empty for a family whose videos are not shown."""
    video_token: str | None = None
    """The token whose positions take a video's features."""
    processor: dict[str, Any] = field(default_factory=dict)
    """Arguments of the processor's class: processor_config.json."""
    scales: Scales = field(default_factory=Scales)
    needs_torchvision: bool = False
    """Whether transformers has the image processor for torchvision only, not for PIL."""


def build(name: str, folder: Path, *, seed: int = 0, dtype: str = "float32", texts: tuple[str, ...] = ()) -> Path:
    """Write the checkpoint of family `name` into `folder`; return `folder`. Its vocabulary learns from `texts` too.

    The same arguments write the same bytes. Raises `KeyError` for a family that is not in `FAMILIES`.
    """
    from support.families import FAMILIES

    recipe = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trained(recipe.vocabulary, name, texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    _write(folder / "tokenizer_config.json", tokenizer_config(recipe.vocabulary) | _class_of(recipe))
    template = (TEMPLATES / f"{recipe.template}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template.removesuffix("\n"), encoding="utf-8")
    if recipe.image_processor:
        _write(folder / "preprocessor_config.json", recipe.image_processor | _class_of(recipe))
    if recipe.video_processor:
        _write(folder / "video_preprocessor_config.json", recipe.video_processor | _class_of(recipe))
    if recipe.processor:
        _write(folder / "processor_config.json", recipe.processor | _class_of(recipe))
    config = _config(recipe, {**ids, "vocab_size": padded_size(tokenizer)})
    write_weights(config, folder, recipe.scales, seed=seed, dtype=dtype, has_images=recipe.image_token is not None)
    _write(folder / "generation_config.json", _generation(recipe, ids))
    return folder


def _config(recipe: Recipe, ids: Ids) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(recipe.model_type, **recipe.config(ids))


def _class_of(recipe: Recipe) -> dict[str, str]:
    return {"processor_class": recipe.processor_class} if recipe.processor_class else {}


def _generation(recipe: Recipe, ids: Ids) -> dict[str, Any]:
    vocabulary = recipe.vocabulary
    numbers: dict[str, Any] = {
        "do_sample": True,
        "eos_token_id": [ids[token] for token in recipe.stop],
        "pad_token_id": ids[vocabulary.pad],
    }
    if vocabulary.bos is not None:
        numbers["bos_token_id"] = ids[vocabulary.bos]
    return numbers


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
