"""Loads a checkpoint's processor without torchvision, which transformers wants for video processors only."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import vlmrl.models  # noqa: F401  # makes torchvision importable next to a CPU build of torch

MODULE = "support.families.no_video"
"""Where the stand-in for transformers' AutoVideoProcessor is imported from."""


class NoVideo(dict[str, Any]):
    """A video processor that does nothing; a dict, because a processor writes its parts as JSON."""

    num_frames: ClassVar[None] = None
    fps: ClassVar[None] = None
    model_input_names: ClassVar[list[str]] = []

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoVideo:
        return cls()


def load_processor(folder: Path) -> Any:
    """The processor of `folder`, as `AutoProcessor` makes it, on PIL and with a video processor that does nothing.

    num2words, which SmolVLM's processor wants for messages about videos, gets a stand-in too.
    """
    from transformers import ProcessorMixin, processing_utils
    from transformers.models.smolvlm import processing_smolvlm

    mapping = processing_utils._LazyAutoProcessorMapping
    names = mapping._MAPPING_NAMES | {"video_processor": (MODULE, "NoVideo")}
    check: Any = ProcessorMixin.check_argument_for_proper_class

    def check_but_video(self: Any, name: str, value: Any) -> Any:
        return None if name == "video_processor" else check(self, name, value)

    with (
        patch.dict(sys.modules, {MODULE: SimpleNamespace(NoVideo=NoVideo)}),
        patch.object(mapping, "_MAPPING_NAMES", names),
        patch.object(ProcessorMixin, "check_argument_for_proper_class", check_but_video),
        patch.object(processing_smolvlm, "num2words", str),
    ):
        return _processor_class(folder).from_pretrained(folder, local_files_only=True, **_backend(folder))


def _backend(folder: Path) -> dict[str, str]:
    """PIL, unless transformers has the family's image processor for torchvision only."""
    from transformers.models.auto import image_processing_auto

    names = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    known = names.get(json.loads((folder / "config.json").read_text())["model_type"], {"pil"})
    return {"backend": "pil"} if "pil" in known else {}


def _processor_class(folder: Path) -> Any:
    """The class by its module: `transformers.PixtralProcessor` cannot be touched without torchvision."""
    from transformers.models.auto import processing_auto

    named = {json.loads(file.read_text()).get("processor_class") for file in folder.glob("*processor_config.json")}
    (name,) = named - {None}
    names = processing_auto.PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    for family in (family.replace("-", "_") for family, known in names.items() if known == name):
        if find_spec(f"transformers.models.{family}.processing_{family}") is not None:
            return getattr(_import_on_pil(f"transformers.models.{family}", family), name)
    raise LookupError(f"transformers has no {name}")


def _import_on_pil(package: str, family: str) -> Any:
    """Import the processor's module. Some take a function of their image processor's module, which imports torchvision;
    the module of its PIL version has the same function."""
    on_pil, on_torchvision = f"{package}.image_processing_pil_{family}", f"{package}.image_processing_{family}"
    if find_spec(on_pil) is None or find_spec("torchvision") is not None:
        return importlib.import_module(f"{package}.processing_{family}")
    sys.modules[on_torchvision] = importlib.import_module(on_pil)
    try:
        return importlib.import_module(f"{package}.processing_{family}")
    finally:
        del sys.modules[on_torchvision]
