"""Loads a checkpoint's processor with its image half only: tokenizer, image processor on PIL, chat template.

transformers' `AutoProcessor` also makes the parts for video and audio. Those need torchvision and other packages, and
no path here has a video. So the processor's class is found as `AutoProcessor` finds it, and its other parts are None.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmrl.errors import ModelError, headline


def make_processor(folder: Path, tokenizer: Any, image_processor: Any) -> Any:
    """The processor of `folder` around these two parts. Raises `ModelError`."""
    name = _class_name(folder)
    processor_class = _import(name)
    attributes = processor_class.get_attributes()
    if "image_processor" not in attributes:
        raise ModelError(f"the processor {name} of {folder} takes no images, so it cannot render them for a VLM")

    def check(self: Any, argument: str, value: Any) -> Any:
        return None if value is None else processor_class.check_argument_for_proper_class(self, argument, value)

    of_images: Any = type(name, (processor_class,), {"check_argument_for_proper_class": check})
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    try:
        settings, unused = processor_class.get_processor_dict(folder, local_files_only=True)
        return of_images.from_args_and_dict([parts.get(part) for part in attributes], settings, **unused)
    except Exception as error:  # code of any family, over files that may hold anything
        raise ModelError(f"the processor {name} of {folder} does not load: {headline(error)}") from error


def _class_name(folder: Path) -> str:
    """The class that the checkpoint names, else the one that transformers has for its `model_type`."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if name := _read(folder / file).get("processor_class"):
            return str(name)
    family = str(_read(folder / "config.json").get("model_type"))
    name = _known_classes().get(family)
    if name is None:
        raise ModelError(
            f"{folder} names no processor_class, and transformers has none for model_type={family}, so nothing would "
            "say how an image becomes tokens: add processor_class to processor_config.json"
        )
    return str(name)


def _import(name: str) -> Any:
    """The class by its module: `transformers.PixtralProcessor` cannot be touched without torchvision."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    families = [model_type_to_module_name(family) for family, known in _known_classes().items() if known == name]
    for family in dict.fromkeys(families):
        package = f"transformers.models.{family}"
        module = f"{package}.processing_{family}"
        if find_spec(package) is None or find_spec(module) is None:
            continue
        try:
            with _on_pil(package, family):
                imported = importlib.import_module(module)
        except ImportError as error:
            raise ModelError(f"the processor {name} needs a package that is not installed: {error}") from error
        return getattr(imported, name)
    raise ModelError(
        f"transformers has no processor {name}. Code that comes with a checkpoint is not run: use a checkpoint whose "
        "processor is part of transformers, or a newer transformers"
    )


def _known_classes() -> dict[str, str]:
    """`model_type` → name of the processor's class."""
    from transformers.models.auto import processing_auto

    names: Any = processing_auto
    return dict(names.PROCESSOR_MAPPING_NAMES)


@contextmanager
def _on_pil(package: str, family: str) -> Iterator[None]:
    """Without torchvision, the processor's module finds the module of the image processor on PIL where it looks for the
    one on torchvision. Both have the same functions for sizes."""
    on_pil, on_torchvision = f"{package}.image_processing_pil_{family}", f"{package}.image_processing_{family}"
    if find_spec("torchvision") is not None or find_spec(on_pil) is None or on_torchvision in sys.modules:
        yield
        return
    sys.modules[on_torchvision] = importlib.import_module(on_pil)
    try:
        yield
    finally:
        del sys.modules[on_torchvision]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is corrupt: {error}") from error
    return content if isinstance(content, dict) else {}
